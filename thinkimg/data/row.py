"""Row of a question: the fields of a record, read and checked."""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinkimg.answers.boxes import read_stated_box
from thinkimg.answers.kinds import guess_type
from thinkimg.answers.numbers import MAX_NUMBER_LENGTH, read_number
from thinkimg.answers.right import read_choice, read_right
from thinkimg.data.columns import fill_in, read_columns
from thinkimg.data.fields import BoxForm, Fields, is_empty, look_up
from thinkimg.data.pictures.image_files import ImageReader
from thinkimg.data.recognise import Recognised
from thinkimg.data.refusal import Reason, Refused, RowRefused, as_text, is_unicode, short
from thinkimg.data.settings import Columns, RowsConfig
from thinkimg.data.tables.table import Values
from thinkimg.data.texts.tidy import tidy
from thinkimg.records import AnswerType

MAX_COLUMN_BYTES = 4096
"""Bytes of a user's column; a longer one is no fact about a sample but a picture, a page or a conversation."""
ORDERED = re.compile(
    r"\b(?:both|neither|none|all|either) (?:of|[A-J]\b|are|is)|\b(?:the|these|all|any|none|both|of) (?:above|below)\b"
    r"|\b(?:above|below) (?:options?|answers?|choices?|ones?)\b",
    re.IGNORECASE,
)
"""Options that speak of the other ones, by their letters or places: these are not shuffled."""
MAY_BE_NUMBERS = ("auto", "number", "integer", "maths")
"""Values of `data.answer_type` under which a text may be read as a number."""
DECIMAL_COMMA = re.compile(r"\D*[\d.]*\d,\d+\D*")
"""One comma in a number, behind all points: 1,5 and 1,234 and 1.234,5 kg."""
Box = tuple[float, float, float, float]
ReaderOf = Callable[[Any], ImageReader]
"""Function that returns the reader of an image as the source has it; may raise RowRefused."""


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
    targets: tuple[Box, ...]
    """Boxes to look at; they, and of the type `box` the right answers, are in the form `box_form`."""
    columns: dict[str, Any]
    """Columns that are not mapped, for Sample.columns."""
    box_form: BoxForm | None = None
    """Form of the boxes; None where it is still to be found."""
    tolerance: float | None = None
    decimals: int | None = None
    order: tuple[int, ...] = ()
    """Place in the data set of each of the choices, if they were shuffled."""
    changes: tuple[str, ...] = ()
    """Changes to the texts, for people."""


def make_row(
    record: Mapping[str, Any],
    schema: Recognised,
    data: RowsConfig,
    reader_of: ReaderOf,
    *,
    id: str,
    where: str,
    values: Values = Values.TYPED,
) -> RawRow | Refused:
    """Return the row of a record, which maps columns to values.

    id: used if no column is mapped to it. values: notation of the table's. Columns that are not mapped are kept as the
    user's own, except binary and long ones.
    """
    try:
        return _make_row(record, schema, data, reader_of, id, where, values)
    except RowRefused as refused:
        return Refused(where, refused.reason, refused.detail)
    except RecursionError:
        return Refused(where, Reason.SYNTAX, "nested too deeply")
    except ValueError as error:  # Python writes no integer of more than 4,300 digits
        return Refused(where, Reason.SYNTAX, short(str(error)))


