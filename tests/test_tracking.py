"""The projection into a real MLflow on sqlite: nothing is lost over an outage, and nothing doubles."""

import dataclasses
import json
import logging
import math
import random
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from thinkimg import config as configuration
from thinkimg import schemas
from thinkimg.artifacts import Recipe, Store
from thinkimg.errors import UserError
from thinkimg.images.decode import encode_png, pixel_hash
from thinkimg.schemas import AnswerType, CallStatus, Sample, StopReason, Trajectory, Turn, TurnKind
from thinkimg.tracking import (
    input_digest,
    load_record,
    log_stage,
    loop_id,
    open_loop,
    records,
    save_record,
    sync,
    ui_command,
)
from thinkimg.tracking.connection import Connection, load_mlflow
from thinkimg.tracking.projection import flatten
from thinkimg.tracking.records import LoopRecord, headline
from thinkimg.tracking.traces import conversation, select, with_box

PHOTO, COMPONENTS = (224, 168), ("format", "tool", "answer")
MIXES = [{"format": 0.2, "tool": 0.3, "answer": 0.5}, {"answer": 1.0}]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow takes 10 s to migrate a new database: once is enough."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    load_mlflow().MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


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
    return configuration.validate({"preset": "development", "iterations": 2} | tree)


# the artifacts of a small loop ----------------------------------------------------------------------------------------


def picture(seed, size=PHOTO):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def image_table(images):
    rows = {pixel_hash(image): image for image in images}
    return pa.Table.from_pylist(
        [
            {"sha256": key, "data": encode_png(image), "width": image.width, "height": image.height}
            for key, image in rows.items()
        ],
        schemas.images(),
    )


def sample_of(number, image):
    return Sample(
        f"s{number}",
        "Which way do the stripes run?",
        "left",
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
    )


def value_of(row, component):
    return round(random.Random(row.trajectory_id + component).random(), 3)


def make(store, kind, stage, config, inputs, fill):
    recipe = Recipe(stage, 1, schemas.SCHEMA_VERSION, config, {name: a.reference for name, a in inputs.items()})
    return store.build(kind, recipe, fill, seed=7)[0]


def make_dataset(store):
    photos = [picture(seed) for seed in range(2)]
    samples = [sample_of(number, photo) for number, photo in enumerate(photos)]

    def fill(work):
        work.table("images.parquet", image_table(photos))
        work.table("samples.parquet", pa.Table.from_pylist([schemas.to_row(s) for s in samples], schemas.samples()))
        work.metrics["samples"] = len(samples)

    return make(store, "dataset", "prepare", {"source": "puzzles"}, {}, fill), samples, photos


def make_policy(store, step, mix, inputs):
    def fill(work):
        work.directory_part("adapter", lambda path: (path / "weights.bin").write_bytes(f"{step} {mix}".encode()))
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
            "trajectories.parquet", pa.Table.from_pylist([schemas.to_row(row) for row in rows], schemas.trajectories())
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
        work.table("scores.parquet", pa.Table.from_pylist(table, schemas.scores(list(COMPONENTS))))
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
        tracker.log_table("summary", [{"step": 0, "accuracy": 0.3}, {"step": 1, "note": "better"}])
    return tracker


def contents(store, uri=None):
    """All that MLflow holds, without what it makes up itself."""
    connection = Connection(store.root, configuration.TrackingConfig(uri=uri))
    client, found = connection.client, {}
    for experiment in (connection.loops, connection.stages):
        for run in connection.all_runs(experiment):
            key = run.data.tags.get("thinkimg.loop") or run.data.tags["thinkimg.artifact"]
            history = [point for name in run.data.metrics for point in client.get_metric_history(run.info.run_id, name)]
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


# tests ----------------------------------------------------------------------------------------------------------------


