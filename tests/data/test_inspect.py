"""A look at a data set before it is prepared: what is counted is so, and the settings that it names say it again."""

import csv
import json
import os
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer, ask_locally
from hypothesis import given, settings
from hypothesis import strategies as st
from public_rows import verl
from rewards_rows import sample as make_sample
from small_sets import look, picture, settings_of, write_lines, write_signs

from thinkimg import hub
from thinkimg.config.load import load_config
from thinkimg.data import recognise
from thinkimg.data.report import alike
from thinkimg.data.report import inspect as module
from thinkimg.data.report.alike import find_pattern, group_alike
from thinkimg.data.report.lines import describe, example_lines, state_right, summary_facts, table_facts
from thinkimg.data.report.overrides import add_pins, shell_command
from thinkimg.data.report.sheet import Section, render_sheet
from thinkimg.data.report.summary import Summary
from thinkimg.data.sources.files import open_source
from thinkimg.data.tables import delimited
from thinkimg.data.tables.find import fits, open_table
from thinkimg.data.tables.table import Table
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

EMPTY = Summary("", {}, {}, 0, 0, Counter(), {}, (), {}, {}, ())


def test_rows_are_counted_by_what_becomes_of_them(tmp_path):
    """Origins, types and reasons add up to the rows that were looked at."""
    root = write_signs(tmp_path / "signs")
    (root / "3.png").write_bytes(b"no picture")
    lines = (root / "signs.jsonl").read_text().splitlines()
    lines += ['{"image": "missing.png", "question": "Why?", "answer": "so"}', "no JSON"]
    lines += ['{"image": "0.png", "question": "", "answer": "so"}']
    lines += ['{"image": "https://example.org/a.png", "question": "Why?", "answer": "so"}']
    (root / "signs.jsonl").write_text("\n".join(lines))
    (report,) = look(root)
    assert report.looked == 14 and report.problem is None
    assert report.refused.keys() <= {"path", "syntax", "empty", "url", "image_format"}
    assert {reason: report.refused[reason] for reason in ("path", "syntax", "empty", "url")} == dict.fromkeys(
        ("path", "syntax", "empty", "url"), 1
    )
    assert report.types.total() == report.pictures.total() == 14 - report.refused.total()
    assert "signs.jsonl line 11" in report.details["path"] and "example.org" in report.details["url"]
    assert report.pictures.keys() == {"files beside the table"} and set(report.sizes) == {(120, 90)}


def test_nothing_is_asked_of_a_host_that_is_not_allowed(tmp_path):
    """The rows are counted without a request; an allowed host that does not answer is asked once."""
    urls = {"image": lambda i: f"http://User@LocalHost:1/{i}.png" if i % 2 else f"http://[::1/{i}.png"}
    root = write_signs(tmp_path / "signs", 40, **urls)
    (report,) = look(root)
    assert report.refused == {"url": 40} and "data.url_hosts" in report.details["url"]
    (report,) = look(root, "data.url_hosts=[localhost]")
    assert report.refused["url"] == 20 + 1
    assert report.pictures == {"URLs of localhost": 19}


