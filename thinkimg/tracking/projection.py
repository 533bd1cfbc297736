"""Projection of records and manifests into MLflow: each function adds what MLflow lacks."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkimg import process
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact, canonical_json
from thinkimg.tracking.connection import Connection
from thinkimg.tracking.records import LoopRecord, headline, milliseconds
from thinkimg.tracking.relocation import is_gone
from thinkimg.tracking.sink import KEY_LENGTH, Point, encode_name, log_entries, valid_tags, valid_text
from thinkimg.tracking.view import offer_view

if TYPE_CHECKING:
    from mlflow.entities import Run

MODEL_NAME_LENGTH = 200
MODEL_NAME_REFUSED = re.compile(r"""[%/:'"`\\\x00-\x1f]""")  # by MLflow, and by the filters of its searches

Points = dict[str, set[tuple[int, float]]]
"""Key of a metric -> (step, value) of the points that MLflow has."""


def input_digest(digest: str) -> str:
    """Return the part of a digest that MLflow stores and `search_runs("dataset.digest = '…'")` finds."""
    return digest[:36]


def flatten(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (names from the root on, text) of every leaf; lists are leaves, as JSON."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, (*above, str(name)))
        else:
            yield (*above, str(name)), value if isinstance(value, str) else json.dumps(value)


def readable_mix(mix: Mapping[str, float]) -> str:
    """Return a mix as in `answer=0.5 format=0.2`."""
    return " ".join(f"{name}={weight:g}" for name, weight in sorted(mix.items()))


def loop_tags(record: LoopRecord) -> dict[str, str | None]:
    """Return the tags of a loop's run, by which runs are searched and compared; None for what can't be known."""
    config, model = record.config, record.config["model"]
    datasets = record.references("dataset")
    return {
        "thinkimg.loop": record.loop_id,
        "dataset": input_digest(datasets[0][1].digest) if datasets else None,
        "base_model": "tiny" if model["tiny"] else "@".join(filter(None, (model["path"], model["revision"]))),
        "mix": readable_mix(config["mix"]),
        "mix_hash": hashlib.sha256(canonical_json(config["mix"]).encode()).hexdigest()[:12],
        "seed": str(config["seed"]),
        "preset": config["preset"],
        "iterations": str(config["iterations"]),
        "git": record.git,
        "mlflow.source.name": "thinkimg",
        "mlflow.source.git.commit": record.git,
        "mlflow.note.content": f"Reward mix: {readable_mix(config['mix'])}. Step 0 is before training. "
        "Between mixes, compare `eval/*` and single components; `reward/total` depends on the mix. "
        "All rollouts of a step: `thinkimg view`, then its rollouts or scores in artifacts.json. "
        "One of them: `thinkimg explain`, then the tag `trajectory` of its trace.",
    }


@dataclass
class LoopRun:
    """MLflow run of a loop, and its points that MLflow has."""

    run_id: str
    points: Points


def open_run(connection: Connection, record: LoopRecord) -> LoopRun:
    """Return the loop's run, created if there is none."""
    client, run = connection.client, connection.find_run(connection.loops, "thinkimg.loop", record.loop_id)
    if run is None:
        tags, name = valid_tags(loop_tags(record)), valid_text(record.name, KEY_LENGTH)
        run = client.create_run(connection.loops, milliseconds(record.started), tags, name)
        return LoopRun(run.info.run_id, {})
    points: Points = {}
    for key in run.data.metrics:
        if key.startswith("system/"):  # MLflow's own
            continue
        points[key] = {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)}
    return LoopRun(run.info.run_id, points)


def project_loop(connection: Connection, record: LoopRecord, loop: LoopRun) -> int:
    """Add tags, parameters, data set, points, tables and status, and return the number of points that were missing."""
    client, run = connection.client, connection.client.get_run(loop.run_id)
    set_tags(connection, run, loop_tags(record))
    # These may change within a loop, and MLflow's parameters can't: config.json has them.
    changing = ("iterations", "where", "on_alarm")
    identity = {name: value for name, value in record.config.items() if name not in changing}
    add_params(connection, run, identity)
    datasets = record.references("dataset")
    if datasets:
        add_inputs(connection, run, {"dataset": datasets[0][1]})
    missing = missing_points(record, loop.points)
    log_entries(connection, loop.run_id, metrics=missing)
    if not {encode_name(name) for name, *_ in missing} <= set(loop.points):
        offer_view(connection, {encode_name(name) for name, *_ in missing})
    for name, value, _, step in missing:
        loop.points.setdefault(encode_name(name), set()).add((step, value))
    log_files(connection, run, record)
    if run.info.status != record.status:
        if record.status == "RUNNING":
            client.update_run(loop.run_id, status=record.status)
        else:
            client.set_terminated(loop.run_id, record.status, milliseconds(record.finished or record.started))
    return len(missing)


def missing_points(record: LoopRecord, points: Points) -> list[Point]:
    """Return the record's points that MLflow lacks; a corrected value becomes a second point."""
    return [
        (name, value, milliseconds(iteration.time), iteration.step)
        for iteration in record.iterations
        for name, value in iteration.metrics.items()
        if (iteration.step, value) not in points.get(encode_name(name), ())
    ]


def set_tags(connection: Connection, run: "Run", tags: Mapping[str, str | None]) -> None:
    """Set the tags that differ; one that can't be known stays as it is."""
    have = run.data.tags
    changed = {name: value for name, value in tags.items() if not valid_tags({name: value}).items() <= have.items()}
    if changed:
        log_entries(connection, run.info.run_id, tags=changed)


def add_params(connection: Connection, run: "Run", tree: Mapping[str, Any]) -> None:
    missing = {parts: text for parts, text in flatten(tree) if encode_name(*parts) not in run.data.params}
    if missing:
        log_entries(connection, run.info.run_id, params=missing)


def add_inputs(connection: Connection, run: "Run", inputs: Mapping[str, Any]) -> None:
    """Add what the run consumed as its datasets. inputs: name, which MLflow shows as context -> reference."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    have = {(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs}
    missing = []
    for name, reference in inputs.items():
        if (reference.kind, input_digest(reference.digest)) not in have:
            source = json.dumps({"uri": f"thinkimg:/{reference}"})  # without the store's place, which may change
            dataset = Dataset(reference.kind, input_digest(reference.digest), "local", source)
            missing.append(DatasetInput(dataset, [InputTag("mlflow.data.context", name)]))
    if missing:
        connection.client.log_inputs(run.info.run_id, missing)


def log_files(connection: Connection, run: "Run", record: LoopRecord) -> None:
    """Log config.json, the artifacts of each step, and the loop's tables, if something changed."""
    artifacts = [
        {"step": iteration.step, "stage": stage, "artifact": str(reference), "digest": reference.digest}
        for iteration in record.iterations
        for stage, reference in iteration.artifacts.items()
    ]
    tables = {"artifacts": artifacts, **record.tables}
    digest = hashlib.sha256(canonical_json([record.config, tables]).encode()).hexdigest()[:16]
    if run.data.tags.get("thinkimg.store.files") == digest:
        return
    with process.scratch() as folder:  # ends with us; the one of MLflow's log_dict survives a SIGKILL
        (folder / "config.json").write_text(json.dumps(record.config))
        for name, rows in tables.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            data = [[row.get(column) for column in columns] for row in rows]
            (folder / f"{name}.json").write_text(json.dumps({"columns": columns, "data": data}))
        connection.client.log_artifacts(run.info.run_id, str(folder))
    # The tag by which MLflow's UI shows these files as tables. Its own log_table appends, where this replaces.
    listed = json.dumps([{"path": f"{name}.json", "type": "table"} for name in tables])
    set_tags(connection, run, {"mlflow.loggedArtifacts": listed, "thinkimg.store.files": digest})


def project_stage(connection: Connection, artifact: Artifact) -> bool:
    """Add the run of a stage, and tell whether something was missing."""
    client, manifest = connection.client, artifact.manifest
    name, end = str(artifact.reference), milliseconds(manifest["finished"])
    run = connection.find_run(connection.stages, "thinkimg.artifact", name)
    if run and run.info.status == "FINISHED":  # which is logged last
        return False
    tags = {
        "thinkimg.artifact": name,
        "thinkimg.digest": artifact.digest,
        "kind": artifact.kind,
        "stage": manifest["recipe"]["stage"],
        "attempt": artifact.attempt,
        "seed": json.dumps(manifest["seed"]),
        "family": artifact.family,
        "git": manifest["git"],
        "host": manifest["host"]["hostname"],
        "mlflow.source.name": "thinkimg",
        "mlflow.source.git.commit": manifest["git"],
    }
    if run is None:
        title = f"{manifest['recipe']['stage']} {artifact.short}"
        run = client.create_run(connection.stages, milliseconds(manifest["started"]), valid_tags(tags), title)
    add_params(connection, run, manifest["recipe"]["config"])
    add_inputs(connection, run, artifact.inputs)
    metrics = {name: value for name, value in headline(artifact).items() if encode_name(name) not in run.data.metrics}
    log_entries(connection, run.info.run_id, metrics=[(name, value, end, 0) for name, value in metrics.items()])
    client.set_terminated(run.info.run_id, "FINISHED", end)
    return True


def model_name(record: LoopRecord) -> str:
    """Return the name of the registered model, after the preset or its file."""
    stem = MODEL_NAME_REFUSED.sub(lambda match: f"%{ord(match[0]):02x}", Path(record.config["preset"]).stem)
    if len(stem) > MODEL_NAME_LENGTH:
        stem = f"{stem[: MODEL_NAME_LENGTH - 9]}-{hashlib.sha256(stem.encode()).hexdigest()[:8]}"
    return f"thinkimg-{stem}"


def project_policies(connection: Connection, store: Store, record: LoopRecord, run_id: str) -> int:
    """Add a model version per policy, put the alias `current` on the newest of any loop, and count the added ones.

    Versions whose policies are no longer in the store are deleted.
    """
    from mlflow.exceptions import MlflowException

    client, name = connection.client, model_name(record)
    remove_dead_versions(connection, store, record)
    policies = {
        reference.digest: (step, reference)
        for step, reference in reversed(record.references("policy"))
        if reference.attempt and (store.root / str(reference)).is_dir()
    }
    if not policies:
        return 0
    try:
        description = f"Policies trained with the preset {record.config['preset']}."
        client.create_registered_model(name, description=valid_text(description))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    existing = {version.tags.get("thinkimg.digest") for version in client.search_model_versions(f"name = '{name}'")}
    missing = {digest: entry for digest, entry in policies.items() if digest not in existing}
    for digest, (step, reference) in sorted(missing.items(), key=lambda item: item[1][0]):
        artifact = store.resolve(reference)
        # A server refuses paths of this disk, but accepts an unknown scheme.
        source = f"thinkimg:/{reference}" if connection.served else str(artifact.directory.resolve())
        tags = {
            "thinkimg.digest": digest,
            "thinkimg.artifact": str(reference),
            "thinkimg.loop": record.loop_id,
            "step": str(step),
            "mix": readable_mix(record.config["mix"]),
            "finished": artifact.manifest["finished"],
        }
        client.create_model_version(name, source, run_id, valid_tags(tags))
    versions = client.search_model_versions(f"name = '{name}'")
    newest = max(versions, key=lambda version: (version.tags.get("finished", ""), int(version.version)))
    if client.get_registered_model(name).aliases.get("current") != newest.version:
        client.set_registered_model_alias(name, "current", newest.version)
    return len(missing)


def remove_dead_versions(connection: Connection, store: Store, record: LoopRecord) -> None:
    """Delete the loop's model versions whose policies `gc` removed: their sources lead nowhere."""
    client = connection.client
    for version in client.search_model_versions(f"name = '{model_name(record)}'"):
        reference = version.tags.get("thinkimg.artifact")
        if version.tags.get("thinkimg.loop") == record.loop_id and reference and is_gone(store.root / reference):
            client.delete_model_version(version.name, version.version)