def test_two_mixes_outage_and_sync(store, caplog):
    """Two mixes of the same rollouts are two runs with the same keys; after a loss of everything sync restores it all,
    and a second sync adds nothing."""
    trackers = [run_loop(store, settings(store, mix)) for mix in MIXES]
    log_stage(next(store.list("dataset")), store, configuration.TrackingConfig())
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("thinkimg")]
    before, models = contents(store)

    runs = [before[tracker.record.loop_id] for tracker in trackers]
    keys = [{name for name, _, _ in run["points"]} for run in runs]
    assert (
        keys[0]
        == keys[1]
        >= {
            "reward/format",
            "reward/tool",
            "reward/answer",
            "reward/total",
            "eval/accuracy",
            "eval/accuracy_low",
            "train/loss",
            "parity/kl",
            "tool/calls",
            "time/rollout_s",
        }
    )
    assert "eval/detail/accuracy" not in keys[0], "a value of None is no point"
    assert [run["tags"]["mix"] for run in runs] == ["answer=0.5 format=0.2 tool=0.3", "answer=1"]
    assert runs[0]["tags"]["mix_hash"] != runs[1]["tags"]["mix_hash"] and runs[0]["tags"]["seed"] == "7"
    assert {step: value for name, step, value in runs[0]["points"] if name == "eval/accuracy"} == pytest.approx(
        {0: 0.3, 1: 0.43, 2: 0.53}
    )
    assert set(runs[0]["points"].values()) == {1}
    assert runs[0]["params"]["train.loss.beta"] and not {"iterations", "where.store"} & set(runs[0]["params"])
    assert runs[0]["files"] == ["artifacts.json", "config.json", "summary.json"]
    assert Counter(step for _, _, step, _ in runs[0]["traces"]) == {"1": 3, "2": 3}
    assert {why for _, why, _, _ in runs[0]["traces"]} == {"best", "worst", "disagreeing"}
    assert len([key for key in before if "/" in key]) == len(list(store.list()))  # however often it was found
    current, versions = models["thinkimg-development"]
    assert sum(versions.values()) == 5  # 2 mixes x 2 iterations, and the one that both began with
    assert current == trackers[1].record.references("policy")[-1][1].digest

    report = sync(store)
    assert dataclasses.astuple(report) == (0,) * 5
    assert contents(store) == (before, models)

    (store.root / "mlflow.db").unlink()
    shutil.rmtree(store.root / "mlartifacts")
    # Two processes at once that also have to make a new database: without a lock both crash, or everything doubles.
    program = (
        "import sys; from dataclasses import astuple; from thinkimg.artifacts import Store; "
        "from thinkimg.tracking import sync; print(*astuple(sync(Store(sys.argv[1]))))"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, store.root], stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    added = [sum(column) for column in zip(*(map(int, line.split()) for line in said), strict=True)]
    assert added == [
        2,
        len(before) - 2,
        sum(sum(run["points"].values()) for run in before.values() if run["traces"]),
        sum(sum(run["traces"].values()) for run in runs),
        5,
    ]
    shutil.copy(store.root / "mlflow.db", store.root / "new.db")  # this process still holds the deleted file
    assert contents(store, f"sqlite:///{store.root}/new.db") == (before, models)


def test_disabled_then_synced(store):
    tracker = run_loop(store, settings(store, enabled=False), iterations=1)
    assert load_mlflow().MlflowClient(f"sqlite:///{store.root}/mlflow.db").get_experiment_by_name("thinkimg") is None
    report = sync(store)
    assert (report.loops, report.traces, report.policies) == (1, 3, 2) and report.stages == len(list(store.list()))
    assert contents(store)[0][tracker.record.loop_id]["status"] == "FINISHED"


def test_who_consumed(store):
    """The search that an auditor makes: which runs consumed an artifact."""
    run_loop(store, settings(store, traces=0), iterations=1)
    sync(store)
    connection = Connection(store.root, configuration.TrackingConfig())
    (dataset,) = store.list("dataset")
    found = connection.client.search_runs(
        [connection.loops, connection.stages], f"dataset.digest = '{input_digest(dataset.digest)}'"
    )
    stages = [run.data.tags.get("stage", "loop") for run in found]
    assert sorted(stages) == ["loop", "rollout", "warmstart"]
    assert found[0].inputs.dataset_inputs[0].tags[0].value == "dataset"


def test_continued_loop_is_the_same_run(store):
    """Extended by an iteration, resumed on another machine, corrected: one run, the last word is the record's."""
    config = settings(store, traces=0)
    tracker = run_loop(store, config, iterations=1)
    longer = config.model_copy(update={"iterations": 9})
    assert loop_id(longer) == loop_id(config) != loop_id(config.model_copy(update={"seed": 8}))
    again = run_loop(store, longer)
    assert again.record.started == tracker.record.started and again._run.run_id == tracker._run.run_id
    with pytest.raises(KeyboardInterrupt), open_loop(longer, store) as tracker:
        tracker.log_iteration(2, {"eval/accuracy": 0.25, "reward/total": math.nan})
        assert tracker.connection.client.get_run(tracker._run.run_id).info.status == "RUNNING"
        raise KeyboardInterrupt
    (run,) = (run for key, run in contents(store)[0].items() if key == loop_id(config))
    assert (run["status"], run["tags"]["iterations"]) == ("KILLED", "9")
    latest = tracker.connection.client.get_run(tracker._run.run_id).data.metrics
    assert latest["eval/accuracy"] == 0.25 and latest["reward/total"] == 0.52
    assert dataclasses.astuple(sync(store))[2] == 0


