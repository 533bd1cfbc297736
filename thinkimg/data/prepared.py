"""From a source to stored samples: what is accepted, on which side of the split it goes, and which images it needs.

Two passes over a user's source, so that memory holds texts and hashes only: the first reads and decodes everything, to
know what is refused and which rows share an image; the second stores the images of the rows that were taken.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from thinkimg.data import split
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import RawRow, Reason, Refused, RowRefused, Source
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits, ImageRefused, decode, pixel_hash
from thinkimg.records import Sample
from thinkimg.store.image_table import storable

SHOWN = 5  # refused rows in an error


@dataclass(frozen=True)
class Prepared:
    """A sample with its images, (sha256, encoded, width, height) each."""

    sample: Sample
    images: tuple[tuple[str, bytes, int, int], ...]


Job = Callable[[], Prepared]
T = TypeVar("T")
R = TypeVar("R")


def in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], window: int) -> Iterator[R]:
    """`map` on a pool that reads only `window` items ahead of what has been taken."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# the built-in puzzles -------------------------------------------------------------------------------------------------


# a user's own data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surveyed:
    """A source after the first pass. samples: those that were taken, by row id; groups: of all accepted rows."""

    taken: dict[str, Sample]
    refused: list[Refused]
    accepted: int
    groups: int


def survey(source: Source, data: RowsConfig, limits: ImageLimits, pool: Executor, window: int) -> Surveyed:
    """Check every row and split what is accepted. Raises UserError where too much is refused, or nothing is left."""
    samples: list[Sample] = []
    groups: list[str | None] = []
    refused: list[Refused] = []
    seen: set[str] = set()
    for row, hashes in in_order(pool, partial(_hashed, limits=limits), source.rows(), window):
        if isinstance(row, RawRow) and row.id in seen:
            row = Refused(row.where, Reason.DUPLICATE, f"an earlier row has the id {row.id!a}")
        elif isinstance(row, RawRow):
            seen.add(row.id)
        if isinstance(row, Refused):
            refused.append(row)
            continue
        if isinstance(hashes, Refused):
            refused.append(hashes)
            continue
        samples.append(_sample(row, hashes, source.name))
        groups.append(row.group)
    _check_refused(refused, len(samples), data.max_refused, source.name)
    by_group = [group for group in groups if group is not None] or split.components(
        [sample.images for sample in samples]
    )
    assert len(by_group) == len(samples), "a source maps a group to all of its rows or to none"
    out = split.held_out(by_group, data.held_out_share, data.seed)
    samples = [
        replace(sample, split=split.HELD_OUT if group in out else split.TRAIN)
        for sample, group in zip(samples, by_group, strict=True)
    ]
    chosen: set[str] = set()
    for place, count in ((split.TRAIN, data.train), (split.HELD_OUT, data.held_out)):
        ids = [sample.sample_id for sample in samples if sample.split == place]
        chosen.update(split.ranked(ids, data.seed, "taken")[:count])
    taken = {sample.sample_id: sample for sample in samples if sample.sample_id in chosen}
    return Surveyed(taken, refused, len(samples), len(set(by_group)))


def row_jobs(source: Source, taken: dict[str, Sample], limits: ImageLimits) -> Iterator[Job]:
    """The second pass: the taken rows, in the source's order."""
    left = dict(taken)
    for row in source.rows():
        # Of rows with one id the first was surveyed; if that was refused for something else, none was taken.
        if isinstance(row, RawRow) and (sample := left.pop(row.id, None)) is not None:
            yield partial(_stored, row, sample, limits)


def _hashed(row: RawRow | Refused, limits: ImageLimits) -> tuple[RawRow | Refused, tuple[str, ...] | Refused]:
    if isinstance(row, Refused):
        return row, ()
    try:
        return row, tuple(pixel_hash(decode(read(), limits)) for read in row.images)
    except RowRefused as refused:
        return row, Refused(row.where, refused.reason, refused.detail)
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


def _stored(row: RawRow, sample: Sample, limits: ImageLimits) -> Prepared:
    images = []
    try:
        for read, sha256 in zip(row.images, sample.images, strict=True):
            data = read()
            image = decode(data, limits)
            if pixel_hash(image) != sha256:
                raise RowRefused(Reason.IMAGE, "an image is another one than before")
            images.append((sha256, storable(data, image), image.width, image.height))
    except (RowRefused, ImageRefused) as refused:
        raise UserError(
            f"{row.where} changed while it was read: {refused.detail}.", hint="Run the stage again."
        ) from refused
    return Prepared(sample, tuple(images))


def _check_refused(refused: list[Refused], accepted: int, allowed: float, source: str) -> None:
    rows = accepted + len(refused)
    if rows == 0:
        raise UserError(f"The source {source} holds no rows.")
    if accepted and len(refused) <= allowed * rows:
        return
    shown = "; ".join(f"{row.where}: {row.detail} ({row.reason})" for row in refused[:SHOWN])
    more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    raise UserError(
        f"{len(refused)} of {rows} rows are refused, more than data.max_refused ({allowed:g}) allows: {shown}{more}.",
        hint="Correct them, or raise data.max_refused.",
    )