def _make_row(
    record: Mapping[str, Any],
    schema: Recognised,
    data: RowsConfig,
    reader_of: ReaderOf,
    id: str,
    where: str,
    values: Values,
) -> RawRow:
    given = read_fields(record, schema, data.columns)
    fields = tidy(given)
    row_id = as_text(look_up(record, data.columns.id), data.columns.id) if data.columns.id else id
    listed = _parse_list(fields.choices)
    has_choices = listed is not None or (data.columns.choices and not _states_none(record, data.columns.choices))
    choices = _choices(listed) if has_choices else ()
    names = fill_in(schema.columns)
    answers = _answers(fields, choices, data, str(names.answer))
    answer_type = _answer_type(fields, answers, choices, data, str(names.answer))
    # CSV has no types: its lists are texts, and its digits may be a choice's text or an index.
    has_numbers = isinstance(given.choices, str) or bool(choices and any(map(_is_plain_number, listed)))
    ambiguous = values is not Values.TYPED or has_numbers
    read = functools.partial(read_right, answer_type=answer_type, tolerance=fields.tolerance)
    if choices:
        read = functools.partial(read_choice, choices=choices, form=data.answer_is, ambiguous=ambiguous)
    if values is Values.COMMAS and not choices and data.answer_type in MAY_BE_NUMBERS:
        list(map(_refuse_comma, answers))
    right = functools.partial(_right, read=read, choices=choices, answer_type=answer_type, column=str(names.answer))
    rights = [right(answer) for answer in answers]
    order = _order(choices, fields, data, row_id)
    columns, left_out = _own_columns(record, schema.reads | read_columns(data.columns))
    return RawRow(
        where=where,
        id=row_id,
        question=as_text(fields.question, str(names.question)),
        answers=tuple(rights if answer_type is AnswerType.VOTES else dict.fromkeys(rights)),
        choices=tuple(choices[place] for place in order) if order else choices,
        answer_type=answer_type,
        images=_images(fields.images, reader_of),
        group=as_text(fields.group, data.columns.group or "the group") if _has_group(fields, data) else None,
        targets=_targets(fields.targets, data.columns.target or "the target"),
        columns=columns,
        box_form=fields.box_form if data.boxes == "auto" else data.boxes,
        tolerance=fields.tolerance,
        decimals=fields.decimals,
        order=order,
        changes=(*fields.changes, *(["options shuffled"] if order else []), *left_out),
    )


def read_fields(record: Mapping[str, Any], schema: Recognised, columns: Columns) -> Fields:
    """Return the fields by the schema, and the values of those columns that the settings name. Raises RowRefused."""
    fields, values = schema.convert(record), dict[str, Any]()
    for role, field in (("image", "images"), ("question", "question"), ("answer", "answer"), ("answers", "answers"),
                        ("choices", "choices"), ("group", "group")):  # fmt: skip
        if (column := getattr(columns, role)) is not None and schema.name != "none":
            values[field] = look_up(record, column)
    if columns.target:
        values["targets"] = _boxes(look_up(record, columns.target))
        values["box_form"] = None
    return dataclasses.replace(fields, **values)


def _answer_type(
    fields: Fields, answers: Sequence[Any], choices: Sequence[str], data: RowsConfig, column: str
) -> AnswerType:
    if data.answer_type != "auto":
        answer_type = AnswerType(data.answer_type)
    elif choices and data.columns.choices:  # the user's own, whatever the schema says of answers without any
        answer_type = AnswerType.CHOICE
    elif fields.answer_type is not None:
        answer_type = fields.answer_type
    else:
        is_box = all(isinstance(answer, list | tuple) and len(answer) == 4 for answer in answers)
        answer_type = AnswerType.BOX if is_box else guess_type([as_text(text, column) for text in answers], choices)
    if answer_type is AnswerType.CHOICE and not choices:
        raise RowRefused(Reason.CHOICES, "there are no choices; data.answer_type=exact compares whole answers")
    return answer_type


def _answers(fields: Fields, choices: Sequence[str], data: RowsConfig, column: str) -> list[Any]:
    """Return the right answers, at least one. A list of four numbers is one box, a list of other values several."""
    answers = _parse_list(fields.answers)
    if answers is not None and not isinstance(answers, list | tuple):
        raise RowRefused(Reason.ANSWER, f"{data.columns.answers or 'the answers'} is no list: {short(answers)}")
    first = fields.answer
    if data.answer_is != "index" and isinstance(first, list | tuple) and _are_marks(first, choices):
        raise RowRefused(
            Reason.ANSWER,
            f"the answer {short(first)} may say of each choice whether it is right, or list the right ones from 0: "
            "set data.answer_is=index for these",
        )
    several = list(first) if isinstance(first, list | tuple) and not _is_box(first) else [first]
    if not several:
        raise RowRefused(Reason.EMPTY, f"{column} is an empty list")
    return [*several, *(answers or [])]


def _are_marks(values: Sequence[Any], choices: Sequence[str]) -> bool:
    """Tell whether values are a 0 or 1 for each choice, such as [0, 1, 0], which may be three indices, too."""
    return (
        bool(choices)
        and len(values) == len(choices)
        and all(isinstance(value, int | float) and value in (0, 1) for value in values)
    )


