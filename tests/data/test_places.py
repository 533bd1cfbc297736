"""Pictures are those that the names mean, whatever lies beside them and in whatever order the rows come."""

import itertools
import json
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_sets import picture, settings_of, write_lines

from thinkimg.data.pictures import places
from thinkimg.data.pictures.places import closest, count_shared, sort_by_end
from thinkimg.data.refusal import Refused, RowRefused
from thinkimg.data.source import open_source
from thinkimg.data.sources.files import open_tables
from thinkimg.data.tables.find import find_tables
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.store import files


def record(name, number=0):
    return {"image": name, "question": f"What is {number}?", "answer": f"thing {number}"}


def open_path(path, *overrides):
    return open_source(settings_of(path, *overrides), ImageLimits())


def read(path, *overrides, last_first=False):
    """The picture of each row, or the reason and detail of its refusal."""
    rows = list(open_path(path, *overrides).rows())
    found = {}
    for place in reversed(range(len(rows))) if last_first else range(len(rows)):
        row = rows[place]
        try:
            found[place] = (row.reason, row.detail) if isinstance(row, Refused) else row.images[0]()
        except RowRefused as refused:
            found[place] = (refused.reason, refused.detail)
    return [found[place] for place in range(len(rows))]


def write_zip(path, members, method=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def reasons(found):
    return ["ok" if isinstance(one, bytes) else str(one[0]) for one in found]


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("names", itertools.permutations(["/a/train/0.png", "/a/val/0.png", "flat/0.png"]))
def test_names_that_share_a_picture_are_refused_in_any_order_but_for_its_own_name(tmp_path, names, last_first):
    images = tmp_path / "images"
    (images / "flat").mkdir(parents=True)
    (images / "flat" / "0.png").write_bytes(picture(0))
    path = write_lines(tmp_path / "set" / "a.jsonl", [record(name, i) for i, name in enumerate(names)])
    found = read(path, f"data.images={images / 'flat'}", last_first=last_first)
    assert reasons(found) == ["path"] * 3
    assert all("both lead to '0.png'" in detail and str(tmp_path) not in detail for _, detail in found)
    found = read(path, f"data.images={images}", last_first=last_first)
    assert reasons(found) == ["ok" if name == "flat/0.png" else "path" for name in names]


@pytest.mark.parametrize("digest", [None, "0" * 64])
def test_names_that_share_a_picture_are_known_before_any_is_read_also_where_the_digest_is(tmp_path, digest):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(picture(0))
    path = write_lines(tmp_path / "set" / "a.jsonl", [record("/a/train/0.png"), record("/a/val/0.png", 1)])
    data = settings_of(path, f"data.images={tmp_path / 'images'}")
    for row in open_tables("files", find_tables(data), data, ImageLimits(), digest=digest).rows():
        with pytest.raises(RowRefused, match="both lead to"):
            row.images[0]()


@pytest.mark.parametrize("name", ["images/1.png", "/mnt/x/images/1.png"])
@pytest.mark.parametrize(
    ("archives", "expected"),
    [
        ({"a_masks.zip": {"1.png": 1}, "pictures.zip": {"images/1.png": 2}}, 2),
        ({"a_masks.zip": {"1.png": 1}, "images.zip": {"1.png": 2}}, 2),
        ({"a.zip": {"1.png": 1}, "b.zip": {"1.png": 2}}, None),
        ({"a.zip": {"1.png": 2}, "b.zip": {"1.png": 2}}, 2),
        ({"a.zip": {"masks/1.png": 1, "images/1.png": 2}}, 2),
        ({"a.zip": {"masks/1.png": 1}}, None),
    ],
)
def test_of_several_archives_the_one_is_read_that_fits_best(tmp_path, name, archives, expected):
    for archive, members in archives.items():
        write_zip(tmp_path / archive, {member: picture(seed) for member, seed in members.items()})
    path = write_lines(tmp_path / "a.jsonl", [record(name)])
    (found,) = read(path)
    assert found == picture(expected) if expected is not None else found[0] == "path"


@pytest.mark.parametrize("name", ["set/images/1.png", "/mnt/set/images/1.png"])
def test_a_file_comes_before_an_archive_that_has_only_its_last_part(tmp_path, name):
    root = tmp_path / "set"
    write_zip(root / "masks.zip", {"1.png": picture(1)})
    (root / "images").mkdir()
    (root / "images" / "1.png").write_bytes(picture(2))
    assert read(write_lines(root / "a.jsonl", [record(name)])) == [picture(2)]


PARTS = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(tuple)


@given(st.lists(PARTS, max_size=8), PARTS)
def test_the_closest_paths_are_those_that_share_most_last_parts(candidates, parts):
    def fits(candidate):
        shared = count_shared(candidate, parts)
        return shared >= 2 or 0 < shared == min(len(candidate), len(parts))

    fitting = [candidate for candidate in candidates if fits(candidate)]
    most = max((count_shared(candidate, parts) for candidate in fitting), default=0)
    expected = [candidate for candidate in fitting if count_shared(candidate, parts) == most]
    found = closest(sort_by_end(candidates), parts)
    assert min(len(expected), 2) == len(found) and all(candidate in expected for candidate in found)


class Counting(str):
    """Text that counts how often it is compared."""

    __hash__ = str.__hash__
    compared = 0

    def __eq__(self, other):
        Counting.compared += 1
        return str.__eq__(self, other)


def test_a_look_up_does_not_look_at_all_files_of_one_name():
    candidates = sort_by_end(("images", str(i), Counting("image.png")) for i in range(4096))
    Counting.compared = 0
    assert closest(candidates, ("images", "77", "image.png")) == [("images", "77", "image.png")]
    assert Counting.compared < 100


SPELLINGS = [
    ("photos/\u00e9.png", "photos/e\u0301.png"), ("photos/e\u0301.png", "photos/\u00e9.png"), ("a.png", "a.PNG"),
    ("A/b.JPG", "A/b.jpg"), ("\u00e9/a.png", "e\u0301/a.png"), ("a/b\\c.png", "a/b/c.png"),
]  # fmt: skip


@pytest.mark.parametrize("named, stored", SPELLINGS)
@pytest.mark.parametrize("kind", ["file", "images", "P.ZIP", "backslashes"])
def test_a_picture_is_had_whatever_the_spelling_of_its_name(tmp_path, named, stored, kind):
    root = tmp_path / "set"
    path = write_lines(root / "a.jsonl", [record(named)])
    overrides = ()
    if kind in ("file", "images"):
        folder = root if kind == "file" else tmp_path / "pictures" / "deep"
        (folder / stored).parent.mkdir(parents=True, exist_ok=True)
        (folder / stored).write_bytes(picture(1))
        overrides = () if kind == "file" else (f"data.images={tmp_path / 'pictures'}",)
    else:
        member = stored.replace("/", "\\") if kind == "backslashes" else stored
        write_zip(root / ("p.zip" if kind == "backslashes" else "P.ZIP"), {member: picture(1)})
    assert read(path, *overrides) == [picture(1)]


@pytest.mark.parametrize("kind", ["file", "zip"])
def test_the_very_name_comes_before_other_spellings_which_are_ambiguous_without_it(tmp_path, kind):
    names = ["e\u0301.png", "\u00e9.png", "\u00e9.PNG", "e\u0301.PNG"]
    path = write_lines(tmp_path / "a.jsonl", [record(name, i) for i, name in enumerate(names)])
    contents = {name: picture(i) for i, name in enumerate(names[:2])}
    if kind == "zip":
        write_zip(tmp_path / "p.zip", contents)
    else:
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
    found = read(path)
    assert found[:2] == [picture(0), picture(1)]
    assert reasons(found[2:]) == ["path", "path"] and all("may be" in detail for _, detail in found[2:])


def test_another_spelling_never_leads_out_and_two_names_share_no_picture(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(0))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(picture(1))
    names = ["a/..\\..\\secret.png", "..\\secret.PNG", "a.png", "a.PNG"]
    found = read(write_lines(tmp_path / "set" / "a.jsonl", [record(name, i) for i, name in enumerate(names)]))
    assert reasons(found) == ["path", "path", "ok", "path"] and "both lead to" in found[3][1]


@pytest.mark.parametrize("count", [2, 3])
def test_more_archives_than_are_opened_are_said(tmp_path, monkeypatch, count):
    monkeypatch.setattr(places, "MAX_ARCHIVES", 2)
    for i in range(count):
        write_zip(tmp_path / f"{i}.zip", {f"{i}.png": picture(i)})
    found = read(write_lines(tmp_path / "a.jsonl", [record(f"{i}.png", i) for i in range(count)]))
    assert found[:2] == [picture(0), picture(1)]
    assert count == 2 or (found[2][0] == "path" and "2 ZIP archives at most, and there are 3" in found[2][1])


# odd files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_damaged_member_of_an_archive_costs_its_row(tmp_path, method):
    path = write_lines(tmp_path / "a.jsonl", [record("0.png"), record("1.png", 1)])
    archive = write_zip(tmp_path / "p.zip", {"0.png": picture(0), "1.png": picture(1)}, method)
    content = bytearray(archive.read_bytes())
    content[100:400] = b"\xff" * 300
    archive.write_bytes(content)
    found = read(path)
    assert reasons(found) == ["path", "ok"] and found[1] == picture(1) and "can't be read: " in found[0][1]


def test_pictures_and_tables_that_may_not_be_read(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", [record("0.png"), record("1.png", 1)])
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    forbidden = set()
    original = Path.open

    def open_file(self, *args, **options):
        if self.name in forbidden:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **options)

    monkeypatch.setattr(Path, "open", open_file)
    monkeypatch.setattr(files, "sha256_once", files.sha256)
    forbidden.add("0.png")
    assert reasons(read(path)) == ["path", "ok"]
    forbidden.add("a.jsonl")
    with pytest.raises(UserError, match="can't be read: Permission denied"):
        open_path(path)


def test_an_unreadable_file_beside_a_picture_costs_its_row(tmp_path, monkeypatch):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
        (tmp_path / f"{i}.json").write_text(json.dumps({"question": f"What is {i}?", "answer": f"thing {i}"}))
    source, original = open_path(tmp_path), Path.read_bytes

    def read_bytes(self):
        if self.name == "0.json":
            raise PermissionError(13, "Permission denied", str(self))
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    first, second = source.rows()
    assert isinstance(first, Refused) and first.reason == "syntax" and second.images[0]() == picture(1)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['0.png,"open,a', "0.png,q,a", "0.png,q,a"], ["syntax"] * 3),
        (["0.png,q,a", '0.png,"open,a', '0.png,"q",a', "0.png,q,a"], ["ok", "syntax", "syntax", "ok"]),
        (['0.png,"two', 'lines",a', "0.png,q,a"], ["ok", "ok"]),
    ],
)
def test_lines_that_an_open_quote_takes_along_are_counted(tmp_path, lines, expected):
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "a.csv").write_text("\n".join(["image,question,answer", *lines]) + "\n")
    assert reasons(read(tmp_path / "a.csv")) == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        open_path(tmp_path)


