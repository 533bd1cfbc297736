"""Files of any layout: one set in every form gives the same rows, and what is unclear is asked."""

import base64
import csv
import io
import json
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkimg.config.load import load_config
from thinkimg.data.pictures.image_files import ImageFiles
from thinkimg.data.refusal import Refused, RowRefused
from thinkimg.data.row import RawRow
from thinkimg.data.source import open_source
from thinkimg.data.tables.find import find_split, find_tables
from thinkimg.data.tables.parquet import spread
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

LIMITS = ImageLimits(max_bytes=10_000_000)
COUNT = 12


def png(colour, side=20):
    buffer = io.BytesIO()
    Image.new("RGB", (side, 10), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), (colour, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def record(i, **fields):
    return {"image": f"pictures/{i}.png", "question": f"What is {i}?", "answer": f"thing {i}", "rest": f"r{i}"} | fields


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "set"
    (root / "pictures").mkdir(parents=True)
    for i in range(COUNT):
        (root / "pictures" / f"{i}.png").write_bytes(png(i))
    return root


def open_path(path, *overrides, **settings):
    flags = [f"data.{name}={value}" for name, value in settings.items()]
    data = load_config("development", [f"data.path={path}", *flags, *overrides]).data
    return open_source(data, LIMITS)


def read(path, *overrides, **settings):
    rows = list(open_path(path, *overrides, **settings).rows())
    found = []
    for row in rows:
        try:
            found.append(row if isinstance(row, Refused) else (row, [image() for image in row.images]))
        except RowRefused as refused:
            found.append(refused)
    return found


def contents(found):
    assert all(isinstance(one, tuple) for one in found), found
    return [(row.question, row.answers, images) for row, images in found]


def reasons(found):
    return ["ok" if isinstance(one, tuple) else str(one.reason) for one in found]


EXPECTED = [(f"What is {i}?", (f"thing {i}",), [png(i)]) for i in range(COUNT)]


def write(root, form, records):
    path = root / f"data.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
    elif form == "json":
        path.write_text(json.dumps(records, indent=1))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=5)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    return path


