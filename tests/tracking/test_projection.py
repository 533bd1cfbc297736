"""The projection into a real MLflow on sqlite: nothing is lost over an outage, and nothing doubles."""

import dataclasses
import json
import logging
import math
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import tracking_store
from hypothesis import given
from hypothesis import strategies as st
from tracking_store import MIXES, contents, run_loop, settings

from thinkimg.tracking.connection import Connection, load_mlflow
from thinkimg.tracking.loop import log_stage, open_loop, sync_store, ui_command
from thinkimg.tracking.projection import flatten, input_digest
from thinkimg.tracking.records import loop_id
from thinkimg.tracking.settings import TrackingConfig

store = tracking_store.store


def test_two_mixes_outage_and_sync(store, caplog):
    """Two mixes of the same rollouts are two runs with the same keys; after a loss of everything sync restores it all,
    and a second sync adds nothing."""
    trackers = [run_loop(store, settings(store, mix)) for mix in MIXES]
    log_stage(next(store.list("dataset")), store, TrackingConfig())
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
    assert [run["name"].rpartition(" ")[0] for run in runs] == [
        "answer=0.5 format=0.2 tool=0.3 seed=7",
        "answer=1 seed=7",
    ]
    stages = {key: run["name"] for key, run in before.items() if "/" in key}
    assert all(name == f"{before[key]['tags']['stage']} {key.split('/')[1][:12]}" for key, name in stages.items())
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

    report = sync_store(store)
    assert dataclasses.astuple(report) == (0,) * 5
    assert contents(store) == (before, models)

    (store.root / "mlflow.db").unlink()
    shutil.rmtree(store.root / "mlartifacts")
    # Two processes at once that also have to make a new database: without a lock both crash, or everything doubles.
    program = (
        "import sys; from dataclasses import astuple; from thinkimg.store.artifacts import Store; "
        "from thinkimg.tracking.loop import sync_store; print(*astuple(sync_store(Store(sys.argv[1]))))"
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
    report = sync_store(store)
    assert (report.loops, report.traces, report.policies) == (1, 3, 2) and report.stages == len(list(store.list()))
    assert contents(store)[0][tracker.record.loop_id]["status"] == "FINISHED"


def test_who_consumed(store):
    """The search that an auditor makes: which runs consumed an artifact."""
    run_loop(store, settings(store, traces=0), iterations=1)
    sync_store(store)
    connection = Connection(store.root, TrackingConfig())
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
    assert dataclasses.astuple(sync_store(store))[2] == 0


def test_the_machine_is_watched_while_the_loop_runs(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    wanted = {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"}
    for _ in range(2):  # a loop that is continued adds to the same story
        with open_loop(settings(store), store) as tracker:
            client, run, last = tracker.connection.client, tracker._run.run_id, time.monotonic() + 60
            while not wanted <= set(client.get_run(run).data.metrics):
                assert time.monotonic() < last
        assert client.get_run(run).info.status == "FINISHED" and "SystemMetricsMonitor" not in threads()
    steps = [point.step for point in client.get_metric_history(run, "system/cpu_utilization_percentage")]
    assert steps == list(range(len(steps))) and len(steps) >= 1
    assert dataclasses.astuple(sync_store(store))[2] == 0


def threads():
    return [thread.name for thread in threading.enumerate()]


def test_mlflow_is_imported_late_and_says_nothing_home():
    program = (
        "import sys, thinkimg.tracking; assert 'mlflow' not in sys.modules; "
        "from thinkimg.tracking.connection import load_mlflow; load_mlflow(); "
        "from mlflow.telemetry.utils import is_telemetry_disabled; assert is_telemetry_disabled()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_ui_command(store):
    where = settings(store).where
    command = ui_command(where.store, where.tracking)
    assert "--port 5000" in command and "--port 5001" in ui_command(where.store, where.tracking, 5001)
    assert "--host 127.0.0.1" in command and f"sqlite:///{store.root}/mlflow.db" in shlex.split(command)
    there = settings(store, uri="https://tracking.example").where
    assert "https://tracking.example" in ui_command(there.store, there.tracking)


@given(st.dictionaries(st.text("abc.", min_size=1), st.none() | st.integers() | st.text() | st.lists(st.text())))
def test_the_leaves_of_a_tree_are_its_parameters(tree):
    leaves = dict(flatten({"outer": tree, "inner": {"a": {"b": "x"}}}))
    assert leaves.pop(("inner", "a", "b")) == "x"
    expected = {("outer", name): value for name, value in tree.items()} if tree else {("outer",): {}}
    assert leaves == {
        parts: value if isinstance(value, str) else json.dumps(value) for parts, value in expected.items()
    }