@pytest.mark.parametrize(
    ("value", "origin"),
    [
        (lambda i: {"bytes": picture(i), "path": None}, "bytes in the table"),
        (lambda i: picture(i), "bytes in the table"),
    ],
)
def test_pictures_inside_of_a_table(tmp_path, value, origin):
    rows = [{"image": value(i), "question": f"Q{i}?", "answer": f"a{i}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (report,) = look(tmp_path / "a.parquet")
    assert report.pictures == {origin: 5} and report.rows == 5


def test_pictures_in_an_archive_and_in_a_folder_elsewhere(tmp_path):
    root = write_signs(tmp_path / "signs", 4)
    shutil.make_archive(str(tmp_path / "packed"), "zip", root)
    for i in range(4):
        os.renames(root / f"{i}.png", tmp_path / "pictures" / f"{i}.png")
    (report,) = look(root, f"data.images={tmp_path / 'packed.zip'}")
    assert report.pictures == {"members of packed.zip": 4}
    assert report.pins["data.schema"] and "data.images" not in report.pins  # the user's own override is kept as it is
    (report,) = look(root, f"data.images={tmp_path / 'pictures'}")
    assert report.pictures == {"files of data.images": 4}


def rows_of(path: Path, overrides: list[str]) -> list:
    """What `prepare` makes of each row, without its readers."""
    data = load_config("tiny", overrides).data
    rows = open_source(data, ImageLimits()).rows()
    return [
        replace(row, images=tuple(read() for read in row.images)) if hasattr(row, "images") else row for row in rows
    ]


SETS = {
    "own names": {"picture": lambda i: f"{i}.png", "image": None, "query": lambda i: f"Q{i}?", "question": None},
    "several answers": {"answers": lambda i: ["red", "dark red"], "answer": None},
    "options": {"choices": lambda i: ["red", "blue"], "answer": lambda i: "AB"[i % 2]},
    "lettered": {"A": lambda i: "red", "B": lambda i: "blue", "answer": lambda i: "AB"[i % 2]},
}  # fmt: skip


@pytest.mark.parametrize("kind", SETS)
def test_the_settings_that_are_named_say_the_same_again(tmp_path, monkeypatch, kind):
    """Also where recognition has changed its mind: they leave nothing to it."""
    columns = {name: value for name, value in SETS[kind].items() if value}
    root = write_signs(tmp_path / "signs", 12, **columns)
    dropped = [name for name, value in SETS[kind].items() if value is None]
    records = [json.loads(line) for line in (root / "signs.jsonl").read_text().splitlines()]
    write_lines(root / "signs.jsonl", [{k: v for k, v in record.items() if k not in dropped} for record in records])
    (report,) = look(root)
    assert report.problem is None and report.types.total() == 12
    overrides = add_pins([], report.pins)
    before = rows_of(root, [f"data.path={root}"])
    monkeypatch.setattr(recognise, "guess_columns", lambda *_: pytest.fail("a column was guessed"))
    monkeypatch.setattr(recognise, "_closeness", lambda *_: pytest.fail("a schema was guessed"))
    assert rows_of(root, overrides) == before


def test_a_form_of_boxes_that_was_found_is_named(tmp_path):
    """Under auto a sheet shows the boxes only where one form fits."""
    corners = {"spot": lambda i: [0.5, 0.4, 0.75, 0.8 + i / 100]}
    root = write_signs(tmp_path / "corners", 6, **corners)
    (report,) = look(root, "data.columns.target=spot")
    assert report.pins["data.boxes"] == "unit_xyxy"
    assert report.examples[0].sample.targets == (pytest.approx((60, 36, 30, 36)),)
    root = write_signs(tmp_path / "either", 6, spot=lambda i: [10, 20, 30 + i, 40])
    (report,) = look(root, "data.columns.target=spot")
    assert "data.boxes" not in report.pins and report.examples[0].sample.targets == ()
    assert [oddity.name for oddity in report.oddities if oddity.level == "ask"] == ["box_form"]
    (report,) = look(root, "data.columns.target=spot", "data.boxes=xywh")
    assert report.examples[0].sample.targets == ((10, 20, 30, 40),)


def test_a_right_box_is_drawn_and_told_in_pixels_only_where_its_form_is_known(tmp_path):
    root = write_signs(tmp_path / "either", 6, answer=lambda i: [10, 20, 30 + i, 40])
    (report,) = look(root)
    shown = "\n".join(example_lines(report.examples[0]))
    assert "form is not known" in shown and "pixels of the picture" not in shown and "wide" not in shown
    assert '<rect class="answer"' not in render_sheet("a", [Section("b", [], report.examples)])
    (report,) = look(root, "data.boxes=xyxy")
    shown = "\n".join(example_lines(report.examples[0]))
    assert "x 10, y 20, 20 wide, 20 high [box, in pixels of the picture]" in shown
    assert '<rect class="answer"' in render_sheet("a", [Section("b", [], report.examples)])


def test_choices_that_the_user_names_are_chosen_from_whatever_the_schema_says_of_answers_alone(tmp_path):
    root = write_signs(tmp_path / "signs", 8)
    records = [
        verl(f"<image>Find x{i}.", str(3 + i % 3), images=[f"{i}.png"])
        | {"ability": "math", "options": ["3", "4", "5"]}
        for i in range(8)
    ]
    write_lines(root / "signs.jsonl", records)
    assert look(root)[0].types == {"maths": 8}
    (report,) = look(root, "data.columns.choices=options")
    assert report.types == {"choice": 8} and report.examples[0].sample.choices == ("3", "4", "5")


def test_an_empty_answer_is_told_by_the_name_of_its_column(tmp_path):
    root = write_signs(tmp_path / "signs", 4)
    answers = [[], None, ["a", None], "a"]
    write_lines(
        root / "signs.jsonl",
        [{"image": f"{i}.png", "question": f"Q{i}?", "solution": answer} for i, answer in enumerate(answers)],
    )
    (report,) = look(root)
    assert report.refused == {"empty": 3} and "solution is" in report.details["empty"]


def test_the_user_s_own_overrides_are_kept_but_for_those_that_are_stated_anew():
    given = ["data.path=x", "data.schema=auto", "images.max_pixels=4000", "data.answer_type=text"]
    pins = {"data.path": "x y", "data.schema": "vqa", "data.files": "a-*"}
    assert add_pins(given, pins) == [
        "data.path=x y", "images.max_pixels=4000", "data.answer_type=text", "data.schema=vqa", "data.files=a-*",
    ]  # fmt: skip


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=9))
@settings(max_examples=30)
def test_a_command_is_quoted_for_the_shell(values):
    overrides = [f"data.path={value}" for value in values]
    script = f"thinkimg() {{ printf '%s\\0' \"$@\"; }}\n{shell_command(overrides)}"
    done = subprocess.run(["bash"], input=script.encode(), capture_output=True, check=True, timeout=60)
    assert done.stdout.decode().split("\0") == [
        "prepare",
        *(word for text in overrides for word in ("--set", text)),
        "",
    ]