def _choices(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise RowRefused(Reason.CHOICES, f"the choices are no list: {short(values)}")
    choices = tuple(as_text(choice, "a choice") for choice in values)
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise RowRefused(Reason.CHOICES, f"the choices are not at least two different ones: {short(choices)}")
    return choices


def _right(
    value: Any, *, read: Callable[[Any, str], str], choices: tuple[str, ...], answer_type: AnswerType, column: str
) -> str:
    """Return a right answer as text. read: reads it as a choice, or by its type."""
    if answer_type is AnswerType.BOX and isinstance(value, list | tuple):
        value = ", ".join(as_text(edge, column) for edge in value)
    text = as_text(value, column)
    if is_empty(text) and not choices and answer_type is not AnswerType.VOTES:  # "nan", as pandas writes nothing
        raise RowRefused(Reason.EMPTY, f"{column} is empty: {short(text)}")
    if answer_type is AnswerType.BOX and (stated := read_stated_box(text)):
        text = json.dumps(list(stated.numbers))  # of `bbox_2d` or box tokens; the form is found for all rows
    try:
        return read(value, text)
    except ValueError as error:
        among = f" (choices: {short(choices)})" if choices else ""
        raise RowRefused(Reason.ANSWER, f"the answer {short(value)} {error}{among}") from error


def _refuse_comma(answer: Any) -> None:
    """Raise RowRefused for a number with one comma, which in CSV with semicolons may be a decimal point or none."""
    is_short = isinstance(answer, str) and len(answer) <= MAX_NUMBER_LENGTH
    if is_short and DECIMAL_COMMA.fullmatch(answer.strip()) and read_number(answer.replace(".", "").replace(",", ".")):
        detail = f"the answer {short(answer)} may have a decimal comma, as the fields of the table end with semicolons"
        raise RowRefused(Reason.ANSWER, f"{detail}: write it as 1234.5, or set data.answer_type=text")


def _order(choices: Sequence[str], fields: Fields, data: RowsConfig, row_id: str) -> tuple[int, ...]:
    """Return the places of the choices in a random order of the row's own; none where they stay as they are."""
    is_wanted = fields.shuffle if data.shuffle_choices is None else data.shuffle_choices
    if not is_wanted or not choices or any(ORDERED.search(choice) for choice in choices):
        return ()

    def key(place: int) -> bytes:
        return hashlib.sha256(f"choices {data.seed} {row_id} {place}".encode()).digest()

    return tuple(sorted(range(len(choices)), key=key))


def _has_group(fields: Fields, data: RowsConfig) -> bool:
    is_usable = isinstance(fields.group, str | int) and str(fields.group).strip() != ""
    return data.columns.group is not None or is_usable


def _images(value: Any, reader_of: ReaderOf) -> tuple[ImageReader, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise RowRefused(Reason.IMAGE, "the list of images is empty")
    return tuple(reader_of(image) for image in values)


def _boxes(value: Any) -> Sequence[Any]:
    """Return a list of boxes from one box or several, JSON included; an empty one for nothing."""
    boxes = _parse_list(value)
    if boxes is None:
        return ()
    if isinstance(boxes, list | tuple) and boxes and all(isinstance(box, list | tuple) for box in boxes):
        return boxes
    return [boxes]


def _targets(boxes: Sequence[Any], column: str) -> tuple[Box, ...]:
    """Return the regions to look at. Whether they lie in the picture is seen when it is decoded."""
    for box in boxes:
        if not _is_box(box) or not all(map(_is_finite, box)):
            raise RowRefused(Reason.TARGET, f"{column} is no box of four numbers: {short(box)}")
    return tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in boxes)


def _is_box(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 4 and all(map(_is_plain_number, value))


def _is_plain_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


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


def _states_none(record: Mapping[str, Any], column: str) -> bool:
    """Tell whether a record says that it has no choices: an empty list, which CSV writes, too."""
    value = _parse_list(look_up(record, column))
    return isinstance(value, list | tuple) and not value


def _own_columns(record: Mapping[str, Any], read: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the other columns as JSON, and sentences on those that are too long.

    NaN and infinities become null, dates and decimals text, bytes their length.
    """
    columns: dict[str, Any] = {}
    left_out: list[str] = []
    for name, value in record.items():
        if name in read or isinstance(value, bytes):
            continue
        plain = _to_json(value)
        written = json.dumps({str(name): plain}, ensure_ascii=False)
        if len(written) > MAX_COLUMN_BYTES:
            left_out.append(f"column {short(name)} left out: above {MAX_COLUMN_BYTES // 1024} KB")
        elif not is_unicode(written):
            raise RowRefused(Reason.TEXT, "another column holds no valid Unicode")
        else:
            columns[str(name)] = plain
    return columns, left_out


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
