"""The contact sheet: a page that shows what is in a sample, whatever its texts hold, and loads nothing."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_sets import look, write_signs

from thinkimg.console import escape_controls
from thinkimg.data.report.example import SIDE, make_example, make_thumbnail
from thinkimg.data.report.lines import crop, example_lines, refused_lines, report_lines
from thinkimg.data.report.page import check_page
from thinkimg.data.report.sheet import Section, render_sheet
from thinkimg.errors import UserError
from thinkimg.images.settings import ViewLimits
from thinkimg.records import AnswerType, Sample

VIEW = ViewLimits(min_pixels=56 * 56, max_pixels=1280 * 28 * 28)
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements of a page as (tag, attributes, text); AssertionError for a tag that is not closed in its turn."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[tuple[str, dict, list[str]]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        element = tag, dict(attributes), []
        assert len(element[1]) == len(attributes), "an attribute stands twice"
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def find(self, tag, kind=None):
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.elements
            if name == tag and kind in (None, attributes.get("class"))
        ]


def sample(question="Where?", answers=("red",), kind=AnswerType.TEXT, choices=(), targets=()):
    return Sample("a:1", question, answers, kind, choices, (), "files", "train", targets=targets)


def example(one, image=None, where="a.jsonl line 1", changes=()):
    pictures = [make_thumbnail(image or Image.new("RGB", (60, 40), "teal"))]
    return make_example(where, one, pictures, VIEW, lambda sample, sizes: f"{sizes} {sample.question}", changes)


def render(*examples, facts=(), title="Title"):
    return Page(render_sheet(title, [Section("Part", list(facts), examples)]))


def test_boxes_are_in_pixels_of_the_picture_and_the_right_option_is_marked():
    targets = ((1200, 900, 500.5, 400), (60, 60, 20, 20))
    one = sample(kind=AnswerType.CHOICE, choices=("red", "blue"), targets=targets, answers=("blue",))
    page = render(example(one, Image.new("RGB", (2048, 1500))))
    ((frame, _),) = page.find("svg")
    assert frame["viewbox"] == "0 0 2048 1500"
    boxes = [
        tuple(float(box[edge]) for edge in ("x", "y", "width", "height")) for box, _ in page.find("rect", "target")
    ]
    assert boxes == [tuple(map(float, box)) for box in targets]
    assert [text for _, text in page.find("li", "right")] == ["blue"] and len(page.find("li")) == 2
    page = render(example(sample(kind=AnswerType.BOX, answers=("[10.0, 20.0, 30.0, 15.5]",))))
    (box,) = page.find("rect", "answer")
    assert [float(box[0][edge]) for edge in ("x", "y", "width", "height")] == [10, 20, 30, 15.5]


def test_votes_are_counted_by_answer():
    votes = ("go", "stop", "go", *["halt"] * 5, "a", "b", "c")
    line = list(example_lines(example(sample(answers=votes, kind=AnswerType.VOTES))))[-1]
    counts = " or ".join(f"{answer} of 11)" for answer in ("halt (5", "go (2", "stop (1", "a (1", "b (1"))
    assert line == f"    right: {counts} and 1 more [votes]"


@pytest.mark.parametrize("size", [(1, 1), (9, 14), (480, 480), (5000, 40), (30, 3000), (1601, 1203)])
def test_pictures_are_small_and_inside_of_the_page(size):
    page = render(example(sample(), Image.new("RGB", size, "teal")))
    ((image, _),) = page.find("img")
    head, _, payload = image["src"].partition(",")
    small = Image.open(io.BytesIO(base64.b64decode(payload)))
    assert head == f"data:image/{small.format.lower()};base64" and small.format in ("JPEG", "PNG")
    assert max(small.size) == min(max(size), SIDE)
    wide, high = small.size
    assert abs(wide * size[1] - high * size[0]) <= max(size)  # the aspect is kept to half a pixel
    red, green, blue = np.asarray(small.convert("RGB")).reshape(-1, 3).mean(0)
    assert red < 40 and green > 90 and blue > 90


HOSTILE = [
    "</p></article><script>alert(1)</script>", "<img src=https://example.org/a.png onerror=alert(1)>",
    "\x1b[31mred\x1b[0m", "\u202egnp.exe", "a\x00b", "&lt;b&gt;", "\r\rover", "\u2066\u2069", "x" * 100_000,
    "\n" * 5000, '" onload="x', "\ud800", "-->", "]]>", "\u200b\ufeff", "\x9b31m",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_texts(text):
    """They add no element and no attribute to the page, and move nothing at a terminal."""

    def page_of(text):
        one = sample(text, (text,), AnswerType.CHOICE, (text, text + "2"))
        shown = example(one, where=text, changes=(text,))
        return render_sheet(text, [Section(text, [(text, [text]), ("reproduce", [text])], [shown])]), shown

    page, shown = page_of(text)
    plain, _ = page_of("plain")
    elements = [(tag, attributes) for tag, attributes, _ in Page(page).elements]
    assert elements == [(tag, attributes) for tag, attributes, _ in Page(plain).elements]
    page.encode()
    lines = "\n".join(report_lines(crop(text), [("label", [crop(text)])], [shown])) + "\n".join(example_lines(shown))
    for character in page + lines:
        assert character == "\n" or character.isprintable()
    assert len(page) < 200_000 and len(lines) < 20_000


@given(st.text())
@settings(max_examples=200)
def test_a_text_without_controls_is_shown_as_it_is(text):
    shown = escape_controls(text)
    assert escape_controls(shown) == shown
    assert all(character in "\n\t" or character.isprintable() or character.isspace() for character in shown)
    if text.isprintable():
        assert shown == text


def test_the_page_loads_nothing():
    page = render(example(sample("see https://example.org/x.png")))
    assert not page.find("script") and not page.find("link") and not page.find("iframe")
    loaded = [
        value for _, attributes, _ in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert loaded and all(value.startswith("data:image/") for value in loaded)
    ((style, text),) = page.find("style")
    assert "url(" not in text and "@import" not in text
    policies = [attributes["content"] for attributes, _ in page.find("meta") if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_table_of_the_user_s_is_not_written_over(tmp_path):
    for name in ("train.parquet", "signs.jsonl", "page", "no folder/page.html"):
        with pytest.raises(UserError):
            check_page(tmp_path / name)
    with pytest.raises(UserError):
        check_page(Path(tmp_path, "page.html").absolute() / "..")
    check_page(tmp_path / "page.HTML")


def test_the_samples_of_a_look_have_pictures_where_they_are_asked_for(tmp_path):
    root = write_signs(tmp_path / "signs", 5)
    assert all(not picture.uri for report in look(root) for one in report.examples for picture in one.pictures)
    (report,) = look(root, pictures=True)
    assert len(render(*report.examples).find("img")) == 5


@pytest.mark.parametrize(("refused", "stops"), [({}, False), ({"path": 1}, False), ({"path": 1, "syntax": 1}, True)])
def test_rows_left_out_beyond_what_is_allowed_are_said_to_stop_prepare(refused, stops):
    lines = list(refused_lines(refused, dict.fromkeys(refused, "x"), 20, 0.05))
    assert any("would stop" in line for line in lines) == stops