def test_values_that_are_nested_too_deeply(tmp_path):
    inner = '"0.png"'
    for _ in range(700):
        inner = f'{{"image":{inner}}}'
    text = json.dumps(record("@")).replace('"@"', inner)
    (tmp_path / "a.jsonl").write_text(f"{text}\n{json.dumps(record('0.png', 1))}\n")
    (tmp_path / "0.png").write_bytes(picture(0))
    assert read(tmp_path / "a.jsonl") == [picture(0)] * 2
    (tmp_path / "b.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match="is no JSON"):
        open_path(tmp_path / "b.json")


def test_a_time_zone_that_nobody_knows_costs_rows_and_not_the_stage(tmp_path):
    times = pa.array([1], pa.timestamp("us", tz="Mars/Phobos"))
    table = pa.table({"image": [picture(0)], "question": ["q"], "answer": ["a"], "time": times})
    pq.write_table(table, tmp_path / "a.parquet")
    assert reasons(read(tmp_path / "a.parquet")) == ["syntax"]


def test_two_pictures_of_one_id_are_none(tmp_path):
    pictures = [
        {"id": f"n{i}", "image": {"bytes": picture(seed), "path": None}} for i, seed in ((0, 0), (1, 1), (0, 2))
    ]
    questions = [
        {"id": f"q{i}", "imageId": f"n{i}", "question": "What?", "answer": "it", "fullAnswer": "It is it."}
        for i in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(pictures), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(questions), tmp_path / "b.parquet")
    found = read(tmp_path)
    assert reasons(found) == ["schema", "ok"] and found[1] == picture(1)


# columns that are read ------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_named_column_are_read_under_a_named_schema(tmp_path):
    columns = {"image": [picture(0)], "my.pic": [picture(1)], "problem": ["What?"], "answer": ["it"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    assert read(path, "data.schema=geometry3k") == [picture(0)]
    assert read(path, "data.schema=geometry3k", "data.columns.image=my.pic") == [picture(1)]
    assert read(path, "data.columns.image=my.pic", "data.columns.question=problem") == [picture(1)]


def test_a_digest_follows_the_pictures_of_a_named_column_under_a_named_schema(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"image": "0.png", "pic": "1.png", "problem": "What?", "answer": "it"}])
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    named = ("data.schema=geometry3k", "data.columns.image=pic")
    before = open_path(path, *named).digest
    (tmp_path / "0.png").write_bytes(picture(8))
    assert open_path(path, *named).digest == before
    (tmp_path / "1.png").write_bytes(picture(9))
    assert open_path(path, *named).digest != before


def test_a_function_of_the_users_gets_the_bytes_of_all_columns(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_bytes.py").write_text(
        "from thinkimg.data.fields import Fields\n"
        "def convert(record):\n"
        "    assert record['mask'] == b'mask'\n"
        "    return Fields(record['q'], record['pic'] or record['file'], 'it')\n"
    )
    (tmp_path / "1.png").write_bytes(picture(1))
    columns = {"pic": [picture(0), None], "file": [None, "1.png"], "q": ["a?", "b?"], "mask": [b"mask"] * 2}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    setting = "data.schema=my_bytes:convert"
    assert read(tmp_path / "a.parquet", setting) == [picture(0), picture(1)]
    before = open_path(tmp_path / "a.parquet", setting).digest
    (tmp_path / "1.png").write_bytes(picture(2))
    assert open_path(tmp_path / "a.parquet", setting).digest != before
    sys.modules.pop("my_bytes")
