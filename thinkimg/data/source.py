"""Source of questions and pictures: its rows, the reasons to refuse one, and the mapping of columns to a row."""

import difflib
import functools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from thinkimg.answers.right import read_choice, read_right
from thinkimg.data.settings import SOURCES, Columns, DataConfig, RowsConfig
from thinkimg.errors import UserError, shorten
from thinkimg.images.decode import ImageLimits
from thinkimg.records import AnswerType

ALIASES = {
    "image": ("images", "picture", "image_path", "img", "file_name", "photo", "path", "decoded_image"),
    "question": ("questions", "problem", "prompt", "query", "text", "instruction", "input"),
    "answer": ("answers", "solution", "label", "response", "output", "ground_truth", "gold", "target"),
    "choices": ("options", "candidates", "answer_choices"),
}
"""Names that public data sets give to the columns of a role, for hints."""

ImageReader = Callable[[], bytes]
"""Function that returns an image's encoded bytes, at most one more than ImageLimits.max_bytes; raises RowRefused."""


class Reason(StrEnum):
    """Reason to refuse a row; an image that does not decode has `image_<RefusalReason>`."""

    SYNTAX = "syntax"
    """The line is no row."""
    TEXT = "text"
    """Not a text, or not valid Unicode."""
    EMPTY = "empty"
    """A mapped column holds nothing."""
    CHOICES = "choices"
    """The choices are no list of at least two different texts."""
    ANSWER = "answer"
    """The answer is not among the choices, or does not fit its type; or the further answers are no list of texts."""
    TARGET = "target"
    """The target is no box."""
    IMAGE = "image"
    """The image column holds no image."""
    PATH = "path"
    """An image's path leads out of the data set, or nowhere."""
    URL = "url"
    """An image's host is not allowed, or did not deliver."""
    DUPLICATE = "duplicate"
    """An earlier row has the same id."""
    LENGTH = "length"
    """The question exceeds the limits of a conversation: conversation.max_tokens or max_images."""


class RowRefused(ValueError):
    """Error for a row that cannot be used: reason names the rule, detail explains.

    passing: the cause lies outside of the data, and another time the row may be good.
    """

    def __init__(self, reason: str, detail: str, *, passing: bool = False):
        super().__init__(reason, detail)
        self.reason, self.detail, self.passing = reason, detail, passing


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used. where: its position, for people. reason: a Reason or `image_<RefusalReason>`."""

    where: str
    reason: str
    detail: str
    passing: bool = False
    """True if another time the row may be good."""


@dataclass(frozen=True)
class RawRow:
    """A question as the source has it; its texts are checked, its images are not read."""

    where: str
    id: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    answer_type: AnswerType
    images: tuple[ImageReader, ...]
    group: str | None
    targets: tuple[tuple[float, float, float, float], ...]
    columns: dict[str, Any]
    """Columns that are not mapped, for Sample.columns."""


@dataclass(frozen=True)
class Source:
    """An opened source. digest: sha256 over its content, 64 hex digits. rows: starts a new pass over it."""

    name: str
    digest: str
    rows: Callable[[], Iterator[RawRow | Refused]]


def open_source(data: DataConfig, limits: ImageLimits) -> Source:
    """Return the source that `data` names. Raises UserError if it is missing, unreadable, or lacks a mapped column."""
    return SOURCES.member(data.source, "open_source")(data, limits)


def require_path(name: str, what: str) -> Path:
    """Return the absolute path of that name; links are kept, for what lies beside a link is meant.

    what: a noun for the hint. Raises UserError if there is no file.
    """
    path = Path(name).absolute()
    if not path.exists():
        raise UserError(f"There is no {name}.", hint=f"data.path must be {what}.")
    return path


def require_columns(columns: Columns, present: Collection[str], what: str) -> None:
    """Check that the mapped columns are among those present in `what`. Raises UserError for a missing one."""
    mapped = {name for _, name in columns}
    for role, name in columns:
        if name is not None and list(present).count(name) > 1:
            raise UserError(f"{what} has the column '{name}' twice.", hint=f"Rename one of them; the {role} is one.")
        if name is None or name in present:
            continue
        free = sorted(set(present) - mapped)
        near = [other for alias in ALIASES.get(role, ()) for other in free if other.casefold() == alias]
        near += difflib.get_close_matches(name, free, 1, cutoff=0.8)
        hint = f"Set data.columns.{role}, perhaps to {near[0]}." if near else f"Set data.columns.{role} to that column."
        listed = (", ".join(sorted(present)) or "no columns").encode(errors="replace").decode()
        raise UserError(f"{what} has no column '{name}' for the {role}; it has {listed}.", hint=hint)


def raw_row(
    record: Mapping[str, Any], data: RowsConfig, reader_of: Callable[[Any], ImageReader], *, id: str, where: str
) -> RawRow | Refused:
    """Return the row of a record, which maps columns to values.

    reader_of: returns the ImageReader of an image as the source has it, may raise RowRefused. id: used if no column is
    mapped to it. Columns that are not mapped are kept as the user's own, except binary ones.
    """
    columns = data.columns
    try:
        listed = _parse_list(record.get(columns.choices)) if columns.choices else ()
        choices = _choices(listed) if columns.choices else ()
        answer_type = AnswerType(data.answer_type)
        # CSV has no types: its lists are texts, and its digits may be a choice's text or an index.
        is_untyped = bool(columns.choices) and isinstance(record.get(columns.choices), str)
        ambiguous = is_untyped or (bool(choices) and any(_is_plain_number(choice) for choice in listed))
        right = functools.partial(_right, data=data, choices=choices, answer_type=answer_type, ambiguous=ambiguous)
        return RawRow(
            where=where,
            id=as_text(record.get(columns.id), columns.id) if columns.id else id,
            question=as_text(record.get(columns.question), columns.question),
            answers=(
                right(record.get(columns.answer), column=columns.answer),
                *(right(answer, column=columns.answers) for answer in _further_answers(record, columns)),
            ),
            choices=choices,
            answer_type=answer_type,
            images=_images(record.get(columns.image), reader_of),
            group=as_text(record.get(columns.group), columns.group) if columns.group else None,
            targets=_targets(record, columns),
            columns=_unmapped(record, {name for _, name in columns}),
        )
    except RowRefused as refused:
        return Refused(where, refused.reason, refused.detail)
    except RecursionError:
        return Refused(where, Reason.SYNTAX, "nested too deeply")
    except ValueError as error:  # Python writes no integer of more than 4,300 digits
        return Refused(where, Reason.SYNTAX, short(str(error)))


def short(value: object) -> str:
    """Return a value for an error text: quoted, and cut to 60 characters."""
    return shorten(ascii(value), 60)


def as_text(value: Any, column: str) -> str:
    """Return a text without surrounding space; numbers are written out, 3.0 as 3.

    Raises RowRefused (EMPTY or TEXT) for any other value.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes NaN for nothing
        raise RowRefused(Reason.EMPTY, f"{column} is empty")
    if isinstance(value, bool | int | float):
        is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
        value = str(int(value)) if is_whole else str(value)
    if not isinstance(value, str):
        raise RowRefused(Reason.TEXT, f"{column} is {type(value).__name__}, not a text")
    if not value.strip():
        raise RowRefused(Reason.EMPTY, f"{column} is empty")
    if not _is_unicode(value):
        raise RowRefused(Reason.TEXT, f"{column} is no valid Unicode: {short(value)}")
    return value.strip()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, from JSON escapes or from bytes that are no UTF-8
        return False
    return True


