"""Turn a source of questions and pictures into a data set."""

import json
import logging
import math
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from thinkimg import records
from thinkimg.config.tree import Config
from thinkimg.conversation.episode import render_system_prompt
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.data import split
from thinkimg.data.settings import DataConfig, RowsConfig
from thinkimg.data.source import Source, open_source
from thinkimg.data.sources import puzzles as puzzle_source
from thinkimg.data.survey.advice import state_refused
from thinkimg.data.survey.benchmarks import find_shared, prints_table
from thinkimg.data.survey.oddity import Level
from thinkimg.data.survey.passes import CHANGED, map_in_order
from thinkimg.data.survey.survey import SampleJob, Survey, make_row_jobs, survey
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.images.settings import ViewLimits
from thinkimg.images.view import view_size
from thinkimg.models.askable import AskSettings, find_unaskable
from thinkimg.puzzles.geometry import LEAST_SIDE, Geometry
from thinkimg.puzzles.samples import make_puzzle_jobs
from thinkimg.records import AnswerType, to_row
from thinkimg.rewards.sentences import explain_unjudged
from thinkimg.stages.stage import Job, Slice, Stage
from thinkimg.store.artifacts import Store, Work
from thinkimg.store.image_table import image_writer
from thinkimg.store.kinds import Dataset
from thinkimg.store.manifest import Reference

log = logging.getLogger(__name__)

PHOTOGRAPHS = ("scikit-image", "scikit-learn", "matplotlib")  # packages that ship the puzzles' photographs
SAMPLES_PER_PART = 512
PUZZLES_FOR_PAIRS = 600  # where puzzles are made for pairs alone, beside a user's data


class PrepareSettings(Slice):
    """Slice of `prepare`. The paths of a user's files do not enter the fingerprint, their content does."""

    data: DataConfig
    max_bytes: int
    max_decoded_pixels: int
    source: tuple[str, str] | None = Field(exclude=True)
    """Name and digest of the data in `data.path`; None for the built-in puzzles."""
    schemas: tuple[tuple[str, str, str], ...] = Field(default=(), exclude=True)
    """(table, schema, version) of the source's tables."""
    asked: AskSettings | None = Field(default=None, exclude=True)
    """Limits of what can be asked; None for the built-in puzzles, which fit."""
    judge: str | None = Field(default=None, exclude=True)
    """Model that compares answers with sentences, to warn where there is none."""
    token_side: int | None = None
    """Pixels of a token's side, from which the sizes of the built-in puzzles follow; None for a user's data."""

    @property
    def seed(self) -> int:
        """Seed of the data set, for its manifest."""
        return self.data.seed

    @property
    def limits(self) -> ImageLimits:
        """Limits of the images that are accepted."""
        return ImageLimits(max_bytes=self.max_bytes, max_pixels=self.max_decoded_pixels)

    def fingerprinted(self) -> dict[str, Any]:
        if self.source is None:
            return {"data": self.data.model_dump(mode="json"), "token_side": self.token_side}
        return {
            "data": self.data.model_dump(mode="json", exclude={"path", "images"})
            | {"name": self.source[0], "schemas": [list(schema) for schema in self.schemas]},
            "images": {"max_bytes": self.max_bytes, "max_decoded_pixels": self.max_decoded_pixels},
            "asked": self.asked and self.asked.fingerprinted(),
        }


def settings_of(config: Config) -> PrepareSettings:
    """Return the slice of the config. Raises UserError where the source can't be read."""
    images = config.images
    settings = PrepareSettings(
        data=config.data,
        max_bytes=images.max_bytes,
        max_decoded_pixels=images.max_decoded_pixels,
        source=None,
        family=config.family().name,
    )
    if config.data.source == "puzzles":
        geometry = fit_puzzles(config)
        require_view(geometry, config.view())
        return settings.model_copy(update={"token_side": geometry.token_side})
    source = open_source(config.data, settings.limits)
    opened = {"source": (source.name, source.digest), "schemas": source.schemas}
    judged = {"asked": ask_settings(config), "judge": config.rewards.answer.judge}
    return settings.model_copy(update=opened | judged)


def fit_puzzles(config: Config) -> Geometry:
    """Return the sizes of the puzzles that fit the model's tokens. Raises UserError where these are too small."""
    side = config.view().token_side
    if side < LEAST_SIDE:
        raise UserError(
            f"The built-in puzzles need image tokens of {LEAST_SIDE} pixels or more; the model's have {side}.",
            hint="Name your own data with data.source and data.path, and take judges that need no puzzles.",
        )
    return Geometry(side)


