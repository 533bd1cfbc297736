"""Preparation of samples from a source's rows, in passes, so that memory holds texts and hashes only.

passes.read_texts    texts of all rows ──► checks, groups
draw.Draw            sides of the split, and the order in which rows are taken
passes.look_at_rows  pictures of the first rows of each side ──► refusals, boxes, pictures on both sides
make_row_jobs        pictures of the rows that were taken ──► Prepared
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

from thinkimg.data.fields import BoxForm
from thinkimg.data.pictures.prints import Picture
from thinkimg.data.refusal import Reason, Refused, RowRefused
from thinkimg.data.row import RawRow
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import Source
from thinkimg.data.survey.box_checks import find_box_oddity, list_boxes
from thinkimg.data.survey.checks import find_small_sides
from thinkimg.data.survey.draw import Draw
from thinkimg.data.survey.oddity import Level, Oddity, ask
from thinkimg.data.survey.passes import CHANGED, Looks, look_at_rows, read_texts, rows_of
from thinkimg.data.survey.samples import make_sample
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits, ImageRefused, decode, pixel_hash
from thinkimg.records import Sample
from thinkimg.store.image_table import encode_lossless

SHOWN = 5  # reasons in an error
BOTH_SIDES = "both_sides"
SHARED = "its picture, or one that looks the same, is also held out"


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


@dataclass(frozen=True)
class Taken:
    """Row that becomes a sample."""

    sample: Sample
    """Without the user's columns."""
    pictures: tuple[Picture, ...]
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """Result of the passes before anything is stored."""

    taken: dict[str, Taken]
    """Row id -> row."""
    refused: list[Refused]
    """In the source's order; also those whose picture is on the held-out side, with the reason `both_sides`."""
    accepted: int
    """Number of rows that were not refused."""
    looked: int
    """Number of rows whose pictures were decoded."""
    groups: int
    """Number of groups of the rows whose texts were accepted."""
    oddities: tuple[Oddity, ...] = ()


def survey(
    source: Source,
    data: RowsConfig,
    limits: ImageLimits,
    pool: Executor,
    window: int,
    find_unaskable: FindUnaskable = lambda samples, sizes: {},
) -> Survey:
    """Check every row, split the accepted ones, and choose the samples to take; of few more pictures are decoded.

    find_unaskable: see FindUnaskable. Raises UserError if no row is accepted, if too many are refused, where a check
    asks for a setting, and at the first picture that can't be had at the moment.
    """
    texts, looks = read_texts(source, data), Looks()
    candidates, rows = texts.candidates, len(texts.candidates) + len(texts.refused)
    _check_passing(texts.refused.values(), data)
    _check_refused(texts.refused.values(), rows, rows, data, source.name)
    ask(texts.checker.oddities())
    while True:
        draw = Draw.of(candidates, data)
        while wanted := draw.choose_next():
            for id, result in look_at_rows(source, looks.new(wanted), limits, pool, window):
                _check_passing([result] if isinstance(result, Refused) else [], data)
                looks.add(id, result)
            boxes = find_box_oddity([box for one in looks.rows.values() for box in list_boxes(one.row, one.size)], data)
            ask(boxes)
            form = next((oddity.form for oddity in boxes), None) if data.boxes == "auto" else data.boxes
            samples = _make_samples(looks, source.name, form, find_unaskable)
            _check_refused(looks.refused.values(), looks.count, len(texts.candidates), data, source.name)
            draw.take(looks)
        if all(draw.taken.values()):
            break
        # All rows of a side are refused, as happens with few rows: the others are split again.
        left = {id: candidate for id, candidate in candidates.items() if id not in looks.refused}
        if len(left) == len(candidates):
            empty = next(side for side, ids in draw.taken.items() if not ids)
            raise UserError(
                f"No row is left for the split {empty}: of each {SHARED}.",
                hint="Add other pictures, or map data.columns.group so that equal pictures are of one group.",
            )
        candidates = left
    refused = texts.refused | {texts.candidates[id].number: refusal for id, refusal in looks.refused.items()}
    refused |= {
        candidate.number: Refused(candidate.where, BOTH_SIDES, SHARED)
        for candidate in map(candidates.__getitem__, draw.shared)
    }
    oddities = [*texts.checker.oddities(), *boxes]
    oddities += find_small_sides([one.size for one in looks.rows[id].pictures] for id in samples)
    if draw.shared:
        count = len(draw.shared)
        sentence = f"{count} row{'s' * (count != 1)} left out of training: pictures that look the same are held out."
        oddities.append(Oddity(BOTH_SIDES, count, sentence, Level.WARN))
    taken = {
        id: Taken(replace(samples[id], split=side), looks.rows[id].pictures, looks.rows[id].row.changes)
        for side, ids in draw.taken.items()
        for id in ids
    }
    return Survey(
        taken,
        [refusal for _, refusal in sorted(refused.items())],
        rows - len(refused),
        looks.count,
        len({candidate.group for candidate in texts.candidates.values()}),
        tuple(oddities),
    )