FORMS = ["jsonl", "json", "parquet", "csv", "tsv"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("as_folder", [False, True])
def test_one_set_in_every_form_is_the_same(root, form, as_folder):
    path = write(root, form, [record(i) for i in range(COUNT)])
    found = read(root if as_folder else path)
    assert contents(found) == EXPECTED
    assert [row.columns for row, _ in found] == [{"rest": f"r{i}"} for i in range(COUNT)]
    assert open_path(path).schemas == ((path.name, "none", "1"),)


def test_pictures_with_a_file_beside_each(root):
    for i in range(COUNT):
        content = {"question": f"What is {i}?", "answer": f"thing {i}"}
        (root / "pictures" / f"{i}.json").write_text(json.dumps(content))
    assert sorted(contents(read(root))) == sorted(EXPECTED)
    (root / "pictures" / "7.json").write_text("[]")
    assert sorted(reasons(read(root))) == ["ok"] * (COUNT - 1) + ["syntax"]


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_may_be_base64_whatever_its_length(root, form):
    pictures = [jpeg(1), png(3), png(5, side=4000)]
    texts = [base64.b64encode(picture).decode() for picture in pictures]
    texts[1] = "\n".join(texts[1][i : i + 76] for i in range(0, len(texts[1]), 76))  # as MIME breaks it
    path = write(root, form, [record(i, image=text) for i, text in enumerate(texts)])
    assert [images for _, _, images in contents(read(path))] == [[picture] for picture in pictures]


@given(st.binary(min_size=3000, max_size=20_000), st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"]))
@settings(max_examples=50, deadline=None)
def test_a_long_text_is_never_looked_up_as_a_path_and_is_read_in_all_ways_of_writing_base64(body, head):
    images = ImageFiles(Path("."), LIMITS)
    images.places = None  # any look at the file system fails
    text, of_urls = base64.b64encode(head + body).decode(), base64.urlsafe_b64encode(head + body).decode()
    for written in (text, text.rstrip("="), of_urls, of_urls.rstrip("="), f" {text}\n", f"data:;base64,{of_urls}"):
        assert images.reader_of(written)() == head + body
    with pytest.raises(RowRefused):
        images.reader_of("x" + "/a" * 3000)


@pytest.mark.parametrize("more", [{}, {"path": None}, {"path": "1.png", "width": 8, "height": 6}, {"format": "PNG"}])
def test_bytes_in_an_object_are_a_picture_whatever_stands_beside_them(root, more):
    images = ImageFiles(root, LIMITS)
    assert images.reader_of({"bytes": png(1), **more})() == png(1)
    with pytest.raises(RowRefused, match="no image"):
        images.reader_of({"bytes": None, "width": 8})


def test_a_path_that_begins_as_a_jpeg_in_base64_does_is_a_path(root):
    name = "9j/" + "a" * 80 + ".png"
    (root / "9j").mkdir()
    (root / name).write_bytes(png(1))
    assert contents(read(write(root, "jsonl", [record(0, image=name), record(1, image=str(root / name))])))


# pictures' places -----------------------------------------------------------------------------------------------------


def test_pictures_above_the_table_and_of_another_machine(root, tmp_path):
    names = ["pictures/0.png", "set/pictures/1.png", str(root / "pictures/2.png"), "/data/x/set/pictures/3.png"]
    names += ["./pictures/4.png", "pictures\\5.png", "/data/x/6.png", "elsewhere/pictures/7.png", "8.png"]
    found = read(write(root, "jsonl", [record(i, image=name) for i, name in enumerate(names)]))
    assert reasons(found) == ["ok"] * 6 + ["path"] * 3  # a bare name, and directories that are not the root's
    assert contents(found[:6]) == EXPECTED[:6]
    (tmp_path / "tables").mkdir()
    path = write(tmp_path / "tables", "jsonl", [record(i, image=name) for i, name in enumerate(names)])
    assert reasons(read(path)) == ["path"] * 9
    found = read(path, images=root)
    assert reasons(found) == ["ok"] * 6 + ["path", "ok", "ok"]  # /data/x is not pictures
    assert contents(found[:6] + found[7:]) == EXPECTED[:6] + EXPECTED[7:9]
    assert contents(read(path, images=root / "pictures")) == EXPECTED[:9]


def test_two_pictures_never_become_one(root, tmp_path):
    names = ["/a/train/0.png", "/a/val/0.png", "/a/train/0.png"]
    path = write(root, "jsonl", [record(i, image=name) for i, name in enumerate(names)])
    found = read(path, images=root / "pictures")
    assert reasons(found) == ["path"] * 3 and "both lead to" in found[1].detail
    for split in ("train", "val"):
        (root / split).mkdir()
        (root / split / "0.png").write_bytes(png(100 if split == "val" else 50))
    found = read(path, images=root)
    assert [images for _, _, images in contents(found)] == [[png(50)], [png(100)], [png(50)]]
    for folder in ("here/train", "here/val", "there/val"):
        (tmp_path / "more" / folder).mkdir(parents=True)
        (tmp_path / "more" / folder / "0.png").write_bytes(png(len(folder)))
    (root / "val" / "0.png").unlink()
    (root / "train" / "0.png").unlink()
    found = read(path, images=tmp_path / "more")
    assert reasons(found) == ["ok", "path", "ok"] and "may be" in found[1].detail


@pytest.mark.parametrize("setting", ["beside", "images"])
def test_pictures_in_an_archive(root, tmp_path, setting):
    for name in [*(root / "pictures").iterdir()]:
        name.unlink()
    archive = (root if setting == "beside" else tmp_path) / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(4):
            file.writestr(f"pictures/{i}.png", png(i))
    names = ["pictures/0.png", "./pictures/1.png", "/mnt/set/pictures/2.png", "pictures/9.png", "../pictures/3.png"]
    flags = {} if setting == "beside" else {"images": archive}
    path = write(root, "jsonl", [record(i, image=name) for i, name in enumerate(names)])
    found = read(path, **flags)
    assert reasons(found) == ["ok"] * 3 + ["path"] * 2
    assert contents(found[:3]) == EXPECTED[:3]
    before = open_path(path, **flags).digest
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("pictures/9.png", png(9))
    assert open_path(path, **flags).digest != before
    archive.write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="no readable ZIP"):
        open_path(path, **flags)


# tables of a folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "split"), [
    ("data/train-00000-of-00002.parquet", "training"), ("validation-00000.parquet", "validation"),
    ("DocVQA/test-0.parquet", "test"), ("trainer/contest.jsonl", None), ("testmini.parquet", "validation"),
    ("my_val.json", "validation"), ("latest.json", None), ("test/train.json", "training"), ("values.csv", None),
])  # fmt: skip
def test_what_a_name_says_of_its_rows(name, split):
    assert find_split(name) == split


