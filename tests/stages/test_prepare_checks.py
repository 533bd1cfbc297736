"""The prepare stage with its checks: benchmarks, the summary that is stored, and what enters the fingerprint."""

import json
from pathlib import Path

import pytest
from PIL import Image
from single_stage import build_stage, recipe_of
from survey_rows import encode, picture

from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.stages.prepare import prepare
from thinkimg.stages.warmstart import warmstart
from thinkimg.store.artifacts import Store


def write(root, seeds, name="data.jsonl", size=(320, 240), **columns):
    """Write a row for each picture; returns the path."""
    root.mkdir(exist_ok=True)
    records = []
    for i, seed in enumerate(seeds):
        (root / f"{i}.png").write_bytes(encode(picture(seed, size)))
        records.append({"image": f"{i}.png", "question": f"What is {seed}?", "answer": f"thing {seed}", **columns})
    (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(root / name)


def config(path, **data):
    settings = [
        f"data.{name}={str(value).lower() if value is True else value}"
        for name, value in {"source": "files", "path": path, **data}.items()
    ]
    return load_config("tiny", ["where.workers=2", *settings])


def test_a_benchmark_is_stored_whole_and_its_pictures_are_found_in_data_for_training(tmp_path, caplog):
    store = Store(tmp_path / "store")
    benchmark, _ = build_stage(
        prepare, config(write(tmp_path / "benchmark", range(10), "test.jsonl"), role="benchmark", held_out=3), store
    )
    assert benchmark.json("summary.json")["splits"] == {"held_out": 10}
    assert benchmark.json("summary.json")["role"] == "benchmark"
    assert benchmark.table("prints").num_rows == 10
    with pytest.raises(UserError, match="no samples in the split train"):
        benchmark.split("train")
    own = write(tmp_path / "own", range(8, 28), size=(160, 120))  # two of its pictures, at another size
    caplog.clear()
    data, _ = build_stage(prepare, config(own, held_out_share=0.1, held_out=2, train=18), store)
    shared = [sample for sample in data.split("train") if sample.question in ("What is 8?", "What is 9?")]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == f"{len(shared)} samples for training have a picture of the benchmark {benchmark.reference}."
    alone, _ = build_stage(prepare, config(own, held_out_share=0.1, held_out=2, train=18), Store(tmp_path / "other"))
    assert alone.digest == data.digest, "what a data set holds depends on its recipe alone"


def test_a_loop_is_not_begun_on_a_benchmark(tmp_path):
    settings = config(write(tmp_path / "set", range(4)), role="benchmark")
    with pytest.raises(UserError, match="there is nothing to train on"):
        warmstart.check(settings)
    warmstart.check(settings.model_copy(update={"iterations": 0}))
    warmstart.check(config(str(tmp_path / "set" / "data.jsonl")))
    warmstart.check(load_config("tiny", []))


def test_the_summary_counts_types_changes_and_oddities_and_names_the_schemas(tmp_path):
    path = write(tmp_path / "set", range(12), solution="long " * 2000)
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for i, record in enumerate(records):
        record["answer"] = ["yes", "7", "a man in a coat"][i % 3]
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
    artifact, _ = build_stage(prepare, config(path, train=50, held_out=50), Store(tmp_path / "store"))
    summary = artifact.json("summary.json")
    assert sum(summary["types"].values()) == 12 and len(summary["types"]) == 3
    assert summary["oddities"] == {"heavy_text": 12} and sum(summary["changes"].values()) == 12
    assert summary["schemas"] == [["data.jsonl", "none", "1"]] and summary["role"] == "training"
    assert (summary["accepted"], summary["looked"], summary["groups"]) == (12, 12, 12)
    assert all("solution" not in sample.columns for sample in artifact.samples())


def test_schemas_and_what_changes_the_samples_define_the_data_set_and_no_path_does(tmp_path):
    path = write(tmp_path / "set", range(6))
    (tmp_path / "set").joinpath("more").mkdir()
    base = recipe_of(prepare, config(path))
    assert base.config["data"]["schemas"] == [["data.jsonl", "none", "1"]]
    assert not {"path", "images"} & base.config["data"].keys()
    assert base.fingerprint == recipe_of(prepare, config(path, images=str(tmp_path / "set"))).fingerprint
    others = [{"role": "benchmark"}, {"boxes": "xyxy"}, {"shuffle_choices": True}, {"answer_type": "text"}]
    assert len({base.fingerprint, *(recipe_of(prepare, config(path, **one)).fingerprint for one in others)}) == 5


def test_a_picture_that_is_not_kept_as_it_is_comes_back_the_same(tmp_path):
    """Transparent, grey and turned pictures are encoded anew, with the pixels that the survey saw."""
    root = tmp_path / "set"
    path = write(root, range(6))
    picture(0).convert("RGBA").save(root / "0.png")
    picture(1).convert("L").save(root / "1.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(2).save(root / "2.png", "JPEG", exif=turned)
    artifact, _ = build_stage(prepare, config(path, train=50, held_out=50), Store(tmp_path / "store"))
    assert sorted(artifact.image_sizes({sha for s in artifact.samples() for sha in s.images}).values()) == sorted(
        [(40, 30), (40, 30), (30, 40), (320, 240), (320, 240), (320, 240)]
    )
    assert Store(tmp_path / "store").verify(artifact) == []
