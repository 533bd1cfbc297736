"""The prepare stage: every row is stored or refused with a reason, nothing is on both sides, and the same gives the
same.
"""

import importlib
import io
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from single_stage import build_stage, recipe_of

from thinkimg import records as schemas
from thinkimg.config.load import load_config, validate
from thinkimg.errors import UserError
from thinkimg.families.qwen2_5_vl import Qwen2_5_VL as Family
from thinkimg.images.decode import decode, pixel_hash
from thinkimg.images.patches import ImageProcessor
from thinkimg.stages import prepare as module
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable


def config(**data):
    images = {"min_pixels": 784, "max_pixels": 12544} if data.get("source", "puzzles") == "puzzles" else {}
    return validate({"data": data, "images": images, "where": {"workers": 2}})


def prepare(config, store, **options):
    return build_stage(module.prepare, config, store, **options)


def encoded(seed, kind="PNG", mode="RGB", **options):
    noise = np.random.default_rng(seed).integers(256, size=(8, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def exif():
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


def write(root, records, images):
    root.mkdir(exist_ok=True)
    for name, data in images.items():
        (root / name).write_bytes(data)
    (root / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(root / "data.jsonl")


def good(root, count=40):
    """`count` questions about half as many images, as people have them: formats, orientation, transparency, grey."""
    kinds = [{}, {"kind": "JPEG"}, {"kind": "WEBP"}, {"kind": "JPEG", "exif": exif()}, {"mode": "RGBA"}, {"mode": "L"}]
    images = {f"{i}": encoded(i, **kinds[i % len(kinds)]) for i in range(count // 2)}
    records = [{"image": str(i // 2), "question": f"{i}?", "answer": f"{i}!"} for i in range(count)]
    return write(root, records, images), images


def test_puzzles_are_balanced_apart_and_the_same_in_every_store(tmp_path):
    settings = config(train=16, held_out=12, seed=5)
    steps = []
    artifact, cached = prepare(
        settings, Store(tmp_path / "one"), progress=lambda done, total: steps.append((done, total))
    )
    assert not cached and steps[-1] == (28, 28)
    again, cached = prepare(settings, Store(tmp_path / "one"))
    assert cached and again == artifact
    assert prepare(settings, Store(tmp_path / "two"))[0].digest == artifact.digest
    train, held_out = artifact.split("train"), artifact.split("held_out")
    assert list(artifact.samples()) == train + held_out
    assert Counter(s.metadata["family"] for s in held_out) == dict.fromkeys(("detail", "dark", "turned", "both"), 3)
    assert not {s.metadata["photograph"] for s in train} & {s.metadata["photograph"] for s in held_out}
    assert {s.targets == () for s in train} == {True, False}
    assert all(call.keys() == {"name", "args"} for s in train for call in s.metadata["solution"])
    images = ImageTable([artifact])
    assert len(images) == 28 == artifact.metrics["images"]
    assert all(images.decoded(s.images[0]).size == (448, 448) for s in train)
    assert artifact.table("refused").num_rows == 0
    assert Store(tmp_path / "one").verify(artifact) == []


def test_the_recipe_follows_what_defines_the_puzzles_and_nothing_else(tmp_path):
    def fingerprint(images=None, **data):
        settings = config(**data)
        limits = settings.images.model_copy(update=images or {})
        return recipe_of(module.prepare, settings.model_copy(update={"images": limits})).fingerprint

    base = fingerprint()
    assert base == fingerprint({"max_bytes": 1000, "max_decoded_pixels": 1000})  # of files: puzzles are made
    assert len({base, fingerprint(seed=1), fingerprint(train=1), fingerprint(puzzles={"families": ["dark"]})}) == 4
    with pytest.raises(UserError, match="belongs to source"):
        fingerprint(max_refused=0.5)


@pytest.mark.parametrize("source", ["puzzles", "jsonl"])
def test_the_puzzles_recipe_follows_the_side_of_the_models_tokens_and_not_its_limits_of_pixels(tmp_path, source):
    def fingerprint(family, *overrides):
        data = [] if source == "puzzles" else ["data.source=jsonl", f"data.path={tmp_path / 'x.jsonl'}"]
        config = load_config("tiny", [f"model.tiny.family={family}", *data, *overrides])
        return recipe_of(module.puzzles, config).fingerprint

    base, larger = fingerprint("qwen2_5_vl"), fingerprint("qwen3_vl")
    assert base != larger and fingerprint("qwen3_5") == larger
    assert fingerprint("qwen2_5_vl", "images.max_pixels=12544") == base
    assert fingerprint("qwen3_vl", "conversation.coordinates=pixels") == larger


def test_a_users_images_are_stored_once_and_as_they_are_where_all_readers_agree(tmp_path):
    path, images = good(tmp_path / "set")
    settings = config(source="jsonl", path=path)
    artifact, _ = prepare(settings, Store(tmp_path / "store"))
    samples, table = list(artifact.samples()), ImageTable([artifact])
    assert len(samples) == 40 and len(table) == 20
    assert [s.question for s in samples] == [f"{i}?" for i in range(40)]  # the source's order
    kept = 0
    for data in images.values():
        image = decode(data)
        assert table.decoded(pixel_hash(image)).tobytes() == image.tobytes()
        kept += table.get(pixel_hash(image)) == data
    assert kept == 11  # RGB, upright
    rows = artifact.table("images")
    assert rows.schema == schemas.image_schema() and rows.num_rows == len(set(rows["sha256"].to_pylist())) == 20


def test_no_image_is_on_both_sides_and_limits_are_applied_after_the_split(tmp_path):
    path, _ = good(tmp_path / "set", 80)
    whole = list(prepare(config(source="jsonl", path=path), Store(tmp_path / "store"))[0].samples())
    side = {s.sample_id: s.split for s in whole}
    by_image = {}
    for sample in whole:
        by_image.setdefault(sample.images, set()).add(sample.split)
    assert all(len(sides) == 1 for sides in by_image.values())
    assert Counter(side.values()) == {"train": 56, "held_out": 24}
    part, _ = prepare(config(source="jsonl", path=path, train=9, held_out=5), Store(tmp_path / "store"))
    taken = list(part.samples())
    assert Counter(s.split for s in taken) == {"train": 9, "held_out": 5}
    assert all(side[s.sample_id] == s.split for s in taken)
    assert part.json("summary.json")["accepted"] == 80
    assert set(part.table("images")["sha256"].to_pylist()) == {image for s in taken for image in s.images}


def test_a_mapped_group_stays_on_one_side(tmp_path):
    images = {str(i): encoded(i) for i in range(30)}
    records = [{"image": str(i), "question": "?", "answer": "!", "scene": i % 6} for i in range(30)]
    path = write(tmp_path / "set", records, images)
    artifact, _ = prepare(config(source="jsonl", path=path, columns={"group": "scene"}), Store(tmp_path / "store"))
    sides = {}
    for sample in artifact.samples():
        sides.setdefault((int(sample.sample_id.split(":")[1]) - 1) % 6, set()).add(sample.split)
    assert sorted(map(tuple, sides.values())) == [("held_out",)] * 2 + [("train",)] * 4
    with pytest.raises(UserError, match="one group"):
        path = write(tmp_path / "set", [{**r, "scene": "same"} for r in records], images)
        prepare(config(source="jsonl", path=path, columns={"group": "scene"}), Store(tmp_path / "store"))


BAD = [
    ({"image": "text"}, "image_format"),
    ({"image": "cut"}, "image_broken"),
    ({"image": "../outside"}, "path"),
    ({"image": "nowhere"}, "path"),
    ({"image": "https://example.org/1.png"}, "url"),
    ({"question": " "}, "empty"),
    ({"answer": None}, "empty"),
    ({"id": 3}, "duplicate"),
]


def bad_set(root, copies=1):
    images = {str(i): encoded(i) for i in range(20)} | {"text": b"no image", "cut": encoded(0)[:-200]}
    records = [{"id": i, "image": str(i), "question": "?", "answer": "!"} for i in range(20)]
    records += [
        {"id": f"bad {i}", "image": "0", "question": "?", "answer": "!"} | bad for i, (bad, _) in enumerate(BAD)
    ] * copies
    return write(root, records, images)


def test_bad_rows_are_refused_with_their_reason_counted_and_listed(tmp_path):
    path = bad_set(tmp_path / "set")
    artifact, _ = prepare(
        config(source="jsonl", path=path, columns={"id": "id"}, max_refused=0.5), Store(tmp_path / "store")
    )
    refused = artifact.table("refused").to_pylist()
    assert [row["reason"] for row in refused] == [reason for _, reason in BAD]
    assert [row["where"] for row in refused] == [f"data.jsonl line {21 + i}" for i in range(len(BAD))]
    assert all(row["detail"] for row in refused)
    assert artifact.json("summary.json")["refused"] == Counter(reason for _, reason in BAD)
    assert artifact.metrics["refused"] == len(BAD)
    assert {s.sample_id for s in artifact.samples()} == {str(i) for i in range(20)}


def test_too_many_bad_texts_or_pictures_fail_the_stage_and_are_counted_by_reason(tmp_path):
    path, store = bad_set(tmp_path / "set"), Store(tmp_path / "store")
    for share, counted, first in (
        (0.1, "3 of 28 rows are refused", "2 for empty, 1 for duplicate; data.jsonl line 26"),
        (
            0.15,
            "5 of 25 rows are refused",
            "2 for path, 1 for image_format, 1 for image_broken, 1 for url; data.jsonl line 21",
        ),
    ):
        with pytest.raises(UserError, match=rf"{counted}, more than data\.max_refused \({share}\) allows") as error:
            prepare(config(source="jsonl", path=path, columns={"id": "id"}, max_refused=share), store)
        assert first in error.value.message and error.value.message.count("line ") == first.count(" for ")
    assert list(store.list()) == []
    with pytest.raises(UserError, match="2 of 2 rows"):
        only = write(tmp_path / "two", [{"image": name, "question": "?", "answer": "!"} for name in "xy"], {})
        prepare(config(source="jsonl", path=only, max_refused=1), store)


def test_the_place_of_the_files_does_not_count_but_their_content(tmp_path):
    store = Store(tmp_path / "store")
    path, images = good(tmp_path / "set")
    first, _ = prepare(config(source="jsonl", path=path), store)
    elsewhere, _ = good(tmp_path / "elsewhere")
    assert prepare(config(source="jsonl", path=elsewhere), store) == (first, True)
    (tmp_path / "elsewhere" / "3").write_bytes(encoded(1000))
    other, cached = prepare(config(source="jsonl", path=elsewhere), store)
    assert not cached and other.digest != first.digest
    forced, cached = prepare(config(source="jsonl", path=path), store, force=True)
    assert not cached and forced.attempt == "0002" and forced.digest == first.digest


def test_a_killed_run_goes_on_from_its_closed_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES_PER_PART", 8)
    path, _ = good(tmp_path / "set")
    settings = config(source="jsonl", path=path)
    whole, _ = prepare(settings, Store(tmp_path / "whole"))
    assert len(whole.table_files("samples")) == 5

    class Killed(BaseException):
        pass

    from thinkimg.store import files

    for name in ("images-00000.parquet", "samples-00001.parquet", "images-00003.parquet", "summary.json"):

        def hook(event, *paths, name=name):
            if event == "after append" and (paths[0].with_suffix(".work") / name).exists():
                raise Killed

        store = Store(tmp_path / name)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(files, "hook", hook)
            prepare(settings, store)
        stored = []
        with monkeypatch.context() as patch:
            count_calls(patch, "thinkimg.data.survey.survey._encode", stored)
            artifact, _ = prepare(settings, store)
        assert artifact.digest == whole.digest
        assert len(stored) < 40 or name == "images-00000.parquet"


def count_calls(patch, name, calls):
    """Append to `calls` whenever the function of this name is called."""
    module, _, attribute = name.rpartition(".")
    function = getattr(importlib.import_module(module), attribute)

    def counted(*args, **options):
        calls.append(name)
        return function(*args, **options)

    patch.setattr(name, counted)


def test_a_file_that_changes_between_the_passes_is_told(tmp_path, monkeypatch):
    path, _ = good(tmp_path / "set")
    survey = module.survey

    def meanwhile(*args):
        surveyed = survey(*args)
        (tmp_path / "set" / "7").write_bytes(encoded(1000))
        return surveyed

    monkeypatch.setattr(module, "survey", meanwhile)
    with pytest.raises(UserError, match="line 15 changed while it was read"):
        prepare(config(source="jsonl", path=path), Store(tmp_path / "store"))


def test_a_file_that_changes_after_its_digest_was_taken_is_told(tmp_path, monkeypatch):
    path, _ = good(tmp_path / "set")
    settings = config(source="jsonl", path=path)
    run = module.prepare.run

    def meanwhile(job):
        (tmp_path / "set" / "7").write_bytes(encoded(1000))
        run(job)

    changed = replace(module.prepare, run=meanwhile)
    with pytest.raises(UserError, match="changed after the settings were read"):
        build_stage(changed, settings, Store(tmp_path / "store"))
    artifact, _ = prepare(settings, Store(tmp_path / "store"))
    assert len(list(artifact.samples())) == 40


@pytest.mark.parametrize(("family", "size"), [("qwen2_5_vl", 112), ("qwen3_vl", 128), ("qwen3_5", 128)])
@pytest.mark.parametrize("images", [{}, {"min_pixels": 784, "max_pixels": 9000}])
def test_the_puzzles_are_refused_at_a_size_at_which_they_are_not_puzzles(tmp_path, family, size, images):
    model = {"tiny": {"family": family}, "adaptation": "full"}
    settings = validate({"model": model, "images": images, "data": {"train": 2, "held_out": 1}})
    with pytest.raises(UserError, match=f"seen at {size} x {size} pixels") as error:
        prepare(settings, Store(tmp_path))
    limits = dict(re.findall(r"images\.(m\w+_pixels)=(\d+)", error.value.hint))
    followed = settings.images.model_copy(update={name: int(value) for name, value in limits.items()})
    assert prepare(settings.model_copy(update={"images": followed}), Store(tmp_path))[0].metrics["train"] == 2


def test_the_puzzles_are_refused_for_tokens_that_are_too_small_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "processor", ImageProcessor(8, 2, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(UserError, match="20 pixels or more; the model's have 16"):
        prepare(load_config("tiny"), Store(tmp_path))


def advice(tmp_path, caplog, answers, **data):
    images = {str(i): encoded(i) for i in range(len(answers))}
    records = [{"image": str(i), "question": "?", "answer": answer} for i, answer in enumerate(answers)]
    caplog.clear()
    path = write(tmp_path / "set", records, images)
    prepare(config(source="jsonl", path=path, max_refused=0.5, **data), Store(tmp_path / "store"))
    return told(caplog)


def told(caplog):
    """Return what was told, but that the pictures are small."""
    return [text for text in (record.getMessage() for record in caplog.records) if "enlarged" not in text]


@pytest.mark.parametrize(("answers", "kind", "better"), [
    (["1942", "1,350", "$5", "2 cm", "3/4", "50 %"], "numbers", "number"),
    (["yes", "No", "no.", "Yes"], "yes or no", "exact"),
    (["2026-01-02", "3/4/1999", "Oct 12, 2026", "5 May 1990", "12.03.2020"], "dates", "exact"),
    (["7"] * 19 + ["seven"], "numbers", "number"),
])  # fmt: skip
def test_a_column_of_one_kind_is_told_where_texts_are_compared(tmp_path, caplog, answers, kind, better):
    (sentence,) = advice(tmp_path, caplog, answers, answer_type="text")
    assert f"of {len(answers)} right answers are {kind}" in sentence and f"data.answer_type={better}" in sentence
    assert "\n" not in sentence
    assert advice(tmp_path, caplog, answers, answer_type="text") == []  # Cached
    if kind != "numbers" or "seven" not in answers:
        assert advice(tmp_path, caplog, answers, answer_type=better) == []


def test_a_column_of_texts_is_not_told(tmp_path, caplog):
    assert advice(tmp_path, caplog, ["closed", "open", "7", "Room 21", "yes"]) == []


def test_refused_rows_and_unused_columns_are_one_line_each(tmp_path, caplog):
    records = [{"image": "0", "question": "?", "answer": "a", "answers": ["b"], "target": [1, 2, 3, 4]}] * 2
    records += [{"image": str(i), "question": "?", "answer": "b"} for i in range(2)] + [{"image": "x"}] * 2
    records += [{"image": "nowhere", "question": "?", "answer": "a"}]
    path = write(tmp_path / "set", records, {str(i): encoded(i) for i in range(2)})
    artifact, _ = prepare(config(source="jsonl", path=path, max_refused=0.5), Store(tmp_path / "store"))
    assert artifact.metrics["refused"] == 3
    assert told(caplog) == [
        "There is a column 'answers' that is not used. Set data.columns.answers=answers to use it.",
        "There is a column 'target' that is not used. Set data.columns.target=target to use it.",
        "2 rows ask what an earlier row asks of the same pictures, 1 of them with another right answer.",
        "3 of 7 rows are refused (empty 2, path 1); refused.parquet lists them.",
    ]


def test_a_good_picture_with_broken_metadata_is_a_sample(tmp_path):
    """Of every tenth row the EXIF block is broken, which no viewer minds."""
    kinds = ["PNG", "JPEG", "WEBP"]
    broken = {i: {"exif": b"Exif\0\0II*\0"} if i % 10 < 3 else {} for i in range(30)}
    images = {str(i): encoded(i, kinds[i % 3], **options) for i, options in broken.items()}
    records = [{"image": str(i), "question": "?", "answer": "a"} for i in range(30)]
    path = write(tmp_path / "set", records, images)
    artifact, _ = prepare(config(source="jsonl", path=path), Store(tmp_path / "store"))
    assert artifact.metrics["refused"] == 0 and len(ImageTable([artifact])) == 30
    assert len(list(artifact.samples())) == 30


def test_one_odd_row_of_parquet_costs_one_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.py_buffer(b"".join(b"text%d" % (i % 10) if i != 7 else b"\xff\xff" for i in range(40)))
    offsets = np.cumsum([0] + [5 if i != 7 else 2 for i in range(40)]).astype(np.int32)
    names = pa.StringArray.from_buffers(40, pa.py_buffer(offsets.tobytes()), texts)  # one is no UTF-8
    days = pa.array([0 if i != 9 else 10**12 for i in range(40)], pa.int64()).view(pa.timestamp("s"))
    table = {"image": [encoded(i) for i in range(40)], "question": ["?"] * 40, "answer": names, "when": days}
    pq.write_table(pa.table(table), tmp_path / "d.parquet")
    artifact, _ = prepare(config(source="parquet", path=str(tmp_path / "d.parquet")), Store(tmp_path / "store"))
    refused = artifact.table("refused").to_pylist()
    assert [(row["where"], row["reason"]) for row in refused] == [
        ("d.parquet row 8", "syntax"), ("d.parquet row 10", "syntax"),
    ]  # fmt: skip