def test_tables_that_may_not_be_meant_together_are_asked_about(root):
    for i, name in enumerate(["train-0", "train-1", "test-0"]):
        write(root, "jsonl", [record(i)]).rename(root / f"{name}.jsonl")
    with pytest.raises(UserError, match="tables of training and test") as error:
        read(root)
    assert "data.files=train-0.jsonl" in error.value.hint
    assert contents(read(root, files="train-*")) == EXPECTED[:2]
    assert contents(read(root, files="test-0.jsonl")) == EXPECTED[2:3]
    with pytest.raises(UserError, match=r"No table .* fits data.files=dev"):
        read(root, files="dev-*")
    write(root, "parquet", [record(4)])
    with pytest.raises(UserError, match="tables of several kinds"):
        read(root)
    assert contents(read(root, files="*.parquet")) == EXPECTED[4:5]


def test_tables_of_several_schemas_are_asked_about(root):
    write(root, "jsonl", [record(0)]).rename(root / "a.jsonl")
    messages = [{"role": "user", "content": "<image>What is 1?"}, {"role": "assistant", "content": "thing 1"}]
    (root / "b.jsonl").write_text(json.dumps({"messages": messages, "images": ["pictures/1.png"]}) + "\n")
    with pytest.raises(UserError, match=r"different kinds: a.jsonl \(none\), b.jsonl \(messages\)"):
        read(root)
    assert contents(read(root, files="b.jsonl")) == EXPECTED[1:2]


def test_a_mixture_of_schemas_in_one_table_loses_rows_with_a_reason(root):
    messages = [{"role": "user", "content": "<image>What is 1?"}, {"role": "assistant", "content": "thing 1"}]
    rows = [{"messages": messages, "images": ["pictures/1.png"]}] * 3 + [record(0)]
    found = read(write(root, "jsonl", rows))
    assert reasons(found) == ["ok", "ok", "ok", "schema"]


