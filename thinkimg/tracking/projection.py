"""From records and manifests to runs: each function looks up what MLflow has and adds what it lacks."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkimg import process
from thinkimg.store.artifacts import Artifact, Reference, Store
from thinkimg.store.manifest import canonical
from thinkimg.tracking.connection import Connection
from thinkimg.tracking.records import LoopRecord, headline, milliseconds
from thinkimg.tracking.view import offer_view

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

PARAM_LENGTH, PARAMS_PER_BATCH, POINTS_PER_BATCH = 500, 100, 1000

Points = dict[str, set[tuple[int, float]]]
"""Key -> (step, value) of the points that MLflow has."""


def input_digest(digest: str) -> str:
    """As `search_runs("dataset.digest = '…'")` wants it: MLflow holds 36 characters of a digest."""
    return digest[:36]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text of at most PARAM_LENGTH characters) of every leaf; lists are leaves, in JSON."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{key}", text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"


def readable_mix(mix: Mapping[str, float]) -> str:
    return " ".join(f"{name}={weight:g}" for name, weight in sorted(mix.items()))


def loop_tags(record: LoopRecord) -> dict[str, str]:
    """What runs are found and told apart by."""
    config, model = record.config, record.config["model"]
    datasets = record.references("dataset")
    tags = {
        "thinkimg.loop": record.loop_id,
        "dataset": input_digest(datasets[0][1].digest) if datasets else None,
        "base_model": "tiny" if model["tiny"] else "@".join(filter(None, (model["path"], model["revision"]))),
        "mix": readable_mix(config["mix"]),
        "mix_hash": hashlib.sha256(canonical(config["mix"]).encode()).hexdigest()[:12],
        "seed": str(config["seed"]),
        "preset": config["preset"],
        "iterations": str(config["iterations"]),
        "git": record.git,
        "mlflow.source.name": "thinkimg",
        "mlflow.source.git.commit": record.git,
        "mlflow.note.content": f"Reward mix: {readable_mix(config['mix'])}. Step 0 is before training. "
        "`reward/total` is not comparable between mixes; single components and `eval/*` are.",
    }
    return {name: value for name, value in tags.items() if value is not None}


@dataclass
class LoopRun:
    """The run of a loop, and which of its points MLflow has."""

    run_id: str
    points: Points


def open_run(connection: Connection, record: LoopRecord) -> LoopRun:
    """Find the loop's run, or make it."""
    client, run = connection.client, connection.find_run(connection.loops, "thinkimg.loop", record.loop_id)
    if run is None:
        run = client.create_run(connection.loops, milliseconds(record.started), loop_tags(record), record.name)
        return LoopRun(run.info.run_id, {})
    points: Points = {}
    for key in run.data.metrics:
        if key.startswith("system/"):  # MLflow's own
            continue
        points[key] = {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)}
    return LoopRun(run.info.run_id, points)


def project_loop(connection: Connection, record: LoopRecord, loop: LoopRun) -> int:
    """Tags, parameters, data set, points, tables and status; returns how many points were missing."""
    client, run = connection.client, connection.client.get_run(loop.run_id)
    set_tags(connection, run, loop_tags(record))
    # They may change while it is the same loop, and MLflow's parameters never change: see config.json for them.
    changing = ("iterations", "where", "on_alarm")
    identity = {name: value for name, value in record.config.items() if name not in changing}
    add_params(connection, run, identity)
    datasets = record.references("dataset")
    if datasets:
        add_inputs(connection, run, {"dataset": datasets[0][1]})
    missing = missing_points(record, loop.points)
    log_points(connection, loop.run_id, missing)
    if not {point.key for point in missing} <= set(loop.points):
        offer_view(connection, {point.key for point in missing})
    for point in missing:
        loop.points.setdefault(point.key, set()).add((point.step, point.value))
    log_files(connection, run, record)
    if run.info.status != record.status:
        if record.status == "RUNNING":
            client.update_run(loop.run_id, status=record.status)
        else:
            client.set_terminated(loop.run_id, record.status, milliseconds(record.finished or record.started))
    return len(missing)


def missing_points(record: LoopRecord, points: Points) -> "list[Metric]":
    """Points of the record that MLflow lacks; a value that has been corrected since is a point beside the old one."""
    from mlflow.entities import Metric

    return [
        Metric(key, value, milliseconds(iteration.time), iteration.step)
        for iteration in record.iterations
        for key, value in iteration.metrics.items()
        if (iteration.step, value) not in points.get(key, ())
    ]


def log_points(connection: Connection, run_id: str, points: "list[Metric]") -> None:
    for start in range(0, len(points), POINTS_PER_BATCH):
        connection.client.log_batch(run_id, metrics=points[start : start + POINTS_PER_BATCH])


