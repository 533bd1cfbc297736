"""The prepare stage: from puzzles, a folder, JSONL, Parquet or the Hub to samples, images and a list of what was refused."""

import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkimg import records
from thinkimg.config import Config
from thinkimg.data.prepared import Job, Surveyed, in_order, row_jobs, survey
from thinkimg.data.sources import Source, open_source
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.images.view import view_size
from thinkimg.puzzles.samples import puzzle_jobs
from thinkimg.puzzles.scenes import SCALE, SIZE, VIEW
from thinkimg.records import SCHEMA_VERSION, to_row
from thinkimg.store.artifacts import Artifact, Recipe, Reference, Store, Work, package_versions
from thinkimg.store.image_table import image_writer

if TYPE_CHECKING:
    import pyarrow as pa

STAGE, VERSION, KIND = "prepare", 2, "dataset"
CHUNK = 512  # samples per closed part
PUZZLE_FIELDS = {"source", "train", "held_out", "held_out_share", "puzzles", "seed"}
HUB_FIELDS = {"hub_config", "hub_split", "revision"}


def recipe(config: Config, source: Source | None) -> Recipe:
    """source: None for the built-in puzzles. The place of a user's files does not count, their content does."""
    data, packages = config.data, package_versions("pillow", "numpy", "pyarrow")
    if source is None:
        # These packages ship the photographs.
        packages |= package_versions("scikit-image", "scikit-learn", "matplotlib")
        settings: dict[str, Any] = {"data": data.model_dump(mode="json", include=PUZZLE_FIELDS)}
        return Recipe(STAGE, VERSION, SCHEMA_VERSION, settings, packages=packages)
    others = {"puzzles", "path"} | (set() if data.source == "hub" else HUB_FIELDS)
    settings = {
        "data": data.model_dump(mode="json", exclude=others) | {"name": source.name},
        "images": config.images.model_dump(mode="json", include={"max_bytes", "max_decoded_pixels"}),
    }
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION, settings, {"source": Reference("source", source.digest)}, packages=packages
    )


def limits_of(config: Config) -> ImageLimits:
    return ImageLimits(max_bytes=config.images.max_bytes, max_pixels=config.images.max_decoded_pixels)


def source_of(config: Config) -> Source | None:
    """The opened source; None for the built-in puzzles. Raises UserError where it cannot be read."""
    if config.data.source != "puzzles":
        return open_source(config.data, limits_of(config))
    limits = {"min_pixels": config.images.min_pixels, "max_pixels": config.images.max_pixels}
    if view_size(SIZE, SIZE, **limits) != (SIZE // SCALE, SIZE // SCALE):
        hint = f"name your own data with data.source and data.path, or set images.min_pixels={VIEW['min_pixels']} and images.max_pixels={VIEW['max_pixels']}"
        raise UserError(
            f"The built-in puzzles are made to be seen at {SIZE // SCALE} x {SIZE // SCALE} pixels.", hint=hint
        )
    return None


def prepare(
    config: Config, store: Store, *, force: bool = False, progress: Callable[[int, int], None] | None = None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """Make or find the data set of config.data; returns the artifact, and whether it was there.

    Content: samples-*.parquet, images-*.parquet, refused.parquet (where, reason, detail), summary.json.
    progress(done, total) counts stored samples. Raises UserError where the source can't be read, too many of its rows are
    refused, or it can't be split.
    """
    limits, source = limits_of(config), source_of(config)

    def produce(work: Work) -> None:
        with ThreadPoolExecutor(config.where.workers, "prepare") as pool:
            make(work, config, source, limits, pool, progress or (lambda done, total: None))

    where = {"path": config.data.path, "workers": config.where.workers}
    return store.build(KIND, recipe(config, source), produce, seed=config.data.seed, where=where, force=force)


def make(
    work: Work,
    config: Config,
    source: Source | None,
    limits: ImageLimits,
    pool: Executor,
    progress: Callable[[int, int], None],
) -> None:
    window = 2 * config.where.workers
    if source is None:
        surveyed, jobs, total = None, puzzle_jobs(config.data), config.data.train + config.data.held_out
    else:
        # A resumed run surveys again: what it would need of the first survey is no smaller than the source's texts.
        surveyed = survey(source, config.data, limits, pool, window)
        jobs, total = row_jobs(source, surveyed.taken, limits), len(surveyed.taken)
    chunks = math.ceil(total / CHUNK)
    stored: set[str] = set()
    for number in range(chunks):
        write_chunk(work, number, islice(jobs, CHUNK), stored, pool, window)
        progress(min((number + 1) * CHUNK, total), total)
    if not work.has("refused.parquet"):
        work.table("refused.parquet", refused_table(surveyed))
    summary = summarise(work, chunks, surveyed, len(stored))
    if not work.has("summary.json"):
        work.json("summary.json", summary)
    work.metrics |= {
        "train": summary["splits"].get("train", 0),
        "held_out": summary["splits"].get("held_out", 0),
        "images": summary["images"],
        "refused": sum(summary["refused"].values()),
    }


def write_chunk(work: Work, number: int, jobs: Iterator[Job], stored: set[str], pool: Executor, window: int) -> None:
    """Store the samples of `jobs` and those of their images that are not in `stored` yet, which they are added to."""
    import pyarrow as pa

    images, samples = f"images-{number:05}.parquet", f"samples-{number:05}.parquet"
    if work.has(images):
        stored.update(_column(work.path(images), "sha256"))
        if work.has(samples):
            deque(jobs, maxlen=0)  # not one of them is called
            return
        rows = [to_row(prepared.sample) for prepared in in_order(pool, _call, jobs, window)]
    else:
        rows = []
        with work.part(images) as path, image_writer(path) as add:
            for prepared in in_order(pool, _call, jobs, window):
                rows.append(to_row(prepared.sample))
                for sha256, data, width, height in prepared.images:
                    if sha256 not in stored:
                        stored.add(sha256)
                        add(sha256, data, width, height)
    work.table(samples, pa.Table.from_pylist(rows, records.samples()))


def refused_table(surveyed: Surveyed | None) -> "pa.Table":
    import pyarrow as pa

    names = ("where", "reason", "detail")
    rows = [{name: str(getattr(row, name)) for name in names} for row in surveyed.refused] if surveyed else []
    return pa.Table.from_pylist(rows, pa.schema([pa.field(name, pa.string(), nullable=False) for name in names]))


def summarise(work: Work, chunks: int, surveyed: Surveyed | None, images: int) -> dict[str, Any]:
    """Counts per split, per puzzle family or source, and per reason of refusal."""
    splits: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    for number in range(chunks):
        path = work.path(f"samples-{number:05}.parquet")
        for place, source, metadata in zip(
            *(_column(path, name) for name in ("split", "source", "metadata")), strict=True
        ):
            splits[place] += 1
            kind = source if surveyed else json.loads(metadata)["family"]
            kinds.setdefault(place, Counter())[kind] += 1
    summary: dict[str, Any] = {
        "splits": splits,
        "families" if surveyed is None else "sources": kinds,
        "images": images,
        "refused": Counter(str(row.reason) for row in surveyed.refused) if surveyed else {},
    }
    if surveyed:
        summary |= {"accepted": surveyed.accepted, "groups": surveyed.groups}
    return summary


def _call(job: Job) -> Any:
    return job()


def _column(path: Path, name: str) -> list[str]:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read([name]).column(0).to_pylist()