def make_row_jobs(source: Source, taken: Mapping[str, Taken], limits: ImageLimits) -> Iterator[SampleJob]:
    """Yield a job for each row that was taken, in the source's order: the last pass over the source."""
    for row in rows_of(source, taken):
        yield partial(_prepare_row, row, taken[row.id], limits)


def _make_samples(looks: Looks, source: str, form: BoxForm | None, find_unaskable: FindUnaskable) -> dict[str, Sample]:
    """Return the samples of the good rows, by id; refuse those whose box leaves its picture, and the unaskable."""
    samples = {}
    for id in looks.good(looks.rows):
        try:
            samples[id] = make_sample(looks.rows[id], form, source)
        except RowRefused as error:
            looks.refuse(id, error.reason, error.detail)
    sizes = {one.sha256: one.size for id in samples for one in looks.rows[id].pictures}
    for id, why in find_unaskable(list(samples.values()), sizes).items():
        looks.refuse(id, Reason.LENGTH, why)
    return samples


def _prepare_row(row: RawRow, taken: Taken, limits: ImageLimits) -> Prepared:
    try:
        if row.question != taken.sample.question:
            raise RowRefused(Reason.TEXT, "its question is another than before")
        images = [
            (picture.sha256, _encode(read(), picture, limits), *picture.size)
            for read, picture in zip(row.images, taken.pictures, strict=True)
        ]
    except (RowRefused, ImageRefused) as refused:
        raise UserError(f"{row.where} changed while it was read: {refused.detail}.", hint=CHANGED) from refused
    return Prepared(replace(taken.sample, columns=row.columns), tuple(images))


def _encode(data: bytes, picture: Picture, limits: ImageLimits) -> bytes:
    """Return the file as it is where the survey found that it can be kept, else its pixels, encoded anew."""
    other = RowRefused(Reason.IMAGE, "an image has other pixels than before")
    if picture.file is not None:
        if hashlib.sha256(data).hexdigest() != picture.file:
            raise other
        return data
    image = decode(data, limits)
    if pixel_hash(image) != picture.sha256:
        raise other
    return encode_lossless(image)


def _check_passing(refused: Iterable[Refused], data: RowsConfig) -> None:
    passing = [] if data.skip_unreachable else [row for row in refused if row.passing]
    if passing:
        raise UserError(
            f"A picture can't be had at the moment: {_list(passing[:1])}.",
            hint="Run the stage again. If it is gone for good, set data.skip_unreachable=true.",
        )


def _check_refused(refused: Collection[Refused], rows: int, whole: int, data: RowsConfig, source: str) -> None:
    """Raise UserError where too many rows are refused. rows: that were looked at, of the whole."""
    if rows == 0:
        raise UserError(f"The source {source} holds no rows.")
    if len(refused) <= data.max_refused * rows and len(refused) < max(rows, whole):
        return
    counted = (
        f"{len(refused)} of {rows} rows" if rows == whole else f"{len(refused)} of {rows} rows that were looked at"
    )
    hint = "Correct them, or raise data.max_refused."
    if any(row.reason == Reason.PATH for row in refused):
        hint += " Set data.images to the folder or the ZIP archive of the pictures."
    if data.answer_type not in ("auto", "box") and any(row.reason == Reason.ANSWER for row in refused):
        hint += " With data.answer_type=auto each answer is compared by its own kind."
    raise UserError(
        f"{counted} are refused, more than data.max_refused ({data.max_refused:g}) allows: {_list(refused)}.", hint=hint
    )


def _list(refused: Collection[Refused]) -> str:
    """Return the first refused row of each reason, and the counts where there are several rows."""
    first: dict[str, Refused] = {}
    for row in refused:
        first.setdefault(str(row.reason), row)
    shown = "; ".join(f"{row.where}: {row.detail} ({reason})" for reason, row in list(first.items())[:SHOWN])
    if len(refused) == 1:
        return shown
    counts = Counter(str(row.reason) for row in refused).most_common()
    return ", ".join(f"{count} for {reason}" for reason, count in counts) + f"; {shown}"
