"""Fields of a record: its values by their role, as a schema finds them in the columns of a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from thinkimg.records import AnswerType

BoxForm = Literal["xywh", "xyxy", "yxyx", "unit_xywh", "unit_xyxy", "thousandths_xyxy"]
"""Convention of four numbers that are a box: of pixels of the upright picture, of its sides (0..1), or of 0..1000."""


@dataclass(frozen=True)
class Fields:
    """Values of one record by their role, unchecked: `row.make_row` reads and checks them.

    Texts may still hold placeholders of images, options, tags around an answer; `texts` takes care of these for all
    schemas alike.
    """

    question: Any
    images: Any
    """One image or a list of them, as ImageFiles.reader_of takes them."""
    answer: Any
    """The right answer, or a list of several."""
    answers: Any = None
    """Further right answers."""
    choices: Any = None
    """List of options, with letters in front or without; None where the question may hold them."""
    answer_type: AnswerType | None = None
    """Comparison that the data set is made for; None where the answer itself has to tell."""
    tolerance: float | None = None
    """Relative tolerance of a number, where the data set defines one."""
    decimals: int | None = None
    """Decimal places to which the right number is rounded, where the data set defines them."""
    targets: Sequence[Any] = ()
    """Boxes that have to be looked at, four numbers each."""
    box_form: BoxForm | None = None
    """Convention of the boxes, where the data set states it."""
    group: Any = None
    shuffle: bool = False
    """True where the right option always has the same place."""
    used: frozenset[str] = frozenset()
    """Top-level columns that the schema reads, beyond those it names in READS: not kept as the user's own."""
    changes: tuple[str, ...] = ()
    """Changes to the texts, for people: "options read from the question"."""


def look_up(record: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, which may be dotted: `extra_info.question`. None where there is none.

    Of several columns, `A,B,C,D`, it is the list of their values, without the empty ones at the end.
    """
    if column in record:
        return record[column]
    if "," in column:
        values = [look_up(record, name) for name in split_columns(column)]
        while values and is_empty(values[-1]):
            values.pop()
        return values or None
    head, dot, rest = column.partition(".")
    inner = record.get(head)
    return look_up(inner, rest) if dot and isinstance(inner, Mapping) else None


def has_column(record: Mapping[str, Any], column: str) -> bool:
    """Tell whether a record has a column, which may be dotted."""
    if column in record:
        return True
    head, dot, rest = column.partition(".")
    inner = record.get(head)
    return bool(dot) and isinstance(inner, Mapping) and has_column(inner, rest)


def split_columns(column: str) -> list[str]:
    """Return the names of the columns that a role has: one, or several with a comma between them."""
    return [name.strip() for name in column.split(",")]


def is_empty(value: Any) -> bool:
    """Tell whether a value is nothing: null, a blank text, or the NaN that pandas writes."""
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() == "nan"
    return value is None or (isinstance(value, float) and value != value)
