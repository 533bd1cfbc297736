"""Names and values of a user's go through a whole loop into a real MLflow: valid, reversible, and each for itself."""

import dataclasses
import logging

import numpy as np
import pytest
import tracking_store
from hypothesis import given
from hypothesis import settings as run_with
from hypothesis import strategies as st
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    _validate_metric_name,
    _validate_param_name,
    _validate_tag_name,
)
from tracking_store import settings

from thinkimg.tracking import traces
from thinkimg.tracking.connection import Connection
from thinkimg.tracking.loop import open_loop, sync_store
from thinkimg.tracking.projection import model_name
from thinkimg.tracking.settings import TrackingConfig
from thinkimg.tracking.sink import decode_key, encode_name, log_entries, valid_tags, valid_text

store = tracking_store.store

HOSTILE = [
    "solution", "family", "target", "id", "reward", "answer", "total", "image", "mlflow.runName", "mlflow.user", "a/b",
    "a//b", "/a", "a/", ".", "..", "../a", "./a", "a/./b", "", " ", "\n", "a\nb", "tab\t", "ü", "u\u0308", "é",
    "e\u0301", "日本", "🙂", "x" * 300, "/" * 300, "?" * 300, "ü?" * 200, "__proto__", "a:b", "a::b", ":3a:", "::",
    "a%20b", "'", '"', "`", "; DROP TABLE metrics; --", "%s", "{0}", "\0", "\ud800", "\u202e", "A", "a", "a.b",
    "thinkimg.loop", "NaN", "-",
]  # fmt: skip
TEXTS = [name for name in HOSTILE if not set(name) & {"\0", "\ud800"}]  # that a table can hold
NAMES = st.sampled_from(HOSTILE) | st.text(st.characters(), max_size=300) | st.text("./: a?", max_size=12)


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_a_key_is_valid_and_can_be_turned_back(names):
    for parts in ((names[0],), tuple(names)):
        key = encode_name(*parts)
        assert len(key) <= MAX_ENTITY_KEY_LENGTH
        for validate in (_validate_metric_name, _validate_param_name, _validate_tag_name):
            validate(key)
        if len(key) < MAX_ENTITY_KEY_LENGTH:
            split = [decode_key(part, {}) for part in key.split(".")] if len(parts) > 1 else [decode_key(key, {})]
            assert split == list(parts)