def test_pictures_are_decoded_by_the_handful(tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(module, "decode", lambda data, limits: decoded.append(data) or real(data, limits))
    root = write_signs(tmp_path / "signs", 100)
    (report,) = look(root)
    assert report.looked == 64 and 1 <= len(decoded) == len(report.sizes) <= module.PICTURES
    decoded.clear()
    monkeypatch.setattr(module, "PIXELS", 120 * 90)
    (report,) = look(root)
    assert len(decoded) == 2
    decoded.clear()
    write_signs(root, 3, image=lambda i: [f"{j % 3}.png" for j in range((1, 40, 7)[i])])
    (report,) = look(root)
    assert len(decoded) == 8 and len(report.examples) == 2 and report.pictures.total() == 48


real = module.decode


def test_the_look_ends_where_the_rows_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROW_BYTES", 500)
    (report,) = look(write_signs(tmp_path / "signs", 30, note=lambda i: "x" * 100))
    assert 3 <= report.looked <= 6


def test_shards_are_one_table(tmp_path):
    for i in range(7):
        rows = [{"image": picture(i * 9 + j), "question": f"Q{j}?", "answer": f"a{j}"} for j in range(4)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"train-{i:05}-of-00007.parquet")
    (report,) = look(tmp_path)
    assert (report.alike, report.rows, report.looked) == (7, 28, 12) and "data.files" not in report.pins


def test_each_of_several_tables_is_shown_though_it_is_unclear_which_is_meant(tmp_path):
    root = write_signs(tmp_path / "signs", 4)
    shutil.copy(root / "signs.jsonl", root / "train-1.jsonl")
    shutil.move(root / "signs.jsonl", root / "test-1.jsonl")
    question = alike.find_all(settings_of(root))[1]
    assert question and "data.files" in question.hint
    reports = look(root)
    assert {report.pins["data.files"] for report in reports} == {"train-1.jsonl", "test-1.jsonl"}
    for report in reports:
        assert len(rows_of(root, add_pins([], report.pins))) == 4


def test_of_the_hub_s_shards_one_is_fetched_for_a_look(tmp_path, monkeypatch):
    server = HubServer()
    try:
        ask_locally(monkeypatch, server, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        hub._resolve.cache_clear()
        files = {}
        for i in range(3):
            rows = [{"image": picture(9 * i + j), "question": f"Q{j}?", "answer": f"a{j}"} for j in range(4)]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
            files[f"data/train-0000{i}-of-00003.parquet"] = (tmp_path / "a.parquet").read_bytes()
        commit = server.commit("datasets", "someone/signs", files)
        (report,) = look("someone/signs")
        assert server.downloaded() == ["data/train-00000-of-00003.parquet"]
        assert report.types.total() == 4 and report.pins["data.path"] == "someone/signs"
        assert report.pins["data.revision"] == commit and "data.files" not in report.pins
        assert len(rows_of(tmp_path, add_pins([], report.pins))) == 12
    finally:
        server.close()
        hub._resolve.cache_clear()


NAMES = st.lists(
    st.from_regex(r"[a-c\[*?]{0,2}[0-9]{0,2}[a-b]?[0-9]{0,1}\.json", fullmatch=True), min_size=1, unique=True
)


@given(NAMES)
def test_a_pattern_fits_its_group_alone(names):
    tables = [
        Table(Path("/none", name), name, "JSON lines", "line", (), 1, None, None, None, Path("/none"), ())
        for name in names
    ]
    groups = group_alike(tables)
    assert Counter(table.name for group in groups for table in group) == Counter(names)
    for group in groups:
        pattern = find_pattern(group, tables)
        if pattern is not None:
            assert [table for table in tables if fits(table.name, pattern)] == group
        else:
            assert len(group) > 1  # such as a1 and a2 beside a1b


@pytest.mark.parametrize("make", [
    lambda root: root / "missing",
    lambda root: root,
    lambda root: (root / "a.png").write_bytes(picture(0)) and root / "a.png",
    lambda root: (root / "a.txt").write_text("hello") and root / "a.txt",
    lambda root: (root / "a.parquet").write_bytes(b"PAR1 and no more") and root / "a.parquet",
])  # fmt: skip
def test_what_is_no_data_set_is_said_in_one_sentence(tmp_path, make):
    with pytest.raises(UserError) as error:
        look(make(tmp_path))
    assert error.value.message.endswith(".") or error.value.hint


def test_a_table_that_can_t_be_read_is_shown_as_it_is(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"picture": "x", "frage": "?", "bytes": 3}])
    (report,) = look(tmp_path)
    assert isinstance(report.problem, UserError) and report.record == {"picture": "x", "frage": "?", "bytes": 3}
    assert report.pins == {} and report.examples == ()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(VALUES)