def _choices(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise RowRefused(Reason.CHOICES, f"the choices are no list: {short(values)}")
    choices = tuple(as_text(choice, "a choice") for choice in values)
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise RowRefused(Reason.CHOICES, f"the choices are not at least two different ones: {short(choices)}")
    return choices


def _right(
    value: Any, *, data: RowsConfig, choices: tuple[str, ...], answer_type: AnswerType, ambiguous: bool, column: str
) -> str:
    """Return a right answer as text. ambiguous: digits may be the text of a choice, or its index."""
    if answer_type is AnswerType.BOX and isinstance(value, list | tuple):
        value = ", ".join(as_text(edge, column) for edge in value)
    text = as_text(value, column)
    try:
        if choices:
            return read_choice(value, text, choices, data.answer_is, ambiguous=ambiguous)
        return read_right(value, text, answer_type)
    except ValueError as error:
        among = f" (choices: {short(choices)})" if choices else ""
        raise RowRefused(Reason.ANSWER, f"the answer {short(value)} {error}{among}") from error


def _is_plain_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def _images(value: Any, reader_of: Callable[[Any], ImageReader]) -> tuple[ImageReader, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise RowRefused(Reason.IMAGE, "the list of images is empty")
    return tuple(reader_of(image) for image in values)


def _further_answers(record: Mapping[str, Any], columns: Columns) -> list[Any]:
    """Return the further right answers, none if no column is mapped to them."""
    if columns.answers is None or (answers := _parse_list(record.get(columns.answers))) is None:
        return []
    if not isinstance(answers, list | tuple):
        raise RowRefused(Reason.ANSWER, f"{columns.answers} is no list: {short(answers)}")
    return list(answers)


def _targets(record: Mapping[str, Any], columns: Columns) -> tuple[tuple[float, float, float, float], ...]:
    """Return the region to look at, none if no column is mapped to it."""
    box = _parse_list(record.get(columns.target)) if columns.target else None
    if box is None:
        return ()
    numbers = isinstance(box, list | tuple) and len(box) == 4 and all(map(_is_plain_number, box))
    if not numbers or not all(map(_is_finite, box)) or min(box[2:]) <= 0:
        raise RowRefused(Reason.TARGET, f"{columns.target} is no [x, y, width, height]: {short(box)}")
    x, y, width, height = map(float, box)
    return ((x, y, width, height),)


def _parse_list(value: Any) -> Any:
    """Return a list from JSON, as CSV has it; None for an empty value; other values as they are."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _unmapped(record: Mapping[str, Any], mapped: Collection[str | None]) -> dict[str, Any]:
    """Return the other columns as JSON: NaN and infinities become null, dates and decimals text, bytes their length."""
    columns = {
        str(name): _to_json(value)
        for name, value in record.items()
        if name not in mapped and not isinstance(value, bytes)
    }
    if not _is_unicode(json.dumps(columns, ensure_ascii=False)):
        raise RowRefused(Reason.TEXT, "another column holds no valid Unicode")
    return columns


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