@run_with(max_examples=300)
@given(st.lists(NAMES, unique=True, min_size=2, max_size=12))
def test_no_two_names_have_one_key(names):
    assert len({encode_name(name) for name in names}) == len(names)
    pairs = {(one, other) for one in names for other in names}
    assert len({encode_name(*pair) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize(
    "name", ["reward/total", "eval/detail/accuracy", "time/rollout_s", "parity/kl", "train.loss.beta"]
)
def test_our_own_names_are_keys_as_they_are(name):
    assert encode_name(name) == name and encode_name(*name.split(".")) == name


@given(st.text(st.characters(), max_size=80), st.integers(40, 60))
def test_a_cut_text_says_how_much_is_left_out(text, limit):
    valid = valid_text(text, limit)
    valid.encode()
    assert "\0" not in valid and len(valid) <= limit
    whole = valid_text(text, 10**6)
    if valid != whole:
        kept, _, count = valid.rpartition("… (+")
        assert whole.startswith(kept) and int(count.removesuffix(" characters)")) == len(whole) - len(kept)


def names_of(run, kind):
    return {decode_key(key, run.data.tags) for key in getattr(run.data, kind)}


def test_metrics_parameters_and_tags_of_any_name_arrive(store):
    connection = Connection(store.root, TrackingConfig())
    run_id = connection.client.create_run(connection.loops).info.run_id
    values = {name: float(number) for number, name in enumerate(HOSTILE)}
    log_entries(
        connection, run_id,
        metrics=[(name, value, 1, 0) for name, value in values.items()],
        params={("tree", name): f"{name}{value}" for name, value in values.items()},
        tags={name: name * 100 for name in HOSTILE if not name.startswith("mlflow.")} | {"unknown": None},
    )  # fmt: skip
    run = connection.client.get_run(run_id)
    assert {decode_key(key, run.data.tags): value for key, value in run.data.metrics.items()} == values
    assert len(run.data.params) == len(HOSTILE)
    assert {f"tree.{name}".replace(".", "\0") for name in HOSTILE} >= {
        name.replace(".", "\0") for name in names_of(run, "params")
    }
    assert set(HOSTILE) - {"mlflow.runName", "mlflow.user"} <= names_of(run, "tags")
    assert "unknown" not in run.data.tags


def test_what_mlflow_refuses_costs_itself_alone(store, caplog, monkeypatch):
    """Should a name or value come that no rule foresees."""
    connection = Connection(store.root, TrackingConfig())
    run_id = connection.client.create_run(connection.loops).info.run_id
    monkeypatch.setattr("thinkimg.tracking.sink.REFUSED", __import__("re").compile("(?!)"))
    points = [(f"m{number}" if number % 7 else f"?{number}", 1.0, 1, 0) for number in range(50)]
    with caplog.at_level(logging.WARNING):
        log_entries(connection, run_id, metrics=points)
    arrived = connection.client.get_run(run_id).data.metrics
    assert set(arrived) == {name for name, *_ in points if not name.startswith("?")}
    assert len([line for line in caplog.messages if "MLflow refuses metrics of ?" in line]) == 8


def test_a_number_that_is_none_stops_nothing():
    from thinkimg.store.manifest import json_number
    from thinkimg.tracking.records import finite

    odd = {"a": 10**400, "b": float("nan"), "c": -float("inf"), "d": None, "e": np.float32(0.5), "f": True, "g": 7}
    assert finite(odd) == {"e": 0.5, "f": 1.0, "g": 7.0}
    assert {name: json_number(value) for name, value in odd.items()} == {
        "a": None, "b": None, "c": None, "d": None, "e": 0.5, "f": True, "g": 7,
    }  # fmt: skip


PRESETS = ["o'brien", "a:b", "x" * 250, "ü 日", "%41", 'q"`', "back\\slash", "new\nline", "--", "a=b OR 1=1"]


def test_a_loop_full_of_hostile_names_is_projected_and_a_second_sync_adds_nothing(store, monkeypatch, caplog):
    """Columns, ids, labels and components of a user's; afterwards everything is there under its own name."""
    components = ["ü", "x" * 300, "mlflow_runName", "__proto__", "solution", "reward"]  # identifiers, as functions are
    monkeypatch.setattr(tracking_store, "COMPONENTS", (*tracking_store.COMPONENTS, *components))
    known = tracking_store.value_of
    monkeypatch.setattr(tracking_store, "value_of", lambda row, name: 0.25 if name in components else known(row, name))
    ids = ["x" * 9000 + "'/../", "\n'%"]
    sample_of = tracking_store.sample_of

    def hostile(number, image):
        one = sample_of(number, image)
        text = "".join(TEXTS)
        return dataclasses.replace(
            one, sample_id=ids[number], question=text, answers=(text, "\n"),
            columns={name: name[:9] for name in TEXTS},
        )  # fmt: skip

    monkeypatch.setattr(tracking_store, "sample_of", hostile)
    config = settings(store, mix={"format": 0.2, "x" * 300: 0.3, "ü": 0.5}).model_copy(
        update={"preset": "/tmp/a:b'c/o'brien:x.yaml"}
    )
    tracking_store.run_loop(store, config, iterations=1)
    odd = {f"train/{name}": 0.5 for name in HOSTILE}
    with open_loop(config, store) as tracker:
        tracker.log_iteration(1, odd)
    assert not [line for line in caplog.messages if "MLflow" in line], caplog.messages
    assert dataclasses.astuple(sync_store(store)) == (0,) * 5
    found, models = tracking_store.contents(store)
    connection = Connection(store.root, TrackingConfig())
    run = connection.find_run(connection.loops, "thinkimg.loop", tracker.record.loop_id)
    names = names_of(run, "metrics")
    assert odd.keys() <= names and {f"reward/{name}" for name in components} <= names
    feedback = {name for _, _, _, values in found[tracker.record.loop_id]["traces"] for name, _ in values}
    assert {encode_name(name) for name in components} <= feedback
    assert list(models) == [model_name(tracker.record)]
    assert run.data.tags["mlflow.runName"] == valid_text(tracker.record.name, 250), (
        "no name of a user's is one of MLflow's"
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_of_any_name_has_a_model_of_its_own(store, preset):
    from types import SimpleNamespace

    connection = Connection(store.root, TrackingConfig())
    name = model_name(SimpleNamespace(config={"preset": f"/folder/{preset}.yaml"}))
    connection.client.create_registered_model(name)
    assert [model.name for model in connection.client.search_registered_models(f"name = '{name}'")] == [name]
    assert list(connection.client.search_model_versions(f"name = '{name}'")) == []


def test_an_odd_trajectory_costs_its_own_trace(store, monkeypatch, caplog):
    shown = traces.chat_messages

    def odd(row, *rest):
        if row.trajectory_id.endswith("-0"):
            raise ValueError("no such image")
        return shown(row, *rest)

    monkeypatch.setattr(traces, "chat_messages", odd)
    with caplog.at_level(logging.WARNING):
        tracking_store.run_loop(store, settings(store, traces=99), iterations=1)
    assert "can't be shown: ValueError: no such image" in caplog.text and "did not take" not in caplog.text
    (run,) = (run for run in tracking_store.contents(store)[0].values() if run["traces"])
    kept = [trajectory for trajectory, *_ in run["traces"]]
    assert kept and not any(name.endswith("-0") for name in kept)
    assert dataclasses.astuple(sync_store(store)) == (0,) * 5


def test_a_tag_that_is_too_long_says_how_long_it_was():
    tags = valid_tags({"note": "x" * 9_000, "short": "y", "unknown": None})
    assert len(tags["note"]) <= 5_000 and tags["note"].endswith("characters)")
    assert tags["short"] == "y" and "unknown" not in tags
