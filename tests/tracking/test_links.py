"""Nothing in MLflow leads to a file that is not there, or to a server that nobody may have started."""

import json
import re
import shutil

import tracking_store
from tracking_store import run_loop, settings

from thinkimg.store.artifacts import Store
from thinkimg.tracking.loop import sync_store
from thinkimg.tracking.relocation import path_of

store = tracking_store.store
ADDRESS = re.compile(r"\w+://(?!\w+/[0-9a-f]{64})|localhost|127\.0\.0\.1")


def sources(store, connection) -> list[str]:
    return [
        version.source
        for model in connection.client.search_registered_models()
        for version in connection.client.search_model_versions(f"name = '{model.name}'")
    ]


def check_links(store, connection) -> int:
    """Follow all that the runs name; return the number of files and artifacts that were there."""
    client, followed = connection.client, 0
    for experiment in (connection.loops, connection.stages):
        for run in connection.all_runs(experiment):
            for name, text in run.data.tags.items():
                assert not ADDRESS.search(text), (name, text)
            files = {file.path for file in client.list_artifacts(run.info.run_id)}
            listed = {entry["path"] for entry in json.loads(run.data.tags.get("mlflow.loggedArtifacts", "[]"))}
            assert listed <= files, "a table that the run's page names is not there"
            for entry in run.inputs.dataset_inputs:
                uri = json.loads(entry.dataset.source)["uri"]
                assert store.resolve(uri.removeprefix("thinkimg:/")).kind == entry.dataset.name
                followed += 1
            for trace in client.search_traces(locations=[experiment], run_id=run.info.run_id):
                place = path_of(trace.info.tags["mlflow.artifactLocation"])
                assert place and place.is_dir()
                followed += 1
            followed += len(files)
    for source in sources(store, connection):
        path = path_of(source)
        assert path and path.is_dir(), f"a model version leads to {source}"
        followed += 1
    return followed


def test_every_link_of_the_runs_leads_somewhere(store):
    connection = run_loop(store, settings(store)).connection
    assert check_links(store, connection) > 10


def test_a_policy_that_gc_removed_is_no_version_any_more_and_the_others_stay(store):
    tracker = run_loop(store, settings(store))
    before = sources(store, tracker.connection)
    gone = tracker.record.references("policy")[1][1]
    shutil.rmtree(store.root / str(gone))
    with_history = Store(store.root)
    sync_store(with_history)
    left = sources(store, tracker.connection)
    assert len(before) == 3 and left == [source for source in before if gone.fingerprint not in source]
    assert all(path_of(source).is_dir() for source in left)
    sync_store(with_history)
    assert sources(store, tracker.connection) == left, "a second sync brings it back"
