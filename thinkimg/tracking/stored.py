"""What traces need, read back from the artifacts of an iteration."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from thinkimg.records import Sample, Trajectory, from_row
from thinkimg.rewards.mix import Mix
from thinkimg.store.artifacts import Artifact, Store
from thinkimg.store.manifest import DROPPED, MANIFEST, Reference
from thinkimg.tracking.records import LoopRecord

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Stored:
    """The arguments of `log_traces` for one step."""

    trajectories: list[Trajectory]
    images: "Callable[[str], Image]"
    scores: dict[str, dict[str, float | None]]
    samples: dict[str, Sample]
    reasons: dict[tuple[str, str], str]


def sources(record: LoopRecord, step: int) -> list[Reference | None]:
    """The step's rollouts and scores, and the loop's data set."""
    of_step = {reference.kind: reference for reference in record.iteration(step).artifacts.values()}
    dataset = next((reference for _, reference in record.references("dataset")), None)
    return [of_step.get("rollouts"), of_step.get("scores"), dataset]


def has_traces(store: Store, record: LoopRecord, step: int) -> bool:
    """Whether the step has rollouts with scores, and the store (still) all that they refer to."""
    places = [reference and reference.attempt and store.root / str(reference) for reference in sources(record, step)]
    return all(place and (place / MANIFEST).is_file() and not place.with_suffix(DROPPED).exists() for place in places)


def stored(store: Store, record: LoopRecord, step: int) -> Stored:
    """Read a step that `has_traces`."""
    rollouts, scored, dataset = (store.resolve(reference) for reference in sources(record, step))
    trajectories = [from_row(Trajectory, row) for row in rollouts.table("trajectories").to_pylist()]
    wanted = {row.sample_id for row in trajectories}
    samples = {
        row["sample_id"]: from_row(Sample, row)
        for batch in dataset.batches("samples")
        for row in batch.to_pylist()
        if row["sample_id"] in wanted
    }
    scores, reasons = read_scores(scored, Mix.of(record.config))
    return Stored(trajectories, image_reader(rollouts, dataset), scores, samples, reasons)


def read_scores(artifact: Artifact, mix: Mix) -> tuple[dict, dict]:
    """Trajectory id -> component -> value, with the `total` of the mix; (trajectory id, component) -> reason."""
    import numpy as np

    rows = artifact.table("scores").to_pylist()
    components = [name for name, value in rows[0].items() if isinstance(value, dict)] if rows else []
    values = {
        name: np.array([np.nan if row[name]["value"] is None else row[name]["value"] for row in rows])
        for name in components
    }
    totals = mix.totals(values, np.array([row["group_id"] for row in rows])) if rows else []
    scores = {
        row["trajectory_id"]: {"total": float(total)} | {name: row[name]["value"] for name in components}
        for row, total in zip(rows, totals, strict=True)
    }
    reasons = {(row["trajectory_id"], name): explain(row[name]) for row in rows for name in components}
    return scores, {key: text for key, text in reasons.items() if text}


def explain(score: dict[str, str | None]) -> str:
    """Why a score is what it is: its reason, and its evidence in readable JSON."""
    evidence = json.dumps(json.loads(score["evidence"]), ensure_ascii=False) if score["evidence"] else None
    return "; ".join(filter(None, (score["reason"], evidence)))[:2000]


def image_reader(*artifacts: Artifact) -> "Callable[[str], Image]":
    """Pixel hash -> image, from the `images` tables of artifacts; reads only the row group that holds it."""
    import pyarrow.parquet as pq

    from thinkimg.images.decode import decode

    places: dict[str, tuple] = {}
    tables = [artifact for artifact in artifacts if any(name.startswith("images") for name in artifact.files)]
    for path in (path for artifact in tables for path in artifact.table_files("images")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for row, value in enumerate(file.read_row_group(group, ["sha256"])["sha256"].to_pylist()):
                    places.setdefault(value, (path, group, row))

    @lru_cache(maxsize=32)  # the trajectories of a group share their images
    def image(sha256: str) -> "Image":
        path, group, row = places[sha256]
        with pq.ParquetFile(path) as file:
            return decode(file.read_row_group(group, ["data"])["data"][row].as_py())

    return image