def test_trace_shows_the_conversation(store):
    tracker = run_loop(store, settings(store, traces=1), iterations=1)
    connection = tracker.connection
    (trace,) = connection.client.search_traces(locations=[connection.loops], run_id=tracker._run.run_id)
    (span,) = trace.data.spans
    messages = span.inputs["messages"]
    assert messages[0]["role"] == "system" and "crop_image" in messages.pop(0)["content"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user", "assistant", "user"]
    assert messages[0]["content"][1]["text"] == (
        "Image 0: 224x168 pixels. Which way do the stripes run? Choices: left, right."
    )
    assert messages[1]["content"] == "<think>Too fine to see.</think>"
    assert json.loads(messages[1]["tool_calls"][0]["function"]["arguments"])["width"] == 56
    assert messages[2]["content"] == "The image is 56 x 42 pixels."
    assert [part["type"] for part in messages[3]["content"]] == ["text", "image_url"] * 2
    assert span.outputs["choices"][0]["message"]["content"].endswith("<answer>left</answer>")
    files = [path for path in (store.root / "mlartifacts").rglob("*") if path.is_file()]
    sizes = Counter(Image.open(path).size for path in files if path.read_bytes()[:4] == b"\x89PNG")
    assert sizes == {PHOTO: 2, (56, 42): 1}  # the question's image, again with the box, and the crop
    row = load_record(store, tracker.record.loop_id).iteration(1)
    scores = {r["trajectory_id"]: r for r in store.resolve(row.artifacts["score"]).table("scores").to_pylist()}
    best = max(scores.values(), key=lambda r: sum(MIXES[0][name] * r[name]["value"] for name in COMPONENTS))
    assert trace.info.tags["trajectory"] == best["trajectory_id"]
    feedback = {a.name: (a.value, a.rationale) for a in trace.info.assessments}
    assert feedback["answer"] == (best["answer"]["value"], 'as planned; {"n": 1}') and set(feedback) == {
        *COMPONENTS,
        "total",
    }


def test_later_failure_warns_once_and_sync_repairs(store, caplog):
    """The database breaks in the middle and comes back after the loop."""
    database, aside = store.root / "mlflow.db", store.root / "aside"

    def breaks(step):
        if step == 1:
            shutil.copy(database, aside)
            database.write_bytes(b"no database" * 1000)

    tracker = run_loop(store, settings(store), after=breaks)
    warnings = [
        r.getMessage().split(" (")[0]
        for r in caplog.records
        if r.name.startswith("thinkimg") and r.levelno >= logging.WARNING
    ]
    assert sorted(warnings) == ["MLflow did not take runs", "MLflow did not take stages"]
    assert tracker.record.iterations[-1].step == 2 and tracker.record.status == "FINISHED"
    shutil.copy(aside, database)
    report = sync(store)
    assert report.loops == 0 and report.points > 5 and report.traces == 3
    run = contents(store)[0][tracker.record.loop_id]
    assert run["status"] == "FINISHED" and set(run["points"].values()) == {1} and len(run["traces"]) == 6


@pytest.mark.parametrize("uri", ["nonsense://x", "http://user:secret@127.0.0.1:9", "sqlite:////proc/none/mlflow.db"])
def test_unusable_at_set_up(store, uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="MLflow can't be used at") as error:
        open_loop(settings(store, uri=uri), store)
    assert "secret" not in str(error.value)
    assert "secret" not in (store.root / "loops" / f"{loop_id(settings(store))}.json").read_text()


def test_mlflow_is_imported_late_and_says_nothing_home():
    program = (
        "import sys, thinkimg.tracking; assert 'mlflow' not in sys.modules; "
        "from thinkimg.tracking.connection import load_mlflow; load_mlflow(); "
        "from mlflow.telemetry.utils import is_telemetry_disabled; assert is_telemetry_disabled()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_ui_command(store):
    command = ui_command(settings(store))
    assert "--host 127.0.0.1" in command and f"sqlite:///{store.root}/mlflow.db" in shlex.split(command)
    assert "https://tracking.example" in ui_command(settings(store, uri="https://tracking.example"))


@given(st.dictionaries(st.text("abc.", min_size=1), st.none() | st.integers() | st.text() | st.lists(st.text())))
def test_parameters_are_short(tree):
    for key, value in flatten({"outer": tree, "long": "x" * 9999}):
        assert len(value) <= 500 and (key == "long" or key.startswith("outer"))


@given(st.lists(st.tuples(st.none() | st.floats(0, 1), st.floats(0, 1), st.booleans()), max_size=9), st.integers(0, 9))
def test_selection(values, count):
    """At most `count` different ones; best and worst first; the order in which they come changes nothing."""
    image = Image.new("RGB", (28, 28))
    rows, scores = [], {}
    for index, (total, tool, failed) in enumerate(values):
        row = trajectory_of(sample_of(0, image), index, image)
        rows.append(dataclasses.replace(row, stop=StopReason.FAILED) if failed else row)
        scores[row.trajectory_id] = {"total": total, "tool": tool}
    chosen = select(rows, scores, count)
    assert len({row.trajectory_id for row, _ in chosen}) == len(chosen) == min(count, len(rows))
    assert chosen == select(rows[::-1], scores, count)
    totals = [total for total, _, failed in values if total is not None and not failed]
    for row, why in chosen:
        total = scores[row.trajectory_id]["total"]
        assert why != "best" or total == max(totals)
        assert why != "worst" or len(totals) < 2 or total == min(totals)


def test_box_frames_what_was_taken():
    image = Image.new("RGB", (100, 80))
    framed = with_box(image, (20, 30, 40, 50))
    assert framed.crop((20, 30, 40, 50)).tobytes() == image.crop((20, 30, 40, 50)).tobytes(), "outside, not over it"
    assert [framed.getpixel((18, y)) for y in (29, 40)] == [(255, 0, 0)] * 2 and image.getbbox() is None


def test_zoom_and_failed_trajectories_can_be_shown():
    photo = picture(1)
    sample = sample_of(0, photo)
    row = trajectory_of(sample, 0, photo)
    zoom = Turn(
        "<tool>",
        TurnKind.TOOL,
        "zoom_image",
        '{"factor": 2, "center_x": 0, "center_y": 0}',
        CallStatus.OK,
        None,
        0,
        pixel_hash(photo),
        None,
        5,
    )
    wrong = Turn("<tool>", TurnKind.TOOL, "crop_image", None, CallStatus.ERROR, "x is missing", tokens=5)
    shown = conversation(dataclasses.replace(row, turns=(zoom, wrong)), sample, lambda _: photo, "Be brief.")
    assert [part["type"] for part in shown[4]["content"]] == ["text", "image_url"] * 2
    assert shown[-1]["content"] == "x is missing" and shown[0]["role"] == "system"
    failed = dataclasses.replace(row, turns=(), stop=StopReason.FAILED, error="engine gone")
    assert [message["role"] for message in conversation(failed, sample, lambda _: photo, None)] == ["user"]


def test_records_survive_the_disk(store, caplog):
    record = LoopRecord("abc", {"mix": {}}, "a name")
    dataset, *_ = make_dataset(store)
    record.add(3, {"prepare": dataset}, {"reward/total": 0.5, "eval/accuracy": None})
    record.add(1, {"prepare": dataset.reference}, {})
    save_record(store, record)
    assert load_record(store, "abc") == record and [i.step for i in record.iterations] == [1, 3]
    assert record.iteration(3).metrics == {"reward/total": 0.5} | headline(dataset)
    (store.root / "loops/torn.json").write_text('{"format": 1, ')
    with pytest.raises(UserError, match=r"torn\.json is no loop record"):
        load_record(store, "torn")
    assert [r.loop_id for r in records(store)] == ["abc"] and "torn" in caplog.text


def test_interrupted_sync_goes_on(store, monkeypatch):
    """Stopped at any call to MLflow, the next sync ends where an undisturbed one would."""
    from mlflow import MlflowClient

    tracker = run_loop(store, settings(store, traces=1, enabled=False), iterations=1)
    writes = (
        "create_run",
        "log_batch",
        "log_inputs",
        "log_dict",
        "set_terminated",
        "create_model_version",
        "set_registered_model_alias",
    )
    calls = Counter()

    def limited(name):
        original = getattr(MlflowClient, name)

        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] < 0:
                raise ConnectionError("gone")
            return original(*args, **kwargs)

        monkeypatch.setattr(MlflowClient, name, call)

    for name in writes:
        limited(name)
    interruptions, report = 0, None
    for limit in range(0, 99, 4):  # further each time, and over what the one before has left half done
        calls["left"] = limit
        try:
            report = sync(store)
            break
        except ConnectionError:
            interruptions += 1
    calls["left"] = 99
    assert interruptions > 3 and dataclasses.astuple(sync(store)) == (0,) * 5, report
    found, models = contents(store)
    run = found[tracker.record.loop_id]
    assert run["status"] == "FINISHED" and set(run["points"].values()) == {1} == set(run["traces"].values())
    assert run["files"] == ["artifacts.json", "config.json", "summary.json"]
    assert len(found) == 1 + len(list(store.list()))
    assert all(run["status"] == "FINISHED" and run["inputs"] for key, run in found.items() if "dataset" not in key)
    assert sum(models["thinkimg-development"][1].values()) == 2