@pytest.mark.parametrize("content", [
    b"", b"\0\0\0\0", b"<html>", b"{", b"[1, 2", b"PK\x03\x04abc", b"\x1f\x8b00", b"%PDF-1.4", b"\xff\xfe{\0}\0",
    b"SQLite format 3\0", b"PAR1", b"PAR1 no parquet PAR1", b"version https://git-lfs.github.com/spec/v1\n",
])  # fmt: skip
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.csv", "x.tsv", "x.txt"])
def test_a_file_that_is_none_of_them_is_told(root, content, name):
    (root / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(root / name)
    assert str(error.value).count("\n") <= 1


def test_a_folder_without_tables_and_a_path_that_is_none_are_told(root, tmp_path):
    with pytest.raises(UserError, match="holds no table"):
        read(root)
    (root / "dataset_info.json").write_text("{}")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.json").write_text("[]")
    with pytest.raises(UserError, match="holds no table"):
        read(root)


# records --------------------------------------------------------------------------------------------------------------


def test_names_of_columns_are_guessed_where_one_fits_and_asked_where_several_do(root):
    rows = [{"img": "pictures/0.png", "problem": "What is 0?", "solution": "thing 0", "id": 5}]
    assert contents(read(write(root, "jsonl", rows))) == EXPECTED[:1]
    with pytest.raises(UserError, match="The answer may be in the columns label and solution") as error:
        read(write(root, "jsonl", [rows[0] | {"label": "other"}]))
    assert "data.columns.answer" in error.value.hint
    path = write(root, "jsonl", [rows[0] | {"label": "other"}])
    assert contents(read(path, **{"columns.answer": "solution"})) == EXPECTED[:1]
    with pytest.raises(UserError, match="no column 'image'"):
        read(path, schema="none")


def test_dotted_columns(root):
    rows = [
        {"extra": {"q": {"text": f"What is {i}?"}, "a": f"thing {i}"}, "image": f"pictures/{i}.png"} for i in range(2)
    ]
    path = write(root, "jsonl", rows)
    columns = {"columns.question": "extra.q.text", "columns.answer": "extra.a"}
    assert contents(read(path, **columns)) == EXPECTED[:2]
    with pytest.raises(UserError, match="no column 'missing.q'"):
        read(path, **columns | {"columns.question": "missing.q"})
    assert reasons(read(path, **columns | {"columns.question": "extra.q.nothing"})) == ["empty"] * 2


def test_several_answers_and_long_columns(root):
    rows = [record(0, answer=["thing 0", "it", "thing 0"], page="x" * 5000), record(1, answer=[])]
    found = read(write(root, "jsonl", rows))
    assert reasons(found) == ["ok", "empty"]
    row = found[0][0]
    assert row.answers == ("thing 0", "it") and row.columns == {"rest": "r0"}
    assert any("page" in change and "left out" in change for change in row.changes)


def test_a_function_of_the_users_own(root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rows.py").write_text(
        "from thinkimg.data.fields import Fields\n"
        "def convert(record):\n"
        "    if record['n'] == 2: raise KeyError('two')\n"
        "    if record['n'] == 3: return None\n"
        "    return Fields(f\"What is {record['n']}?\", f\"pictures/{record['n']}.png\", f\"thing {record['n']}\")\n"
    )
    path = write(root, "jsonl", [{"n": i} for i in range(4)])
    found = read(path, schema="my_rows:convert")
    assert reasons(found) == ["ok", "ok", "schema", "schema"] and contents(found[:2]) == EXPECTED[:2]
    ((table, name, version),) = open_path(path, schema="my_rows:convert").schemas
    assert name == "my_rows:convert" and len(version) == 64
    sys.modules.pop("my_rows")
    with pytest.raises(UserError, match="can't be imported"):
        read(path, schema="my_rows:nothing")


def test_shuffled_options_are_recorded_and_depend_on_the_row_alone(root):
    options = ["red", "blue", "green", "yellow"]
    rows = [record(i % COUNT, answer="red", choices=options) for i in range(60)]
    path = write(root, "jsonl", rows)
    plain, shuffled = read(path), read(path, shuffle_choices=True)
    for (a, _), (b, _) in zip(plain, shuffled, strict=True):
        assert a.order == () and a.choices == tuple(options) and a.answers == b.answers == ("red",)
        assert b.choices == tuple(options[place] for place in b.order) and sorted(b.order) == [0, 1, 2, 3]
    places = [row.choices.index("red") for row, _ in shuffled]
    assert min(map(places.count, range(4))) >= 5
    longer = read(write(root, "jsonl", [*rows, record(0, answer="red", choices=options)]), shuffle_choices=True)
    assert [row.order for row, _ in longer[:60]] == [row.order for row, _ in shuffled]
    last = record(0, answer="red", choices=["red", "blue", "none of the above"])
    ((row, _),) = read(write(root, "jsonl", [last]), shuffle_choices=True)
    assert row.order == () and row.choices[2] == "none of the above"
    last = record(0, answer="above the car", choices=["above the car", "below it", "on the car", "behind it"])
    ((row, _),) = read(write(root, "jsonl", [last]), shuffle_choices=True)
    assert sorted(row.order) == [0, 1, 2, 3]  # a place in the picture, and not among the options


# samples of tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_is_spread_over_the_table_and_the_same_each_time(root, form):
    path = write(root, form, [record(i) for i in range(500)])
    (table,) = find_tables(load_config("development", [f"data.path={path}"]).data)
    drawn = [one["question"] for _, one in table.draw(40)]
    assert drawn == [one["question"] for _, one in table.draw(40)] and len(set(drawn)) == 40
    numbers = [int(question.split()[2][:-1]) for question in drawn]
    assert min(numbers) < 100 and max(numbers) >= 400
    assert len(list(table.draw(1000))) <= 500
    assert {number for number, _ in table.draw(40)} != set(range(1, 41))


def test_of_a_large_file_only_parts_are_read(root, monkeypatch):
    monkeypatch.setattr("thinkimg.data.tables.json_lines.SMALL", 1000)
    path = write(root, "jsonl", [record(i) for i in range(5000)])
    (table,) = find_tables(load_config("development", [f"data.path={path}"]).data)
    drawn = [one["question"] for _, one in table.draw(64)]
    assert len(set(drawn)) == 64 and "What is 4" in drawn[-1]


@given(st.integers(0, 10_000), st.integers(0, 200))
def test_spread_indices(total, count):
    indices = spread(total, count)
    assert len(indices) == min(total, count) == len(set(indices)) and indices == sorted(indices)
    assert all(0 <= index < total for index in indices)


def test_class_labels_are_named(root):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"),
         "answer": datasets.ClassLabel(names=["no", "yes"])}
    )  # fmt: skip
    columns = {"image": [{"bytes": png(1), "path": None}] * 3, "question": ["?"] * 3, "answer": [1, 0, -1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "train.parquet")
    found = read(root)
    assert reasons(found) == ["ok", "ok", "empty"] and [row.answers for row, _ in found[:2]] == [("yes",), ("no",)]


def test_columns_of_bytes_that_nobody_reads_are_not_read(root, monkeypatch):
    rows = [
        {"image": png(i), "thumbnail": bytes(1000), "question": f"What is {i}?", "answer": f"thing {i}"}
        for i in range(3)
    ]
    path = write(root, "parquet", rows)
    read_rows = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, *a, **k: read_rows.append(k["columns"]) or original(self, *a, **k)
    )
    found = read(path)
    assert contents(found) == EXPECTED[:3] and isinstance(found[0][0], RawRow)
    assert all("thumbnail" not in columns for columns in read_rows if columns is not None)


def test_questions_are_joined_with_their_pictures(root):
    for name in ("images", "instructions"):
        (root / name).mkdir()
    pictures = [{"id": f"n{i}", "image": {"bytes": png(i), "path": f"n{i}.png"}} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(pictures), root / "images" / "testdev-0.parquet")
    questions = [
        {"id": f"q{i}", "imageId": f"n{i // 2}", "question": f"What is {i // 2}?", "answer": f"thing {i // 2}",
         "fullAnswer": f"It is thing {i // 2}."} for i in range(8)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(questions), root / "instructions" / "testdev-0.parquet")
    found = read(root)
    assert contents(found[:6]) == [EXPECTED[i // 2] for i in range(6)]
    assert reasons(found[6:]) == ["schema"] * 2  # n3 has no picture
    before = open_path(root).digest
    pq.write_table(pa.Table.from_pylist(pictures[:2]), root / "images" / "testdev-0.parquet")
    assert open_path(root).digest != before