def set_tags(connection: Connection, run: "Run", tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    changed = [RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value]
    if changed:
        connection.client.log_batch(run.info.run_id, tags=changed)


def add_params(connection: Connection, run: "Run", tree: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    missing = [Param(key, value) for key, value in flatten(tree) if key not in run.data.params]
    for start in range(0, len(missing), PARAMS_PER_BATCH):
        connection.client.log_batch(run.info.run_id, params=missing[start : start + PARAMS_PER_BATCH])


def add_inputs(connection: Connection, run: "Run", inputs: Mapping[str, Any]) -> None:
    """Name -> reference of what the run consumed; MLflow shows the name as the input's context."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    have = {(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs}
    missing = []
    for name, reference in inputs.items():
        if (reference.kind, input_digest(reference.digest)) not in have:
            source = json.dumps({"uri": str(connection.root.resolve() / str(reference)) if reference.attempt else ""})
            dataset = Dataset(reference.kind, input_digest(reference.digest), "local", source)
            missing.append(DatasetInput(dataset, [InputTag("mlflow.data.context", name)]))
    if missing:
        connection.client.log_inputs(run.info.run_id, missing)


def log_files(connection: Connection, run: "Run", record: LoopRecord) -> None:
    """config.json, which artifacts each step used, and the loop's tables; written again only if something changed."""
    artifacts = [
        {"step": iteration.step, "stage": stage, "artifact": str(reference), "digest": reference.digest}
        for iteration in record.iterations
        for stage, reference in iteration.artifacts.items()
    ]
    tables = {"artifacts": artifacts, **record.tables}
    digest = hashlib.sha256(canonical([record.config, tables]).encode()).hexdigest()[:16]
    if run.data.tags.get("thinkimg.store.files") == digest:
        return
    with process.scratch() as folder:  # MLflow's log_dict takes one that a SIGKILL leaves behind
        (folder / "config.json").write_text(json.dumps(record.config))
        for name, rows in tables.items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            data = [[row.get(column) for column in columns] for row in rows]
            (folder / f"{name}.json").write_text(json.dumps({"columns": columns, "data": data}))
        connection.client.log_artifacts(run.info.run_id, str(folder))
    # What MLflow's own log_table leaves, which appends where this replaces: the interface shows these files as tables.
    listed = json.dumps([{"path": f"{name}.json", "type": "table"} for name in tables])
    set_tags(connection, run, {"mlflow.loggedArtifacts": listed, "thinkimg.store.files": digest})


def project_stage(connection: Connection, artifact: Artifact) -> bool:
    """The short run of an executed stage; returns whether something was missing."""
    from mlflow.entities import Metric

    client, manifest = connection.client, artifact.manifest
    name, end = str(artifact.reference), milliseconds(manifest["finished"])
    run = connection.find_run(connection.stages, "thinkimg.artifact", name)
    if run and run.info.status == "FINISHED":  # the last thing that is logged
        return False
    tags = {
        "thinkimg.artifact": name,
        "thinkimg.digest": artifact.digest,
        "kind": artifact.kind,
        "stage": manifest["recipe"]["stage"],
        "attempt": artifact.attempt,
        "seed": json.dumps(manifest["seed"]),
        "git": manifest["git"] or "",
        "host": manifest["host"]["hostname"],
        "mlflow.source.name": "thinkimg",
        "mlflow.source.git.commit": manifest["git"] or "",
    }
    if run is None:
        run = client.create_run(
            connection.stages,
            milliseconds(manifest["started"]),
            tags,
            f"{manifest['recipe']['stage']} {artifact.short}",
        )
    add_params(connection, run, manifest["recipe"]["config"])
    add_inputs(connection, run, {name: Reference(**entry) for name, entry in manifest["recipe"]["inputs"].items()})
    log_points(
        connection,
        run.info.run_id,
        [Metric(key, value, end, 0) for key, value in headline(artifact).items() if key not in run.data.metrics],
    )
    client.set_terminated(run.info.run_id, "FINISHED", end)
    return True


def model_name(record: LoopRecord) -> str:
    """Registered models are named after the preset, or after the file that it was read from."""
    return f"thinkimg-{Path(record.config['preset']).stem}"


def project_policies(connection: Connection, store: Store, record: LoopRecord, run_id: str) -> int:
    """One model version per policy of the loop; the alias `current` is on the one that was made last, by any loop."""
    from mlflow.exceptions import MlflowException

    client, name = connection.client, model_name(record)
    policies = {
        reference.digest: (step, reference)
        for step, reference in reversed(record.references("policy"))
        if reference.attempt and (store.root / str(reference)).is_dir()
    }
    if not policies:
        return 0
    try:
        description = f"Policies that were trained with the preset {record.config['preset']}."
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = {version.tags.get("thinkimg.digest") for version in client.search_model_versions(f"name = '{name}'")}
    missing = {digest: entry for digest, entry in policies.items() if digest not in known}
    for digest, (step, reference) in sorted(missing.items(), key=lambda item: item[1][0]):
        artifact = store.resolve(reference)
        # A server refuses paths of this disk, but takes any scheme that it does not know.
        source = f"thinkimg:/{reference}" if connection.served else str(artifact.directory.resolve())
        tags = {
            "thinkimg.digest": digest,
            "thinkimg.artifact": str(reference),
            "thinkimg.loop": record.loop_id,
            "step": str(step),
            "mix": readable_mix(record.config["mix"]),
            "finished": artifact.manifest["finished"],
        }
        client.create_model_version(name, source, run_id, tags)
    versions = client.search_model_versions(f"name = '{name}'")
    newest = max(versions, key=lambda version: (version.tags.get("finished", ""), int(version.version)))
    if client.get_registered_model(name).aliases.get("current") != newest.version:
        client.set_registered_model_alias(name, "current", newest.version)
    return len(missing)
