"""Source of questions and pictures: raw rows, why rows are refused, and how columns become a row."""

import difflib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from thinkimg.data.settings import SOURCES, Columns, DataConfig, RowsConfig
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits
from thinkimg.records import AnswerType

log = logging.getLogger(__name__)

Reader = Callable[[], bytes]
"""Gives an image's encoded bytes, at most one more than ImageLimits.max_bytes; raises RowRefused."""


class Reason(StrEnum):
    """Why a row is refused; an image that does not decode adds `image_<RefusalReason>`."""

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


class RowRefused(ValueError):
    """A row that cannot be used; reason says which rule, detail says why."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Refused:
    """A row that cannot be used; where: its position, for people; reason: a Reason or `image_<RefusalReason>`."""

    where: str
    reason: str
    detail: str


@dataclass(frozen=True)
class RawRow:
    """One question as the source has it; its texts are checked, its images not even read."""

    where: str
    id: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    answer_type: AnswerType
    images: tuple[Reader, ...]
    group: str | None
    targets: tuple[tuple[float, float, float, float], ...]
    columns: dict[str, Any]
    """As Sample.columns: what is not mapped."""


@dataclass(frozen=True)
class Source:
    """An opened source. digest: sha256 over its content, 64 hex digits; rows: a new pass over it."""

    name: str
    digest: str
    rows: Callable[[], Iterator[RawRow | Refused]]


def open_source(data: DataConfig, limits: ImageLimits) -> Source:
    """Return the source that `data` names, opened. Raises UserError where it is not there, unreadable, or lacks a
    mapped column."""
    return SOURCES.member(data.source, "open_source")(data, limits)


def require_path(name: str, what: str) -> Path:
    """Return the path of that name. Raises UserError where it is not there; what: what data.path must be."""
    path = Path(name)
    if not path.exists():
        raise UserError(f"There is no {path}.", hint=f"data.path must be {what}.")
    return path


def require_columns(columns: Columns, present: Collection[str], what: str) -> None:
    """Raises UserError if a mapped column is not among those that are present in `what`; warns of what may be meant."""
    for role in ("answers", "target"):
        if role in present and role not in {name for _, name in columns}:
            log.warning("%s has a column '%s' that is not used: set data.columns.%s to use it", what, role, role)
    for role, name in columns:
        if name is None or name in present:
            continue
        near = difflib.get_close_matches(name, present, 1) or [other for other in present if role in other.lower()][:1]
        hint = f"Set data.columns.{role}, perhaps to {near[0]}." if near else f"Set data.columns.{role} to one of them."
        listed = (", ".join(sorted(present)) or "none").encode(errors="replace").decode()
        raise UserError(f"{what} has no column '{name}' for the {role}; it has {listed}.", hint=hint)


def raw_row(
    record: Mapping[str, Any], data: RowsConfig, reader_of: Callable[[Any], Reader], *, id: str, where: str
) -> RawRow | Refused:
    """The row of a record, a mapping from column to value.

    reader_of: from an image as the source has it to its Reader, may raise RowRefused. id: where no column is mapped to
    it. Columns that are not mapped are kept as the user's own, but for binary ones.
    """
    columns = data.columns
    try:
        choices = _choices(record.get(columns.choices)) if columns.choices else ()
        answer_type = AnswerType(data.answer_type)
        answer = _answer(record.get(columns.answer), choices, answer_type, columns.answer)
        return RawRow(
            where=where,
            id=_text(record, columns.id) if columns.id else id,
            question=_text(record, columns.question),
            answers=(answer, *_further_answers(record, columns)),
            choices=choices,
            answer_type=answer_type,
            images=_images(record.get(columns.image), reader_of),
            group=_text(record, columns.group) if columns.group else None,
            targets=_targets(record, columns),
            columns=_unmapped(record, {name for _, name in columns}),
        )
    except RowRefused as refused:
        return Refused(where, refused.reason, refused.detail)
    except RecursionError:
        return Refused(where, Reason.SYNTAX, "nested too deeply")


def short(value: object) -> str:
    """A value as it is shown in a refusal: quoted, and cut."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(record: Mapping[str, Any], column: str) -> str:
    return as_text(record.get(column), column)


