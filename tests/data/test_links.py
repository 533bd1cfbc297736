"""Links: of the Hub's cache, and of a user's own folder. Names never lead out of a data set; links may."""

import hashlib
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from thinkimg.data.pictures.image_files import ImageFiles
from thinkimg.data.refusal import RowRefused
from thinkimg.data.row import RawRow
from thinkimg.data.settings import DataConfig
from thinkimg.data.source import open_source
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

RECORDS = [{"image": f"pictures/{i}.png", "question": f"{i}?", "answer": f"{i}!"} for i in range(4)]


def write_set(root):
    """Write one data set in every form: a table per source, over the same pictures."""
    (root / "pictures").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 10), (i, 0, 0)).save(root / "pictures" / f"{i}.png")
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (root / "q.jsonl").write_text(lines)
    (root / "metadata.jsonl").write_text(lines)
    (root / "pictures" / "metadata.csv").write_text(
        "file_name,question,answer\n" + "".join(f"{i}.png,{i}?,{i}!\n" for i in range(4))
    )
    pq.write_table(pa.Table.from_pylist(RECORDS), root / "q.parquet")
    return root


def as_cache(root, cache):
    """Return the snapshot of a copy of `root` as `hf download` leaves it: each file is a link into ../../blobs."""
    snapshot = cache / "datasets--o--n" / "snapshots" / ("0" * 40)
    blobs = cache / "datasets--o--n" / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def read(source, path):
    opened = open_source(DataConfig(source=source, path=str(path)), ImageLimits())
    rows = list(opened.rows())
    assert all(isinstance(row, RawRow) for row in rows), rows
    return opened.digest, [(row.id, row.question, tuple(image() for image in row.images)) for row in rows]


FORMS = [("jsonl", "q.jsonl"), ("folder", "."), ("parquet", "q.parquet"), ("parquet", ".")]


@pytest.mark.parametrize(("source", "name"), FORMS)
def test_a_snapshot_of_links_is_the_data_set_itself(tmp_path, source, name):
    plain = write_set(tmp_path / "plain")
    expected = read(source, plain / name)
    assert len(expected[1]) == (8 if source == "folder" else 4)
    snapshot = as_cache(plain, tmp_path / "cache")
    assert read(source, snapshot / name) == expected  # names, pictures and digest
    (tmp_path / "way").symlink_to(snapshot)  # the folder itself by a link
    assert read(source, tmp_path / "way" / name) == expected


def test_a_snapshot_of_links_through_the_hubs_library(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    plain = tmp_path / "plain"
    (plain / "train").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 10), (i, 0, 0)).save(plain / "train" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "question": f"{i}?", "answer": "!"}) + "\n" for i in range(4)]
    (plain / "train" / "metadata.jsonl").write_text("".join(lines))
    digest, rows = read("hub", as_cache(plain, tmp_path / "cache"))
    assert len(rows) == 4 and all(image.startswith(b"\x89PNG") for _, _, (image,) in rows)


def test_pictures_and_folders_that_the_set_links_are_the_users_will(tmp_path):
    pictures = write_set(tmp_path / "elsewhere") / "pictures"
    root = tmp_path / "set"
    root.mkdir()
    (root / "pictures").symlink_to(pictures)
    (root / "one.png").symlink_to(pictures / "1.png")
    (root / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*RECORDS, {**RECORDS[1], "image": "one.png"}]))
    digest, rows = read("jsonl", root / "q.jsonl")
    assert [images for _, _, images in rows] == [(((pictures / f"{i}.png").read_bytes()),) for i in (0, 1, 2, 3, 1)]
    Image.new("RGB", (20, 10), "red").save(pictures / "1.png")
    assert read("jsonl", root / "q.jsonl")[0] != digest  # the content counts, through the link


@pytest.mark.parametrize(("source", "name"), [("folder", "metadata.jsonl"), ("parquet", "q.parquet")])
def test_linked_folders_are_entered_once_and_broken_links_are_named(tmp_path, source, name):
    elsewhere, root = write_set(tmp_path / "elsewhere"), tmp_path / "set"
    (elsewhere / "pictures" / "metadata.csv").unlink()
    root.mkdir()
    for link, target in {"part": elsewhere, "again": elsewhere, "back": root}.items():
        (root / link).symlink_to(target)
    (elsewhere / "up").symlink_to(root)
    (root / "pictures").symlink_to(elsewhere / "pictures")
    opened = open_source(DataConfig(source=source, path=str(root)), ImageLimits())
    assert len(list(opened.rows())) == 4
    (root / "broken.png").symlink_to(root / "nowhere.png")  # a picture of no row, or of one that is refused
    open_source(DataConfig(source=source, path=str(root)), ImageLimits())
    for link in (root / "more" / name, root / "shards"):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "blobs" / "lost")
        with pytest.raises(UserError, match=f"{link} is a broken link"):
            open_source(DataConfig(source=source, path=str(root)), ImageLimits())
        link.unlink()


def test_files_of_the_kernel_and_files_that_are_too_large_are_not_hashed(tmp_path):
    root = write_set(tmp_path / "set")
    (root / "kernel.png").symlink_to("/proc/kcore" if os.path.exists("/proc/kcore") else "/proc/self/environ")
    with open(root / "large.png", "wb") as file:
        file.truncate(2**40)  # sparse
    reader = ImageFiles(root, ImageLimits())
    with pytest.raises(RowRefused, match="kernel"):
        reader.locate("kernel.png")
    digest = reader.digest([root / "q.jsonl"], [("kernel.png", None), ("large.png", None)])
    assert digest != reader.digest([root / "q.jsonl"], [("kernel.png", None)])


def test_a_parquet_column_that_stands_twice_is_named(tmp_path):
    columns = [pa.array(["p.png"]), pa.array(["?"]), pa.array(["!"]), pa.array([1]), pa.array([2])]
    pq.write_table(pa.Table.from_arrays(columns, ["image", "question", "answer", "x", "x"]), tmp_path / "q.parquet")
    with pytest.raises(UserError, match="has the column 'x' twice"):
        open_source(DataConfig(source="parquet", path=str(tmp_path / "q.parquet")), ImageLimits())


def test_a_name_never_leads_out(tmp_path):
    root = write_set(tmp_path / "set")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "broken.png").symlink_to("nowhere.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "device.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    reader = ImageFiles(root, ImageLimits())
    for name in ("../secret.png", "pictures/../../secret.png", str(tmp_path / "secret.png"),
                 "/dev/zero", "broken.png", "loop.png", "device.png", "pipe.png", "pictures", ".", "", "\0", "\ud800",
                 "a" * 5000, "q.jsonl/x", "~/x.png"):  # fmt: skip
        with pytest.raises(RowRefused) as caught:
            reader.locate(name)
        assert caught.value.reason == "path" and caught.value.detail.encode(), name


def test_an_absolute_path_counts_inside_a_librarys_cache_alone(tmp_path):
    cache, root = write_set(tmp_path / "cache"), tmp_path / "set"
    root.mkdir()
    (tmp_path / "cache link").symlink_to(cache)
    for also in (cache, tmp_path / "cache link"):
        reader = ImageFiles(root, ImageLimits(), also=[also])
        for name in (cache / "pictures" / "1.png", also / "pictures" / "1.png"):
            assert reader.reader_of(str(name))() == (cache / "pictures" / "1.png").read_bytes()
    with pytest.raises(RowRefused, match="leads out"):
        ImageFiles(root, ImageLimits(), also=[cache]).locate(str(cache / "pictures" / ".." / ".." / "set"))
