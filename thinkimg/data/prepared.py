"""Preparation of samples from a source's rows, in two passes, so that memory holds texts and hashes only.

The first pass reads and decodes everything: it finds the rows to refuse and the rows that share an image, and splits.
The second pass stores the images of the rows that were taken.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from thinkimg.data import split
from thinkimg.data.advice import advise
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import RawRow, Reason, Refused, RowRefused, Source
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits, ImageRefused, decode, pixel_hash
from thinkimg.records import Sample
from thinkimg.store.image_table import keep_or_encode

SHOWN = 5  # refused rows in an error


@dataclass(frozen=True)
class Prepared:
    """A sample with its images, (sha256, encoded, width, height) each."""

    sample: Sample
    images: tuple[tuple[str, bytes, int, int], ...]


SampleJob = Callable[[], Prepared]
Size = tuple[int, int]
"""(width, height) in pixels."""
FindUnaskable = Callable[[Sequence[Sample], Mapping[str, Size]], Mapping[str, str]]
"""Function of samples, and of the sizes of images by hash: sample id -> the reason why it can never be asked."""
T = TypeVar("T")
R = TypeVar("R")


def map_in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], window: int) -> Generator[R]:
    """Yield the function's results in order, computed on a pool at most `window` items ahead of the caller."""
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:  # the caller has stopped
            future.cancel()


@dataclass(frozen=True)
class Survey:
    """Result of the first pass over a source."""

    taken: dict[str, Sample]
    """Samples of the data set, by row id."""
    refused: list[Refused]
    accepted: int
    """Number of rows that were not refused."""
    groups: int
    """Number of groups of the accepted rows."""
    advice: tuple[str, ...] = ()
    """Sentences on what looks odd about the accepted rows."""


def survey(
    source: Source,
    data: RowsConfig,
    limits: ImageLimits,
    pool: Executor,
    window: int,
    find_unaskable: FindUnaskable = lambda samples, sizes: {},
) -> Survey:
    """Check every row, split the accepted ones and choose the samples to take.

    find_unaskable: see FindUnaskable. Raises UserError if no row is accepted, if too many are refused, and at the
    first picture that can't be had at the moment.
    """
    samples: list[Sample] = []
    groups: list[str | None] = []
    refused: list[Refused] = []
    seen: set[str] = set()
    sizes: dict[str, Size] = {}
    places: dict[str, str] = {}
    surveyed = map_in_order(pool, partial(_hash_images, limits=limits), source.rows(), window)
    for row, images in surveyed:
        if isinstance(row, RawRow) and row.id in seen:
            row = Refused(row.where, Reason.DUPLICATE, f"an earlier row has the id {row.id!a}")
        elif isinstance(row, RawRow):
            seen.add(row.id)
        if isinstance(row, Refused):
            refused.append(row)
            continue
        if isinstance(images, Refused):
            if images.passing and not data.skip_unreachable:
                surveyed.close()
                raise UserError(
                    f"A picture can't be had at the moment: {_list([images])}.",
                    hint="Run the stage again. If it is gone for good, set data.skip_unreachable=true.",
                )
            refused.append(images)
            continue
        sizes |= dict(images)
        samples.append(_sample(row, tuple(sha256 for sha256, _ in images), source.name))
        groups.append(row.group)
        places[row.id] = row.where
    unaskable = find_unaskable(samples, sizes)
    refused += [Refused(places[name], Reason.LENGTH, why) for name, why in unaskable.items()]
    groups = [group for group, sample in zip(groups, samples, strict=True) if sample.sample_id not in unaskable]
    samples = [sample for sample in samples if sample.sample_id not in unaskable]
    _check_refused(refused, len(samples), data, source.name)
    sample_groups = [group for group in groups if group is not None]
    sample_groups = sample_groups or split.group_by_images([sample.images for sample in samples])
    assert len(sample_groups) == len(samples), "a source maps a group to all of its rows or to none"
    held_out = split.choose_held_out(sample_groups, data.held_out_share, data.seed)
    samples = [
        replace(sample, split=split.HELD_OUT if group in held_out else split.TRAIN)
        for sample, group in zip(samples, sample_groups, strict=True)
    ]
    chosen: set[str] = set()
    for side, count in ((split.TRAIN, data.train), (split.HELD_OUT, data.held_out)):
        ids = [sample.sample_id for sample in samples if sample.split == side]
        chosen.update(split.rank(ids, data.seed, "taken")[:count])
    taken = {sample.sample_id: sample for sample in samples if sample.sample_id in chosen}
    return Survey(taken, refused, len(samples), len(set(sample_groups)), tuple(advise(samples, data)))


def make_row_jobs(source: Source, taken: dict[str, Sample], limits: ImageLimits) -> Iterator[SampleJob]:
    """Yield a job for each row that was taken, in the source's order: the second pass over the source."""
    waiting = dict(taken)
    for row in source.rows():
        # Of rows with one id the first was surveyed; if another rule refused it, none was taken.
        if isinstance(row, RawRow) and (sample := waiting.pop(row.id, None)) is not None:
            yield partial(_prepare_row, row, sample, limits)


def _hash_images(
    row: RawRow | Refused, limits: ImageLimits
) -> tuple[RawRow | Refused, list[tuple[str, Size]] | Refused]:
    if isinstance(row, Refused):
        return row, []
    try:
        images = (decode(read(), limits) for read in row.images)
        return row, [(pixel_hash(image), image.size) for image in images]
    except RowRefused as refused:
        return row, Refused(row.where, refused.reason, refused.detail, refused.passing)
    except ImageRefused as refused:
        return row, Refused(row.where, f"image_{refused.reason}", refused.detail)


def _sample(row: RawRow, hashes: tuple[str, ...], source: str) -> Sample:
    return Sample(
        sample_id=row.id,
        question=row.question,
        answers=row.answers,
        answer_type=row.answer_type,
        choices=row.choices,
        images=hashes,
        source=source,
        split="",
        columns=row.columns,
        targets=row.targets,
    )


def _prepare_row(row: RawRow, sample: Sample, limits: ImageLimits) -> Prepared:
    images = []
    try:
        for read, sha256 in zip(row.images, sample.images, strict=True):
            data = read()
            image = decode(data, limits)
            if pixel_hash(image) != sha256:
                raise RowRefused(Reason.IMAGE, "an image has other pixels than before")
            images.append((sha256, keep_or_encode(data, image), image.width, image.height))
    except (RowRefused, ImageRefused) as refused:
        raise UserError(
            f"{row.where} changed while it was read: {refused.detail}.", hint="Run the stage again."
        ) from refused
    return Prepared(sample, tuple(images))


def _check_refused(refused: list[Refused], accepted: int, data: RowsConfig, source: str) -> None:
    rows = accepted + len(refused)
    if rows == 0:
        raise UserError(f"The source {source} holds no rows.")
    if accepted and len(refused) <= data.max_refused * rows:
        return
    raise UserError(
        f"{len(refused)} of {rows} rows are refused, more than data.max_refused ({data.max_refused:g}) allows: "
        f"{_list(refused)}.",
        hint="Correct them, or raise data.max_refused.",
    )


def _list(refused: list[Refused]) -> str:
    shown = "; ".join(f"{row.where}: {row.detail} ({row.reason})" for row in refused[:SHOWN])
    return shown + (f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else "")