def require_view(geometry: Geometry, view: ViewLimits) -> None:
    """Raise UserError where a puzzle's picture is not seen at the size at which it is a puzzle."""
    if view_size(geometry.size, geometry.size, view) == (geometry.view, geometry.view):
        return
    limits = geometry.limits
    raise UserError(
        f"The built-in puzzles are made to be seen at {geometry.view} x {geometry.view} pixels.",
        hint="Name your own data with data.source and data.path, or set "
        f"images.min_pixels={limits.min_pixels} and images.max_pixels={limits.max_pixels}.",
    )


def ask_settings(config: Config) -> AskSettings:
    """Return the part of the slice on which it depends whether a question can be asked."""
    model, checkpoint, talk = config.model, config.warmstart.checkpoint, config.talk()
    system = render_system_prompt(talk)  # a tool whose code changes and not its description changes no prompt
    return AskSettings(
        conversation=ConversationConfig(
            system=system,
            max_images=talk.max_images,
            max_tokens=talk.max_tokens,
            coordinates=talk.coordinates,
            thinking=talk.thinking,
        ),
        images=config.view(),
        tiny=None if checkpoint else model.tiny,
        start=checkpoint or model.path,
        revision=None if checkpoint else model.revision,
    )


def puzzle_settings(config: Config) -> PrepareSettings:
    """Return the slice for the built-in puzzles, from which judges of any data learn."""
    if config.data.source == "puzzles":
        return settings_of(config)
    data, images = DataConfig(seed=config.data.seed, train=PUZZLES_FOR_PAIRS), config.images
    return PrepareSettings(
        data=data,
        max_bytes=images.max_bytes,
        max_decoded_pixels=images.max_decoded_pixels,
        source=None,
        token_side=fit_puzzles(config).token_side,
    )


def run(job: Job[PrepareSettings]) -> None:
    """Write the content: samples-*.parquet, images-*.parquet, refused.parquet (where, reason, detail), summary.json.

    A benchmark has prints.parquet, too, by which its pictures are found again in data for training. Progress counts
    stored samples. Raises UserError where too many rows of the source are refused, where a check asks for a setting, or
    where the rows can't be split.
    """
    settings, workers = job.settings, job.resources.where.workers
    source = None if settings.source is None else open_source(settings.data, settings.limits)
    if source is not None and (source.name, source.digest) != settings.source:
        raise UserError("The data changed after the settings were read.", hint=CHANGED)
    job.work.where["path"] = getattr(settings.data, "path", None)
    with ThreadPoolExecutor(workers, "prepare") as pool:
        if source is None:
            data = settings.data
            assert isinstance(data, puzzle_source.Settings) and settings.token_side is not None
            jobs = make_puzzle_jobs(data, Geometry(settings.token_side))
            write_dataset(job, jobs, data.train + data.held_out, None, pool)
            return
        surveyed = survey_source(settings, source, pool, 2 * workers)
        warn_of_benchmarks(job.store, surveyed)
        write_dataset(job, make_row_jobs(source, surveyed.taken, settings.limits), len(surveyed.taken), surveyed, pool)


def survey_source(settings: PrepareSettings, source: Source, pool: Executor, window: int) -> Survey:
    """Survey a source, and tell what stands out. window: rows that `pool` works on ahead."""
    assert isinstance(settings.data, RowsConfig) and settings.asked is not None, "a source of rows"
    # A resumed run surveys again: a stored survey would be no smaller than the source's texts.
    unaskable = partial(find_unaskable, settings.asked)
    surveyed = survey(source, settings.data, settings.limits, pool, window, unaskable)
    for oddity in surveyed.oddities:
        if oddity.level is Level.WARN:
            log.warning("%s", oddity.sentence)
    types = Counter(taken.sample.answer_type for taken in surveyed.taken.values())
    if unjudged := explain_unjudged(types[AnswerType.JUDGE], types.total(), settings.judge):
        log.warning("%s", unjudged)
    if surveyed.refused:
        log.warning("%s", state_refused(surveyed.refused, surveyed.accepted + len(surveyed.refused)))
    return surveyed


def warn_of_benchmarks(store: Store, surveyed: Survey) -> None:
    """Warn of pictures for training that are also those of a benchmark in the store.

    They are not left out: what a data set holds depends on its recipe alone, and not on what else was prepared.
    """
    train = [taken for taken in surveyed.taken.values() if taken.sample.split == split.TRAIN]
    for reference, count in find_shared(store, train):
        log.warning("%d samples for training have a picture of the benchmark %s.", count, reference)