def test_any_value_in_any_column_is_a_sample_or_a_counted_reason(tmp_path_factory, value):
    root = tmp_path_factory.getbasetemp() / "any"
    if not root.exists():
        write_signs(root, 1)
    for column in ("image", "question", "answer"):
        good = {"image": "0.png", "question": "Q?", "answer": "a"}
        lines = [json.dumps(good), json.dumps(good | {column: value})]
        (root / "signs.jsonl").write_text("\n".join(lines))
        for report in look(root):
            assert report.problem or report.types.total() + report.refused.total() == report.looked == 2


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), max_size=12)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=30), st.sampled_from(["\t", ","]))
def test_rows_drawn_from_a_large_table_of_texts_are_its_own(tmp_path_factory, rows, mark):
    path = tmp_path_factory.getbasetemp() / f"large{'.tsv' if mark == chr(9) else '.csv'}"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=mark, lineterminator="\n").writerows([("a", "b", "c"), *rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "SMALL", -1)
        table = open_table(path, path.name, path.parent)
    drawn = [record for _, record in table.draw(10)]
    assert len(drawn) <= 10 and all(tuple(record.values()) in rows for record in drawn)
    assert len(drawn) >= min(2, len(rows) - 1)


@pytest.mark.parametrize("count", [1, 5, 6, 7, 40])
def test_what_a_report_cuts_is_counted(tmp_path, count):
    boxes = tuple((float(i), 0.0, 5.0, 5.0) for i in range(count))
    sample = replace(make_sample("a"), targets=boxes, answers=tuple(f"answer {i}" for i in range(count)))
    counts = {f"change {i}": 1 for i in range(count)}
    facts = dict(summary_facts(replace(EMPTY, changes=counts)))
    path = write_lines(tmp_path / "a.jsonl", [{f"column {i}": i for i in range(count)}])
    (report,) = look(path)
    row = dict(table_facts(report, "", 1))["a row"]
    for text, shown in (
        (state_right(sample).partition("look at ")[2], 5), (state_right(sample).partition(" [")[0], 5),
        (describe(dict(counts)), 5), (describe(list(counts)), 5), ("\n".join(facts["done"]), 12), ("\n".join(row), 30),
    ):  # fmt: skip
        assert (f"and {count - shown} more" in text) == (count > shown), text
