"""MLflow that is unusable, breaks, or is stopped half-way; records that are torn: training goes on, sync repairs."""

import dataclasses
import logging
import shutil
from collections import Counter

import pytest
import tracking_store
from tracking_store import contents, make_dataset, run_loop, settings

from thinkimg.errors import UserError
from thinkimg.tracking.loop import open_loop, sync_store
from thinkimg.tracking.records import LoopRecord, headline, load_record, load_records, loop_id, save_record

store = tracking_store.store


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
    report = sync_store(store)
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
    assert [r.loop_id for r in load_records(store)] == ["abc"] and "torn" in caplog.text


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
            report = sync_store(store)
            break
        except ConnectionError:
            interruptions += 1
    calls["left"] = 99
    assert interruptions > 3 and dataclasses.astuple(sync_store(store)) == (0,) * 5, report
    found, models = contents(store)
    run = found[tracker.record.loop_id]
    assert run["status"] == "FINISHED" and set(run["points"].values()) == {1} == set(run["traces"].values())
    assert run["files"] == ["artifacts.json", "config.json", "summary.json"]
    assert len(found) == 1 + len(list(store.list()))
    assert all(run["status"] == "FINISHED" and run["inputs"] for key, run in found.items() if "dataset" not in key)
    assert sum(models["thinkimg-development"][1].values()) == 2
