"""The sources: each format gives the same rows, and nothing that a file can hold does more than refuse its row."""

import base64
import csv
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkimg.config.load import load_config
from thinkimg.data.refusal import Refused, RowRefused
from thinkimg.data.row import RawRow
from thinkimg.data.settings import Columns, DataConfig
from thinkimg.data.source import open_source, raw_row
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

LIMITS = ImageLimits(max_bytes=100_000)


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(source, path, **settings):
    opened = open_source(DataConfig(source=source, path=str(path), **settings), LIMITS)
    rows = list(opened.rows())
    assert [row.where for row in opened.rows()] == [row.where for row in rows]  # a second pass is the same
    return rows


def accepted(rows):
    return [
        (row.question, row.answers[0], tuple(read() for read in row.images)) for row in rows if isinstance(row, RawRow)
    ]


def reasons(rows):
    return [row.reason if isinstance(row, Refused) else "ok" for row in rows]


def digest(source, path, **settings):
    return open_source(DataConfig(source=source, path=str(path), **settings), LIMITS).digest


RECORDS = [
    {"image": f"pictures/{i}.png", "question": f"What {i}?", "answer": f"that {i}", "extra": i} for i in range(20)
]
EXPECTED = [(f"What {i}?", f"that {i}", (png(i),)) for i in range(20)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set" / "pictures").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "set" / "pictures" / f"{i}.png").write_bytes(png(i))
    return tmp_path / "set"


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet_table(images, records=RECORDS):
    columns = {key: [record[key] for record in records] for key in ("question", "answer", "extra")}
    return pa.table({"image": images, **columns})


# every format ---------------------------------------------------------------------------------------------------------


def test_jsonl_with_paths(folder):
    rows = rows_of("jsonl", write_jsonl(folder / "data.jsonl", RECORDS))
    assert accepted(rows) == EXPECTED
    assert rows[3].where == "data.jsonl line 4" and rows[3].columns == {"extra": 3}


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_folder_as_imagefolder_has_it_also_with_tables_in_subfolders(folder, form):
    for part, place, prefix in ((RECORDS[:10], folder, "pictures/"), (RECORDS[10:], folder / "pictures", "")):
        records = [{"file_name": prefix + r["image"].removeprefix("pictures/"), **r} for r in part]
        for record in records:
            del record["image"]
        if form == "jsonl":
            write_jsonl(place / "metadata.jsonl", records)
        else:
            with (place / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
                writer = csv.DictWriter(file, list(records[0]))
                writer.writeheader()
                writer.writerows(records)
    rows = rows_of("folder", folder)
    assert accepted(rows) == EXPECTED
    assert [rows[0].where, rows[-1].where] == [
        f"metadata.{form} line {2 - (form == 'jsonl')}",
        f"pictures/metadata.{form} line {11 - (form == 'jsonl')}",
    ]


@pytest.mark.parametrize("images", [
    [{"bytes": png(i), "path": f"{i}.png"} for i in range(20)],
    [{"bytes": None, "path": f"pictures/{i}.png"} for i in range(20)],
    [png(i) for i in range(20)],
    [[{"bytes": png(i), "path": None}] for i in range(20)],
    [[png(i)] for i in range(20)],
    [f"pictures/{i}.png" for i in range(20)],
    [[f"pictures/{i}.png"] for i in range(20)],
], ids=["struct", "struct of paths", "binary", "structs", "binaries", "paths", "list of paths"])  # fmt: skip
def test_parquet_with_images_as_people_have_them(folder, images):
    whole = parquet_table(images)
    pq.write_table(whole.slice(0, 12), folder / "a.parquet", row_group_size=5)
    pq.write_table(whole.slice(12), folder / "b.parquet")
    assert accepted(rows_of("parquet", folder)) == EXPECTED
    assert accepted(rows_of("parquet", folder / "a.parquet")) == EXPECTED[:12]


def test_the_hub_through_a_local_copy(folder, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features(
        {
            "image": datasets.List(datasets.Image()),
            "question": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=[f"that {i}" for i in range(20)]),
            "thumbnail": datasets.Image(),
        }
    )
    copy = tmp_path / "copy"
    copy.mkdir()
    datasets.Dataset.from_dict(
        {
            "image": [[{"bytes": png(i), "path": None}, {"bytes": png(i + 1), "path": None}] for i in range(20)],
            "question": [r["question"] for r in RECORDS],
            "answer": list(range(20)),
            "thumbnail": [{"bytes": b"no image", "path": None}] * 20,
        },
        features=features,
    ).to_parquet(copy / "train.parquet")
    rows = rows_of("hub", copy)
    assert accepted(rows) == [(q, a, (png(i), png(i + 1))) for i, (q, a, _) in enumerate(EXPECTED)]
    assert rows[0].columns == {} and rows[4].where == "train.parquet row 5"
    with pytest.raises(UserError, match=r"no column 'picture' for the image; it has answer, image") as error:
        rows_of("hub", copy, columns={"image": "picture"})
    assert "data.columns.image" in error.value.hint
    with pytest.raises(UserError, match="has no split 'nowhere': it has train"):
        rows_of("hub", copy, hub_split="nowhere")


def test_class_labels_of_the_hub_become_their_names_and_none_is_empty(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    label = datasets.ClassLabel(names=["no", "yes", "7"])
    features = datasets.Features(
        {"image": datasets.Image(), "question": label, "answer": label, "more": datasets.List(label)}
    )
    (tmp_path / "copy").mkdir()
    columns = {"image": [{"bytes": png(1), "path": None}] * 3, "question": [0, 1, 2], "answer": [2, 1, -1]}
    columns["more"] = [[0, 1], [], [2]]
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "copy" / "train.parquet")
    first, second, third = rows_of("hub", tmp_path / "copy", columns={"answers": "more"})
    assert (first.question, first.answers) == ("no", ("7", "no", "yes"))
    assert (second.question, second.answers) == ("yes", ("yes",))
    assert (third.reason, third.where) == ("empty", "train.parquet row 3")  # -1: the Hub has no label for it


def test_a_digest_follows_the_content_and_not_the_place(folder, tmp_path):
    write_jsonl(folder / "data.jsonl", RECORDS)
    before = digest("jsonl", folder / "data.jsonl")
    (folder / "unrelated.txt").write_text("not named by any row")
    assert digest("jsonl", folder / "data.jsonl") == before
    moved = folder.rename(tmp_path / "elsewhere")
    assert digest("jsonl", moved / "data.jsonl") == before
    (moved / "pictures" / "7.png").write_bytes(png(99))
    after = digest("jsonl", moved / "data.jsonl")
    write_jsonl(moved / "data.jsonl", RECORDS[:-1])
    assert len({before, after, digest("jsonl", moved / "data.jsonl")}) == 3


@pytest.mark.parametrize("form", [lambda name: name, lambda name: {"path": name}, lambda name: [{"path": name}]])
@pytest.mark.parametrize("source", ["jsonl", "folder", "parquet"])
def test_a_digest_follows_every_picture_that_is_read_however_it_is_named(folder, source, form):
    records = [{**record, "image": form(record["image"])} for record in RECORDS]
    if source == "folder":  # a table below names pictures beside itself
        records = [{**record, "image": form(f"{i}.png")} for i, record in enumerate(RECORDS)]
    path = folder / ("pictures/metadata.jsonl" if source == "folder" else f"d.{source}")
    pq.write_table(pa.Table.from_pylist(records), path) if source == "parquet" else write_jsonl(path, records)
    place = folder if source == "folder" else path
    before = digest(source, place)
    assert accepted(rows_of(source, place)) == EXPECTED
    for i in (0, 19):
        (folder / "pictures" / f"{i}.png").write_bytes(png(100 + i))
        assert digest(source, place) != before
        before = digest(source, place)


def test_a_folder_with_two_tables_for_the_same_pictures_is_refused(folder):
    write_jsonl(folder / "metadata.jsonl", RECORDS)
    (folder / "metadata.csv").write_text("file_name,question,answer\n")
    with pytest.raises(UserError, match=r"has both metadata\.jsonl and metadata\.csv"):
        rows_of("folder", folder)


# columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["jsonl", "folder", "parquet"])
def test_a_missing_column_is_told_with_those_that_are_there(folder, source):
    records = [{**record, "questions": "?"} for record in RECORDS]
    for record in records:
        del record["question"]
    if source == "parquet":
        pq.write_table(pa.Table.from_pylist(records), folder / "metadata.parquet")
    path = folder if source == "folder" else folder / f"metadata.{source}"
    if source != "parquet":
        write_jsonl(folder / "metadata.jsonl", records)
    with pytest.raises(
        UserError, match="no column 'question' for the question; it has answer, extra, image, questions"
    ) as error:
        rows_of(source, path, schema="none")
    assert error.value.hint == "Set data.columns.question, perhaps to questions."


def test_columns_are_mapped(folder):
    records = [
        {
            "picture": "pictures/1.png",
            "q": "Which?",
            "a": "B",
            "options": ["x", "y"],
            "n": 7,
            "photo": "p1",
            "rest": [1],
        }
    ]
    columns = {"image": "picture", "question": "q", "answer": "a", "choices": "options", "id": "n", "group": "photo"}
    (row,) = rows_of("jsonl", write_jsonl(folder / "d.jsonl", records), columns=columns, answer_type="choice")
    assert (row.id, row.question, row.answers[0], row.choices, row.group) == ("7", "Which?", "y", ("x", "y"), "p1")
    assert row.columns == {"rest": [1]} and row.answer_type == "choice"


@pytest.mark.parametrize(("answer_type", "choices", "answer", "expected"), [
    ("choice", ["red", "blue"], "blue", "blue"),
    ("choice", ["red", "blue"], "A", "red"),
    ("choice", ["red", "blue"], 1, "blue"),
    ("choice", ["2", "1"], 1, "1"),
    ("choice", '["red", "blue"]', " blue ", "blue"),
    ("choice", ["red", "blue"], "green", "answer"),
    ("choice", ["red", "blue"], "C", "answer"),
    ("choice", ["red", "blue"], 2, "answer"),
    ("choice", ["red", "red"], "red", "choices"),
    ("choice", ["red"], "red", "choices"),
    ("choice", "red or blue", "red", "choices"),
    ("choice", None, "red", "choices"),
    ("text", None, "", "empty"),
    ("text", None, "  ", "empty"),
    ("text", None, None, "empty"),
    ("text", None, float("nan"), "empty"),
    ("text", None, {"a": 1}, "text"),
    ("text", None, "\ud800", "text"),
    ("text", None, 3.0, "3"),
    ("number", None, "1,234.5", "1,234.5"),
    ("number", None, "50%", "50%"),
    ("number", None, "many", "answer"),
    ("number", None, "inf", "answer"),
    ("box", None, [1, 2, 3, 4], "[1.0, 2.0, 3.0, 4.0]"),
    ("box", None, "(1, 2, 3, 4)", "[1.0, 2.0, 3.0, 4.0]"),
    ("box", None, "1, 2, 3", "answer"),
    ("box", None, [1, 2, 3, "x"], "answer"),
])  # fmt: skip
def test_answers_are_read_or_refused(answer_type, choices, answer, expected):
    columns = Columns(choices="choices" if answer_type == "choice" else None)
    data = DataConfig(source="jsonl", path="x.jsonl", answer_type=answer_type, columns=columns)
    record = {"image": b"x", "question": "?", "answer": answer, "choices": choices}
    row = raw_row(record, data, lambda value: lambda: value, id="1", where="line 1")
    assert (row.reason if isinstance(row, Refused) else row.answers[0]) == expected


# hostile input --------------------------------------------------------------------------------------------------------


def test_a_path_stays_inside_the_data_set(folder, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    (folder / "inner.png").symlink_to(folder / "pictures" / "1.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "pictures/../../secret.png"]
    names += ["/dev/zero", "pictures", "nowhere.png", "loop.png", "\0", "\ud800", "a" * 5000, "file:///etc/passwd"]
    names += ["inner.png"]
    path = write_jsonl(folder / "d.jsonl", [{**RECORDS[0], "image": name} for name in names])
    found = []
    for row in rows_of("jsonl", path):
        try:
            found.append(row.reason if isinstance(row, Refused) else row.images[0]())
        except RowRefused as refused:
            found.append(refused.reason)
    assert found == ["path"] * 9 + ["image", "url", png(1)]


def test_a_large_file_is_not_read_whole(folder):
    (folder / "large.png").write_bytes(bytes(3 * LIMITS.max_bytes))
    (row,) = rows_of("jsonl", write_jsonl(folder / "d.jsonl", [{**RECORDS[0], "image": "large.png"}]))
    assert len(row.images[0]()) == LIMITS.max_bytes + 1


def test_data_uris(folder):
    uris = ["data:image/png;base64," + base64.b64encode(png(1)).decode(), "DATA:;base64,AAAA", "data:image/png,abc",
            "data:image/png;base64,@@@", "data:"]  # fmt: skip
    rows = rows_of("jsonl", write_jsonl(folder / "d.jsonl", [{**RECORDS[0], "image": uri} for uri in uris]))
    assert [row.images[0]() for row in rows[:2]] == [png(1), b"\0\0\0"]
    for row in rows[2:]:
        with pytest.raises(RowRefused, match="base64"):
            row.images[0]()


def test_lines_that_are_no_rows_are_refused_in_their_place(folder, monkeypatch):
    good = json.dumps(RECORDS[0]).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b"[" * 100_000,
        good[:-1] + b',"deep":' + b"[" * 900 + b"]" * 900 + b"}",
        b"1" * 5000,
        b'{"question": "\\ud800", "image": "x", "answer": "y"}',
        json.dumps({"image": 3}).encode(),
        b'{"image": null, "question": "?", "answer": "!"}',
        b'{"image": [], "question": "?", "answer": "!"}',
        good,
    ]
    (folder / "d.jsonl").write_bytes(b"\n".join(lines))
    rows = rows_of("jsonl", folder / "d.jsonl")
    assert reasons(rows)[:5] == ["ok", "syntax", "syntax", "syntax", "syntax"]
    assert reasons(rows)[6:] == ["syntax", "text", "empty", "image", "image", "ok"]
    assert [row.where for row in rows[-2:]] == ["d.jsonl line 12", "d.jsonl line 13"]
    monkeypatch.setattr("thinkimg.data.json_lines.LINE", 200)
    (folder / "d.jsonl").write_bytes(good + b"\n" + b"x" * 1000 + b"\n" + good + b"\n" + b"y" * 200)
    assert reasons(rows_of("jsonl", folder / "d.jsonl")) == ["ok", "syntax", "ok", "syntax"]


def test_csv_lines_that_are_no_rows_are_refused_in_their_place(folder):
    lines = [b"file_name,question,answer", b"pictures/0.png,?,!", b"pictures/0.png,?", b"pictures/0.png,\xff,!", b"",
             b'pictures/0.png,"two\nlines",!', b'pictures/0.png,"?"x,!', b"pictures/0.png,?,!",
             b'pictures/0.png,"?,!']  # fmt: skip
    (folder / "metadata.csv").write_bytes(b"\n".join(lines))
    rows = rows_of("folder", folder)
    assert reasons(rows) == ["ok", "syntax", "text", "ok", "syntax", "ok", "syntax"]
    assert [row.where.rpartition(" ")[2] for row in rows] == ["2", "3", "4", "6", "8", "9", "10"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(["image", "question", "answer", "choices", "id", "group", "other"]), values),
    st.sampled_from(["choice", "number", "text", "box", "maths"]),
)
@settings(max_examples=200, deadline=None)
def test_whatever_a_record_holds_it_is_a_row_or_refused(record, answer_type):
    from pathlib import Path

    from thinkimg.data.pictures.image_files import ImageFiles

    columns = Columns(choices="choices", id="id", group="group")
    data = DataConfig(source="jsonl", path="x.jsonl", answer_type=answer_type, columns=columns)
    row = raw_row(record, data, ImageFiles(Path("."), LIMITS).reader_of, id="1", where="line 1")
    if isinstance(row, RawRow):
        assert row.question and row.answers[0] and row.images
        (row.id + row.question + row.answers[0] + "".join(row.choices) + row.group).encode()
        json.dumps(row.columns, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("source", "message"),
    [("jsonl", "is no file"), ("folder", "has no metadata.jsonl"), ("parquet", "holds no .parquet")],
)
def test_a_place_without_data_is_told(folder, source, message):
    with pytest.raises(UserError, match=message):
        rows_of(source, folder)
    with pytest.raises(UserError, match="There is no"):
        rows_of(source, folder / "nowhere")
    with pytest.raises(UserError, match=r"'data\.path' is missing"):
        load_config("development", [f"data.source={source}"])


def test_damaged_parquet_is_told(folder):
    whole = parquet_table([png(i) for i in range(20)])
    pq.write_table(whole, folder / "a.parquet", compression="zstd")
    data = bytearray((folder / "a.parquet").read_bytes())
    (folder / "b.parquet").write_bytes(data[:-50])
    with pytest.raises(UserError, match="no readable Parquet"):
        rows_of("parquet", folder / "b.parquet")
    data[4:400] = bytes(396)
    (folder / "b.parquet").write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        rows_of("parquet", folder / "b.parquet")


# URLs -----------------------------------------------------------------------------------------------------------------


@contextmanager
def web(pages):
    """A server on localhost; pages: path -> (status, headers, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = pages[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_urls_only_of_allowed_hosts_also_after_a_redirect(folder):
    pages = {
        "/1.png": (200, {}, png(1)),
        "/near": (302, {"location": "/1.png"}, b""),
        "/gone": (404, {}, b""),
        "/away": (302, {"location": "http://localhost:1/1.png"}, b""),
        "/round": (302, {"location": "/round"}, b""),
        "/file": (302, {"location": "file:///etc/passwd"}, b""),
        "/large": (200, {}, bytes(10 * LIMITS.max_bytes)),
    }
    with web(pages) as address:
        urls = [address + page for page in pages] + ["http://[", "http://127.0.0.1:1/closed"]
        path = write_jsonl(folder / "d.jsonl", [{**RECORDS[0], "image": url} for url in urls])

        def fetched(**settings):
            found = []
            for row in rows_of("jsonl", path, **settings):
                try:
                    found.append(row.images[0]())
                except RowRefused as refused:
                    found.append((refused.reason, refused.detail))
            return found

        assert all(reason == "url" and "not among data.url_hosts" in detail for reason, detail in fetched()[:-2])
        first, near, gone, away, around, file, large, broken, closed = fetched(url_hosts=("127.0.0.1",))
    assert first == near == png(1)
    assert (
        "404" in gone[1] and "localhost is not among" in away[1] and "redirects" in around[1] and "not among" in file[1]
    )
    assert LIMITS.max_bytes < len(large) < 3 * LIMITS.max_bytes
    assert broken[0] == closed[0] == "url"
