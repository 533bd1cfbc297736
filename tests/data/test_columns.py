"""Columns by their role: guessed by their names and values, asked about, or told with a hint that leads on."""

import base64
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkimg.config.load import load_config
from thinkimg.data.columns import guess_columns, read_columns, require_columns
from thinkimg.data.fields import look_up
from thinkimg.data.refusal import Refused
from thinkimg.data.settings import Columns
from thinkimg.data.source import open_source
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

COLOURS = ["red", "blue", "green"]


def picture(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def text(colour):
    return base64.b64encode(picture(colour)).decode()


BASE = {"image": text(0), "question": "Which?", "answer": "B"}


def read(root, records, *flags, name="data.jsonl"):
    path = root / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = load_config("development", [f"data.path={path}", *flags]).data
    return list(open_source(data, ImageLimits()).rows())


def guess(record, **columns):
    return guess_columns(Columns(**columns), tuple(record), [record])[0]


SERIES = [
    ("A", "B", "C"),
    ("option_a", "option_b", "option_c"),
    ("choiceA", "choiceB", "choiceC"),
    ("Option 1", "Option 2", "Option 3"),
    ("opt0", "opt1", "opt2"),
]


@pytest.mark.parametrize("names", SERIES)
def test_a_column_for_each_option_makes_choices_that_can_be_stated(tmp_path, names):
    record = {**BASE, **dict(zip(names, COLOURS, strict=True))}
    assert guess(record).choices == ",".join(names)
    stated = ["data.schema=none", f"data.columns.choices={','.join(names)}"]
    for flags in ([], stated):
        [row] = read(tmp_path, [record], *flags)
        assert (row.choices, row.answers, row.columns) == (tuple(COLOURS), ("blue",), {})


def test_fewer_options_are_fewer_choices_and_a_gap_is_refused(tmp_path):
    record = {**BASE, "option_a": "red", "option_b": "blue", "option_c": None}
    rows = read(tmp_path, [record, {**record, "option_b": "", "option_c": "green"}])
    assert rows[0].choices == ("red", "blue") and isinstance(rows[1], Refused)


@pytest.mark.parametrize("names", [("A",), ("A", "C"), ("B", "C"), ("a", "b"), ("sample_a", "sample_b"), ("option2",)])
def test_other_columns_are_no_options(names):
    assert guess({**BASE, **dict.fromkeys(names, "x")}).choices is None


def test_numbered_pictures_are_one_list_without_the_empty_ones(tmp_path):
    record = {"image_1": text(1), "image_2": text(2), "image_3": None, "question": "Which?", "answer": "red"}
    assert guess(record).image == "image_1,image_2,image_3"
    rows = read(tmp_path, [record, {**record, "image_2": None}])
    assert [[image() for image in row.images] for row in rows] == [[picture(1), picture(2)], [picture(1)]]


def test_pictures_in_another_column_than_their_names_are_taken_from_there():
    record = {**BASE, "image": "images/1.jpg", "decoded_image": {"bytes": picture(1), "path": None}}
    assert guess(record).image == "decoded_image"
    assert guess({**record, "image": record["decoded_image"]}).image is None
    assert guess({**record, "decoded_image": "images/1.png"}).image is None


LISTS = [COLOURS, str(COLOURS), json.dumps(COLOURS), "(A) red (B) blue (C) green", "A. red\nB. blue\nC. green",
         {"A": "red", "B": "blue", "C": "green"}, {"label": ["A", "B", "C"], "text": COLOURS}]  # fmt: skip


@pytest.mark.parametrize("name", ["choices", "options"])
@pytest.mark.parametrize("value", LISTS)
def test_options_are_found_in_every_form_also_where_most_rows_have_none(tmp_path, name, value):
    rows = read(tmp_path, [{**BASE, name: value}, *({**BASE, "answer": "red", name: empty} for empty in ([], None))])
    assert [row.choices for row in rows] == [tuple(COLOURS), (), ()] and rows[0].answers == ("blue",)
    [_, none, missing] = read(tmp_path, [{**BASE, name: value}, *({**BASE, name: empty} for empty in ([], None))],
                              "data.schema=none", f"data.columns.choices={name}")  # fmt: skip
    assert none.choices == () and isinstance(missing, Refused)


@pytest.mark.parametrize(
    "value",
    [
        "red|blue|green",
        "red; blue",
        "red, blue, green",
        "As said\nA. red\nB. blue",
        {"label": ["A", "B"], "text": ["red"]},
        {"a": 1},
        ["red"],
    ],
)
def test_a_column_of_options_that_cannot_be_read_is_asked_about(tmp_path, value):
    with pytest.raises(UserError, match="'options' holds no list of options") as error:
        read(tmp_path, [{**BASE, "options": value}])
    assert "data.schema=none" in error.value.hint
    [row] = read(tmp_path, [{**BASE, "options": value}], "data.schema=none")
    assert row.choices == () and row.columns == {"options": value}


@pytest.mark.parametrize("name", ["correct_choice_idx", "answer_idx", "answer_index"])
def test_an_index_in_a_column_of_its_own_names_the_choice(tmp_path, name):
    [row] = read(tmp_path, [{"image": text(0), "question": "Which?", "choices": COLOURS, name: 1}])
    assert row.answers == ("blue",)


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"image": "a.png", "question": "?", "correct": "red", "wrong": "blue"}, "columns.answer, perhaps to correct"),
        ({"image": "a.png", "qa": {"question": "?", "answer": "red"}}, "columns.question, perhaps to qa.question"),
        ({"Bild": {"bytes": b"x", "path": None}, "question": "?", "answer": "x"}, "columns.image, perhaps to Bild."),
        ({"image_left": "a", "question": "?", "answer": "x"}, "columns.image, perhaps to image_left"),
    ],
)
def test_a_missing_role_is_told_with_the_columns_that_may_have_it(record, hint):
    columns = Columns(image="image", question="question", answer="answer")
    with pytest.raises(UserError) as error:
        require_columns(columns, tuple(record), "data.jsonl", [record])
    assert hint in error.value.hint


def test_each_of_several_columns_has_to_be_there():
    columns = Columns(image="image", question="question", answer="answer", choices="A,B")
    require_columns(columns, (*BASE, "A", "B"), "data.jsonl")
    with pytest.raises(UserError, match="no column 'A,B' for the choices"):
        require_columns(columns, (*BASE, "A"), "data.jsonl")
    assert {"A", "B"} <= read_columns(columns)


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()) | st.binary()


@given(st.dictionaries(st.sampled_from(["A", "B", "A,B", "image_1", "options", "image", "x.y"]) | st.text(), JSON))
@settings(max_examples=200, deadline=None)
def test_any_columns_are_guessed_or_asked_about(record):
    try:
        columns = guess(record)
    except UserError as error:
        assert error.hint
        return
    for name in read_columns(columns):
        look_up(record, name)  # never an exception
    assert {part for part in read_columns(columns) if "," not in part} <= set(record)


@pytest.mark.parametrize("value", [3, "what I thought of it", "x" * 300])
def test_a_column_of_that_name_that_holds_no_options_is_the_users_own(tmp_path, value):
    [row] = read(tmp_path, [{**BASE, "options": value}])
    assert row.choices == () and row.columns == {"options": value}
