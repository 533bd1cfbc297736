"""Tables that may be read in two ways, or in part alone: all of them is read, or a sentence asks."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_sets import look, picture, settings_of, write_lines

from thinkimg.data.refusal import Refused
from thinkimg.data.source import open_source
from thinkimg.data.tables import table
from thinkimg.data.tables.arrow_rows import to_rows
from thinkimg.images.decode import ImageLimits


def read(path, *overrides):
    (path.parent / "0.png").write_bytes(picture(0))
    return list(open_source(settings_of(path, *overrides), ImageLimits()).rows())


def record(number, **more):
    return {"image": "0.png", "question": f"What is {number}?", "answer": "red"} | more


# columns that late rows have ------------------------------------------------------------------------------------------

CHOICES = ["red", "blue"]


@pytest.mark.parametrize("name", ["choices", "options"])
@pytest.mark.parametrize("first, late", [(120, 60), (300, 1), (0, 5)])
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "pairs"])
def test_columns_of_late_rows_are_read_in_every_form(tmp_path, form, first, late, name):
    records = [record(i) for i in range(first)] + [record(first + i, **{name: CHOICES}) for i in range(late)]
    if form == "pairs":
        for i, one in enumerate(records):
            (tmp_path / f"{i:04}.png").write_bytes(picture(0, (8, 8)))
            (tmp_path / f"{i:04}.json").write_text(json.dumps({key: one[key] for key in one if key != "image"}))
        rows = list(open_source(settings_of(tmp_path), ImageLimits()).rows())
    else:
        path = write_lines(tmp_path / "a.jsonl", records)
        if form == "parquet":
            path = tmp_path / "a.parquet"
            pq.write_table(pa.Table.from_pylist([dict.fromkeys([name]) | one for one in records]), path)
        if form == "json":
            path = tmp_path / "a.json"
            path.write_text(json.dumps(records))
        rows = read(path)
    assert [row.choices for row in rows] == [()] * first + [tuple(CHOICES)] * late


@pytest.mark.parametrize("is_small", [True, False])
def test_a_column_that_is_named_is_looked_for_in_all_rows(tmp_path, monkeypatch, is_small):
    monkeypatch.setattr(table, "SMALL", 10**9 if is_small else 0)
    records = [record(i) for i in range(2000)] + [record(2000, colours=CHOICES)]
    path = write_lines(tmp_path / "a.jsonl", records)
    assert read(path, "data.columns.choices=colours")[-1].choices == tuple(CHOICES)
    (report,) = look(path, "data.columns.choices=colours")
    assert report.problem is None
    (report,) = look(path, "data.columns.choices=hues")
    assert "has no column 'hues'" in str(report.problem)


# commas in numbers ----------------------------------------------------------------------------------------------------

COMMAS = {
    "1,5": False, "1,234": False, "-1,5": False, "12,5 kg": False, "1.234,5": False, "$1,5": False, "1,5 %": False,
    "1,234.5": True, "1,234,567": True, "12": True, "1.5": True, "red, blue": True, "5, 6": True, "a1,5b": True,
    "Smith, 5,6 of them": True,
}  # fmt: skip


@pytest.mark.parametrize("mark", [";", ",", "\t", "|"])
def test_a_comma_in_a_number_of_a_table_with_semicolons_is_refused(tmp_path, mark):
    path = tmp_path / "a.csv"
    lines = [mark.join(["0.png", f"q{i}", f'"{answer}"']) for i, answer in enumerate(COMMAS)]
    path.write_text("\n".join([mark.join(["image", "question", "answer"]), *lines]) + "\n")
    rows = read(path)
    accepted = [not isinstance(row, Refused) for row in rows]
    assert accepted == (list(COMMAS.values()) if mark == ";" else [True] * len(COMMAS))
    assert all("decimal comma" in row.detail for row in rows if isinstance(row, Refused))
    assert not any(isinstance(row, Refused) for row in read(path, "data.answer_type=text"))


# numbers of half and single precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@given(st.data())
def test_a_number_is_the_shortest_text_of_its_own_precision(kind, data):
    number = data.draw(st.floats(width=np.dtype(kind).itemsize * 8))
    narrow = pa.array([number, None], pa.from_numpy_dtype(kind))
    struct = pa.StructArray.from_arrays([narrow], ["x"])
    lists = pa.ListArray.from_arrays([0, 2], narrow)
    rows = to_rows(pa.record_batch({"plain": narrow, "inside": struct, "double": pa.array([0.1, 0.2])}))
    expected = float(str(kind(number)))
    for found in (rows[0]["plain"], rows[0]["inside"]["x"], to_rows(pa.record_batch({"list": lists}))[0]["list"][0]):
        assert found == expected or (found != found and expected != expected)
    assert rows[1] == {"plain": None, "inside": {"x": None}, "double": 0.2}


def test_answers_and_options_of_single_precision_are_those_that_were_written(tmp_path):
    columns = {
        "image": ["0.png"] * 2,
        "question": ["a?", "b?"],
        "choices": pa.array([[0.1, 0.25]] * 2, pa.list_(pa.float32())),
    }
    numbers = {"image": ["0.png"] * 2, "question": ["a?", "b?"], "answer": pa.array([0.1, 2010], pa.float32())}
    pq.write_table(pa.table(columns | {"answer": ["0.1", "0.25"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table(numbers), tmp_path / "b.parquet")
    assert [row.answers for row in read(tmp_path / "a.parquet")] == [("0.1",), ("0.25",)]
    assert [row.answers for row in read(tmp_path / "b.parquet")] == [("0.1",), ("2010",)]


# odd forms ------------------------------------------------------------------------------------------------------------

BY_COLUMNS = {"image": {"3": "0.png"}, "question": {"3": "What, then?"}, "answer": {"3": "red"}}


@pytest.mark.parametrize("name, text", [
    ("a.csv", 'image, question, answer\n0.png, "What, then?", red\n'),
    ("a.csv", "\ufeffsep=;\nimage;question;answer\n0.png;What, then?;red\n"),
    ("a.csv", 'SEP=,\r\nimage,question,answer\r\n0.png,"What, then?",red\r\n'),
    ("a.csv", "image|question|answer\n0.png|What, then?|red\n"),
    ("a.csv", "sep=|\nimage|question|answer\n0.png|What, then?|red\n"),
    ("a.tsv", "image \tquestion\t answer\n0.png\tWhat, then?\tred\n"),
    ("a.json", json.dumps(BY_COLUMNS)), ("a.json", json.dumps(BY_COLUMNS, indent=1)),
])  # fmt: skip
def test_what_is_clear_is_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    (row,) = read(tmp_path / name)
    assert (row.question, row.answers, row.columns) == ("What, then?", ("red",), {})
    assert text.splitlines()[-1].startswith("0.png") <= (f"line {len(text.splitlines())}" in row.where)


def test_lines_are_counted_from_the_first_of_the_file(tmp_path):
    (tmp_path / "a.csv").write_text('sep=;\nimage;question;answer\n0.png;q;a;b\n0.png;q;"open\n0.png;q;a\n')
    assert [row.where for row in read(tmp_path / "a.csv")] == [f"a.csv line {number}" for number in (3, 4, 5)]
