"""Every reader of JSONL splits the same way, and a file that is something else is named as what it looks like."""

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import zipfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paths import REPOSITORY
from PIL import Image

from thinkimg.data.json_lines import read_json_lines
from thinkimg.data.row import RawRow
from thinkimg.data.settings import DataConfig
from thinkimg.data.source import open_source
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.stages.demonstrate import read_scripts

SEPARATORS = [*"\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\n\u00a0\ufeff", "\r\n"]
TEXTS = [f"a{mark}b" for mark in SEPARATORS] + ["plain", "ä 九 \U0001f600"]


def questions(path, source="jsonl"):
    opened = open_source(DataConfig(source=source, path=str(path)), ImageLimits())
    return [row.question if isinstance(row, RawRow) else row for row in opened.rows()]


def turns(path):
    dataset = SimpleNamespace(split=lambda name: [SimpleNamespace(sample_id="s")])
    return [turns[0] for _, _, turns in read_scripts(SimpleNamespace(script=str(path)), dataset)]


def in_folder(path):
    return questions(path.parent, "folder")


READERS = {
    "jsonl": ("data.jsonl", questions),
    "folder": ("metadata.jsonl", in_folder),
    "demonstrations": ("d.jsonl", turns),
}


def encode(text, escaped=False):
    record = {"image": "0.png", "question": text, "answer": "!", "sample_id": "s", "turns": [text]}
    line = json.dumps(record, ensure_ascii=escaped)
    return line.encode()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b" \n"])
def test_lines_end_at_lf_and_nowhere_else(tmp_path, reader, end):
    name, read = READERS[reader]
    path = tmp_path / name
    for mark in (b"", b"\xef\xbb\xbf"):
        for last in (b"", end):
            path.write_bytes(mark + end.join(encode(text) for text in TEXTS) + last)
            assert read(path) == TEXTS
    path.write_bytes(end.join(encode(text, escaped=True) for text in TEXTS))
    assert read(path) == TEXTS


def test_no_reader_of_ours_splits_a_text_otherwise():
    packages = ("data", "stages", "puzzles", "answers")
    files = [path for name in packages for path in (REPOSITORY / "thinkimg" / name).rglob("*.py")]
    assert len(files) > 20
    assert [path.name for path in files if ".splitlines(" in path.read_text()] == []


def test_a_name_that_stands_twice_is_no_row(tmp_path):
    path = tmp_path / "d.jsonl"
    twice = [b'{"question": "a", "question": "b"}', b'{"x": {"y": 1, "y": 2}}']
    path.write_bytes(b"\n".join([encode("good"), *twice, encode("good")]))
    (_, first), (_, second), (_, third), (_, fourth) = read_json_lines(path)
    assert "question stands twice" in second and "y stands twice" in third
    assert isinstance(first, dict) and isinstance(fourth, dict)
    (tmp_path / "metadata.csv").write_text("file_name,question,answer,question\n0.png,a,b,c\n")
    with pytest.raises(UserError, match="has the column 'question' twice"):
        questions(tmp_path, "folder")


# Files that are something else

ROWS = [{"image": "0.png", "question": f"{i}?", "answer": "!", "sample_id": "s", "turns": ["x"]} for i in range(5)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def packed(kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("data.jsonl", JSONL)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    elif kind == "sqlite":
        connection = sqlite3.connect(":memory:")
        connection.execute("create table t (a)")
        return connection.serialize()
    else:
        Image.new("RGB", (30, 30)).save(buffer, kind)
    return buffer.getvalue()


OTHERS = {
    "UTF-16": [JSONL.encode("utf-16"), JSONL.encode("utf-16-le"), JSONL.encode("utf-16-be"), "a,b\n".encode("utf-16")],
    "CR": [JSONL.replace("\n", "\r").encode(), b"\xef\xbb\xbf" + JSONL.replace("\n", "\r").encode()],
    "one JSON array": [
        json.dumps(ROWS).encode(), json.dumps(ROWS, indent=1).encode(), json.dumps(ROWS[:1]).encode(),
        ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n").encode(),
        ("[\n" + json.dumps(ROWS[0]) + "\n]\n").encode(),
        b"\xef\xbb\xbf  " + json.dumps(ROWS).encode(), json.dumps(ROWS * 500).encode(),
    ],
    "one JSON document": [json.dumps(ROWS[0], indent=2).encode(), json.dumps({"data": ROWS}, indent=1).encode()],
    "gzip": [gzip.compress(JSONL.encode())],
    "bzip2": [bz2.compress(JSONL.encode())],
    "xz": [lzma.compress(JSONL.encode())],
    "zstd": [b"\x28\xb5\x2f\xfd" + bytes(range(256))],
    "ZIP": [packed("zip")],
    "Parquet": [packed("parquet")],
    "SQLite": [packed("sqlite")],
    "a picture": [packed("PNG"), packed("JPEG")],
    "HTML": [b"<!DOCTYPE html>\n<html><body>404</body></html>", b"\n\n  <html>\n", b"<?xml version='1.0'?>\n<Error/>"],
    "Git LFS": [b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"],
    "CSV or TSV": [b"image,question,answer\n0.png,?,!\n", b"image\tquestion\n0.png\t?\n"],
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_another_kind_is_named(tmp_path, reader):
    name, read = READERS[reader]
    for kind, contents in OTHERS.items():
        for number, content in enumerate(contents):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError) as caught:
                read(tmp_path / name)
            assert kind in caught.value.message and name in caught.value.message, (kind, number, caught.value.message)
            assert caught.value.hint and len(str(caught.value)) < 400


def test_a_file_of_another_kind_in_place_of_csv_is_named(tmp_path):
    for kind in OTHERS.keys() - {"CSV or TSV", "Parquet", "one JSON array", "one JSON document", "CR"}:
        for content in OTHERS[kind]:
            (tmp_path / "metadata.csv").write_bytes(content)
            with pytest.raises(UserError, match=rf"metadata\.csv is no CSV file: it looks like .*{kind}"):
                questions(tmp_path, "folder")
    (tmp_path / "metadata.csv").write_text("picture,q,a\n0.png,?,!\n")
    with pytest.raises(UserError, match="has no column 'question'"):
        questions(tmp_path, "folder")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"hello\nworld\n", b"{\n", b'{"a": "\xe4"}'])
def test_a_file_without_a_row_is_told(tmp_path, reader, content):
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"is empty|has no line that is a row"):
        read(tmp_path / name)


def test_one_bad_row_costs_one_row_wherever_it_stands(tmp_path):
    path = tmp_path / "data.jsonl"
    for bad in (b"[1]", b"{", b"<p>", b"\xe4", b"hello, world", b"\0", b"[" * 9999):
        for place in (0, 2, 4):
            lines = [encode("good")] * 4
            lines.insert(place, bad)
            path.write_bytes(b"\n".join(lines))
            rows = questions(path)
            assert [isinstance(row, str) for row in rows] == [i != place for i in range(5)]