def write_dataset(
    job: Job[PrepareSettings], jobs: Iterator[SampleJob], total: int, surveyed: Survey | None, pool: Executor
) -> None:
    """Write all parts of a data set. jobs: of `total` samples, in order. surveyed: None for puzzles."""
    work, window, data = job.work, 2 * job.resources.where.workers, job.settings.data
    chunks = math.ceil(total / SAMPLES_PER_PART)
    stored: set[str] = set()
    for number in range(chunks):
        write_chunk(work, number, islice(jobs, SAMPLES_PER_PART), stored, pool, window)
        job.progress(min((number + 1) * SAMPLES_PER_PART, total), total)
    if not work.has("refused.parquet"):
        work.table("refused.parquet", refused_table(surveyed))
    is_benchmark = isinstance(data, RowsConfig) and data.role == "benchmark"
    if surveyed and is_benchmark and not work.has("prints.parquet"):
        work.table("prints.parquet", prints_table(surveyed.taken.values()))
    summary = summarise_samples(work, chunks, surveyed, len(stored))
    if surveyed and isinstance(data, RowsConfig):
        summary |= {"role": data.role, "schemas": [list(schema) for schema in job.settings.schemas]}
    if not work.has("summary.json"):
        work.json("summary.json", summary)
    work.metrics |= {
        "train": summary["splits"].get("train", 0),
        "held_out": summary["splits"].get("held_out", 0),
        "images": summary["images"],
        "refused": sum(summary["refused"].values()),
    }


def write_chunk(
    work: Work, number: int, jobs: Iterator[SampleJob], stored: set[str], pool: Executor, window: int
) -> None:
    """Write a part of samples, and of their images those that are not in `stored`, to which they are added."""
    images, samples = f"images-{number:05}.parquet", f"samples-{number:05}.parquet"
    if work.has(images):
        stored.update(_column(work.path(images), "sha256"))
        if work.has(samples):
            deque(jobs, maxlen=0)  # skips them
            return
        rows = [to_row(prepared.sample) for prepared in map_in_order(pool, _call, jobs, window)]
    else:
        rows = []
        with work.part(images) as path, image_writer(path) as add:
            for prepared in map_in_order(pool, _call, jobs, window):
                rows.append(to_row(prepared.sample))
                for sha256, data, width, height in prepared.images:
                    if sha256 not in stored:
                        stored.add(sha256)
                        add(sha256, data, width, height)
    work.table(samples, pa.Table.from_pylist(rows, records.sample_schema()))


def refused_table(surveyed: Survey | None) -> pa.Table:
    """Return the table of refused rows."""
    names = ("where", "reason", "detail")
    rows = [{name: str(getattr(row, name)) for name in names} for row in surveyed.refused] if surveyed else []
    return pa.Table.from_pylist(rows, pa.schema([pa.field(name, pa.string(), nullable=False) for name in names]))


def summarise_samples(work: Work, chunks: int, surveyed: Survey | None, images: int) -> dict[str, Any]:
    """Return counts per split, per puzzle family or source, per answer type, per check, and per reason of refusal."""
    splits: Counter[str] = Counter()
    types: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    for number in range(chunks):
        path = work.path(f"samples-{number:05}.parquet")
        for side, source, answer_type, metadata in zip(
            *(_column(path, name) for name in ("split", "source", "answer_type", "metadata")), strict=True
        ):
            splits[side] += 1
            types[answer_type] += 1
            kind = source if surveyed else json.loads(metadata)["family"]
            kinds.setdefault(side, Counter())[kind] += 1
    summary: dict[str, Any] = {
        "splits": splits,
        "families" if surveyed is None else "sources": kinds,
        "images": images,
        "refused": Counter(str(row.reason) for row in surveyed.refused) if surveyed else {},
    }
    if surveyed:
        summary |= {
            "accepted": surveyed.accepted,
            "looked": surveyed.looked,
            "groups": surveyed.groups,
            "types": types,
            "changes": Counter(change for taken in surveyed.taken.values() for change in taken.changes),
            "oddities": {oddity.name: oddity.count for oddity in surveyed.oddities},
        }
    return summary


def _call(job: SampleJob) -> Any:
    return job()


def _column(path: Path, name: str) -> list[str]:
    return pq.ParquetFile(path).read([name]).column(0).to_pylist()


prepare = Stage(
    name="prepare",
    version=6,
    makes=Dataset,
    settings=settings_of,
    run=run,
    packages=lambda settings: ("pillow", "numpy", "pyarrow") + (("tokenizers",) if settings.source else PHOTOGRAPHS),
    outside=lambda settings: {"source": Reference("source", settings.source[1])} if settings.source else {},
)

puzzles = replace(
    prepare,
    label="puzzles",
    settings=puzzle_settings,
    wanted=lambda config: config.has_own_clip and config.data.source != "puzzles",
)
