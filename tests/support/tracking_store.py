"""A small real store and a real MLflow on sqlite for the tests of the projection: loops without an engine."""

import json
import random
import shutil
from collections import Counter

import pyarrow as pa
import pytest
from PIL import Image

from thinkimg import records
from thinkimg.config.load import validate
from thinkimg.images.decode import encode_png, pixel_hash
from thinkimg.records import AnswerType, CallStatus, Sample, StopReason, Trajectory, Turn, TurnKind
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe
from thinkimg.tracking.connection import Connection
from thinkimg.tracking.loop import open_loop
from thinkimg.tracking.settings import TrackingConfig

PHOTO, COMPONENTS = (224, 168), ("format", "tool", "answer")
MIXES = [{"format": 0.2, "tool": 0.3, "answer": 0.5}, {"answer": 1.0}]


@pytest.fixture
def store(tmp_path, empty_database, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    store = Store(tmp_path / "artifacts")
    store.root.mkdir()
    shutil.copy(empty_database, store.root / "mlflow.db")
    yield store
    assert not list((tmp_path / "cwd").iterdir()), "something landed in the working directory"


def settings(store, mix=MIXES[0], traces=3, **tracking):
    tree = {"mix": mix, "seed": 7, "where": {"store": str(store.root), "tracking": {"traces": traces, **tracking}}}
    return validate({"preset": "development", "iterations": 2} | tree)


def picture(seed, size=PHOTO):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def image_table(images):
    rows = {pixel_hash(image): image for image in images}
    return pa.Table.from_pylist(
        [
            {"sha256": key, "data": encode_png(image), "width": image.width, "height": image.height}
            for key, image in rows.items()
        ],
        records.image_schema(),
    )


def sample_of(number, image):
    return Sample(
        f"s{number}",
        "Which way do the stripes run?",
        ("left",),
        AnswerType.CHOICE,
        ("left", "right"),
        (pixel_hash(image),),
        "puzzles",
        "train",
    )


def trajectory_of(sample, index, crop, step=0):
    """Crops, makes a mistake, answers."""
    args = {"height": 42, "width": 56, "x": 56, "y": 28}
    call = f'<think>Too fine to see.</think>\n<tool>{{"name": "crop_image", "args": {json.dumps(args)}}}</tool>'
    turns = (
        Turn(
            call,
            TurnKind.TOOL,
            "crop_image",
            json.dumps(args),
            CallStatus.OK,
            None,
            0,
            pixel_hash(crop),
            "The image is 56 x 42 pixels.",
            30,
        ),
        Turn("<tool>{", TurnKind.MALFORMED, error="unreadable", observation="Error: unreadable"),
        Turn("<think>I see.</think><answer>left</answer>", TurnKind.ANSWER, tokens=9),
    )
    return Trajectory(
        f"t{step}-{sample.sample_id}-{index}",
        sample.sample_id,
        sample.sample_id,
        index,
        "p" * 64,
        (1, 2, 3),
        (0, 1, 1),
        (-0.5, -0.25),
        (*sample.images, pixel_hash(crop)),
        ((1, 12, 16), (1, 3, 4)),
        turns,
        "left",
        StopReason.ANSWER,
        None,
        "v0",
        (PHOTO, (56, 42)),
    )


def value_of(row, component):
    return round(random.Random(row.trajectory_id + component).random(), 3)


def make(store, kind, stage, config, inputs, fill):
    recipe = Recipe(stage, 1, records.SCHEMA_VERSION, config, {name: a.reference for name, a in inputs.items()})
    return store.build(kind, recipe, fill)[0]


def make_dataset(store):
    photos = [picture(seed) for seed in range(2)]
    samples = [sample_of(number, photo) for number, photo in enumerate(photos)]

    def fill(work):
        work.table("images.parquet", image_table(photos))
        work.table(
            "samples.parquet", pa.Table.from_pylist([records.to_row(s) for s in samples], records.sample_schema())
        )
        work.metrics["samples"] = len(samples)

    return make(store, "dataset", "prepare", {"source": "puzzles"}, {}, fill), samples, photos


def make_policy(store, step, mix, inputs):
    def fill(work):
        with work.part("adapter") as path:
            path.mkdir()
            (path / "weights.bin").write_bytes(f"{step} {mix}".encode())
        work.metrics |= {"loss": 1.0 / (step + 1), "parity/kl": 0.01}

    return make(store, "policy", "train" if step else "warmstart", {"step": step, "mix": mix}, inputs, fill)


def make_evaluation(store, policy, accuracy):
    def fill(work):
        work.json("answers.json", [accuracy])
        work.metrics |= {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "detail/accuracy": None}

    return make(store, "evaluation", "evaluate", {"k": 0}, {"policy": policy}, fill)


def make_rollouts(store, dataset, samples, photos, step, policy):
    crops = [photo.crop((56, 28, 112, 70)) for photo in photos]
    rows = [
        trajectory_of(sample, index, crop, step)
        for sample, crop in zip(samples, crops, strict=True)
        for index in range(3)
    ]

    def fill(work):
        work.table("images.parquet", image_table(crops))
        work.table(
            "trajectories.parquet",
            pa.Table.from_pylist([records.to_row(row) for row in rows], records.trajectory_schema()),
        )
        work.metrics["tool/calls"] = 1.0

    rollouts = make(store, "rollouts", "rollout", {"step": step}, {"dataset": dataset, "policy": policy}, fill)

    def fill_scores(work):
        table = [
            {"trajectory_id": row.trajectory_id, "sample_id": row.sample_id, "group_id": row.group_id}
            | {
                name: {"value": value_of(row, name), "status": "ok", "reason": "as planned", "evidence": '{"n": 1}'}
                for name in COMPONENTS
            }
            for row in rows
        ]
        work.table("scores.parquet", pa.Table.from_pylist(table, records.score_schema(list(COMPONENTS))))
        work.metrics |= {name: sum(value_of(row, name) for row in rows) / len(rows) for name in COMPONENTS}

    return rollouts, make(store, "scores", "score", {}, {"rollouts": rollouts}, fill_scores)


def run_loop(store, config, iterations=2, status="FINISHED", after=lambda step: None):
    """A loop as flows/loop.py runs it; the first iteration's rollouts are those of every other mix."""
    dataset, samples, photos = make_dataset(store)
    with open_loop(config, store) as tracker:
        policy = make_policy(store, 0, "", {"dataset": dataset})
        evaluation = make_evaluation(store, policy, 0.3)
        tracker.log_iteration(
            0, {"reward/total": None}, {"prepare": dataset, "warmstart": policy, "evaluate": evaluation}
        )
        for step in range(1, iterations + 1):
            rollouts, scores = make_rollouts(store, dataset, samples, photos, step, policy)
            policy = make_policy(store, step, str(config.mix), {"scores": scores, "policy": policy})
            evaluation = make_evaluation(store, policy, 0.3 + step / 10 + len(config.mix) / 100)
            tracker.log_iteration(step, artifacts={"rollout": rollouts, "score": scores})
            tracker.log_iteration(step, {"reward/total": 0.5 + step / 100}, {"train": policy, "evaluate": evaluation})
            after(step)
        tracker.record.tables["summary"] = [{"step": 0, "accuracy": 0.3}, {"step": 1, "note": "better"}]
    return tracker


def contents(store, uri=None):
    """All that MLflow holds, without what it makes up itself."""
    connection = Connection(store.root, TrackingConfig(uri=uri))
    client, found = connection.client, {}
    for experiment in (connection.loops, connection.stages):
        for run in connection.all_runs(experiment):
            key = run.data.tags.get("thinkimg.loop") or run.data.tags["thinkimg.artifact"]
            names = [name for name in run.data.metrics if not name.startswith("system/")]
            history = [point for name in names for point in client.get_metric_history(run.info.run_id, name)]
            points = Counter((point.key, point.step, point.value) for point in history)
            assert max(point.timestamp for point in history) <= run.info.end_time, "the story's times, not the sync's"
            traces = client.search_traces(locations=[experiment], run_id=run.info.run_id)
            assert key not in found, f"{key} doubled"
            tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.user")}
            found[key] = {
                "name": run.info.run_name,
                "status": run.info.status,
                "end": run.info.end_time,
                "tags": tags,
                "params": run.data.params,
                "points": points,
                "inputs": sorted((i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs),
                "files": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
                "traces": Counter(
                    (
                        t.info.tags["trajectory"],
                        t.info.tags["why"],
                        t.info.tags["step"],
                        tuple(sorted((a.name, a.value) for a in t.info.assessments)),
                    )
                    for t in traces
                ),
            }
    models = {}
    for model in client.search_registered_models():
        versions = client.search_model_versions(f"name = '{model.name}'")
        current = client.get_model_version_by_alias(model.name, "current").tags["thinkimg.digest"]
        models[model.name] = current, Counter((v.source, v.tags["step"]) for v in versions)
    return found, models