def as_text(value: Any, column: str) -> str:
    """A text, not empty, without surrounding space; numbers are written out, 3.0 as 3."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # NaN is how pandas writes nothing
        raise RowRefused(Reason.EMPTY, f"{column} is empty")
    if isinstance(value, bool | int | float):
        value = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
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


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):  # CSV has no lists
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowRefused(Reason.CHOICES, f"the choices are no JSON list: {short(value)}") from None
    if not isinstance(value, list | tuple):
        raise RowRefused(Reason.CHOICES, f"the choices are no list: {short(value)}")
    choices = tuple(as_text(choice, "a choice") for choice in value)
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise RowRefused(Reason.CHOICES, f"the choices are not at least two different ones: {short(choices)}")
    return choices


def _answer(value: Any, choices: tuple[str, ...], answer_type: AnswerType, column: str) -> str:
    """The answer as text. Among choices it may also be a letter (A is the first) or an integer index from 0."""
    if answer_type is AnswerType.BOX:
        return _box(value, column)
    answer = as_text(value, column)
    if choices and answer not in choices:
        if type(value) is int and 0 <= value < len(choices):
            return choices[value]
        if len(answer) == 1 and "A" <= answer < chr(ord("A") + len(choices)):
            return choices[ord(answer) - ord("A")]
        raise RowRefused(Reason.ANSWER, f"the answer {short(answer)} is none of the choices {short(choices)}")
    if answer_type is AnswerType.NUMBER and not _is_number(answer.removesuffix("%").replace(",", "")):
        raise RowRefused(Reason.ANSWER, f"the answer {short(answer)} is no number")
    return answer


def _box(value: Any, column: str) -> str:
    """Four numbers as a JSON list, from a list or a text such as "1, 2, 3, 4"."""
    if not isinstance(value, list | tuple):
        value = as_text(value, column).strip("[]()").split(",")
    if len(value) != 4 or not all(_is_number(edge) for edge in value):
        raise RowRefused(Reason.ANSWER, f"the answer {short(value)} is no box of four numbers")
    return json.dumps([float(edge) for edge in value])


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _images(value: Any, reader_of: Callable[[Any], Reader]) -> tuple[Reader, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise RowRefused(Reason.IMAGE, "the list of images is empty")
    return tuple(reader_of(image) for image in values)


def _further_answers(record: Mapping[str, Any], columns: Columns) -> list[str]:
    """Those of the column that is mapped to them."""
    if columns.answers is None or (answers := _parsed(record.get(columns.answers))) is None:
        return []
    if not isinstance(answers, list | tuple):
        raise RowRefused(Reason.ANSWER, f"{columns.answers} is no list: {short(answers)}")
    return [as_text(answer, columns.answers) for answer in answers]


def _targets(record: Mapping[str, Any], columns: Columns) -> tuple[tuple[float, float, float, float], ...]:
    """The box of the column that is mapped to it."""
    box = _parsed(record.get(columns.target)) if columns.target else None
    if box is None:
        return ()
    numbers = isinstance(box, list | tuple) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)
    if not numbers or not all(map(_is_number, box)) or min(box[2:]) <= 0:
        raise RowRefused(Reason.TARGET, f"{columns.target} is no [x, y, width, height]: {short(box)}")
    return ((box[0], box[1], box[2], box[3]),)


def _parsed(value: Any) -> Any:
    """A list from JSON, as CSV has it; None where there is nothing."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _unmapped(record: Mapping[str, Any], mapped: Collection[str | None]) -> dict[str, Any]:
    columns = {
        str(name): _plain(value)
        for name, value in record.items()
        if name not in mapped and not isinstance(value, bytes)
    }
    if not _is_unicode(json.dumps(columns, ensure_ascii=False)):
        raise RowRefused(Reason.TEXT, "another column holds no valid Unicode")
    return columns


def _plain(value: Any) -> Any:
    """A value as JSON has it: NaN and infinities become null, dates and decimals text, bytes their length."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
