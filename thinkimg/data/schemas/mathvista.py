"""Schema of MathVista: choices, integers, floats with a precision, lists."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.values import first_of, has_values, refuse, require_schema
from thinkimg.records import AnswerType

VERSION = 1
TITLE = "MathVista"
COLUMNS = (
    {"question", "answer", "question_type", "answer_type", "choices", "decoded_image"},
    {"question", "answer", "question_type", "answer_type", "choices", "image"},
)
READS = {"question", "answer", "question_type", "answer_type", "choices", "decoded_image", "image", "precision", "unit"}
TYPES = {"integer": AnswerType.INTEGER, "float": AnswerType.NUMBER, "list": AnswerType.EXACT, "text": AnswerType.EXACT}
MAX_DECIMALS = 10


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether the types of question and answer are MathVista's."""
    kind, form = record.get("question_type"), record.get("answer_type")
    if not has_values(record, COLUMNS, nullable=("choices", "answer")):
        return False
    return kind in ("multi_choice", "free_form") and isinstance(form, str) and form in TYPES


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record; the unit goes into the question, as MathVista's own prompts have it."""
    require_schema(record, COLUMNS, fits)
    question, unit = record.get("question"), record.get("unit")
    has_unit = isinstance(unit, str) and bool(unit.strip()) and isinstance(question, str)
    is_choice = record.get("question_type") == "multi_choice"
    if is_choice and not record.get("choices"):
        raise refuse("a question of multiple choice has no choices")
    return Fields(
        f"{question} (Unit: {unit})" if has_unit else question,
        first_of(record, "decoded_image", "image"),
        record.get("answer"),
        choices=record.get("choices") if is_choice else None,
        answer_type=AnswerType.CHOICE if is_choice else TYPES[record["answer_type"]],
        decimals=None if is_choice else _decimals(record),
        changes=("unit put behind the question",) if has_unit else (),
    )


def _decimals(record: Mapping[str, Any]) -> int | None:
    """Return the decimal places of a number, which is compared in plain digits: 0 of an integer."""
    precision = 0 if record.get("answer_type") == "integer" else record.get("precision")
    if record.get("answer_type") not in ("integer", "float") or precision is None or precision != precision:
        return None  # pandas writes NaN for nothing
    if type(precision) not in (int, float) or precision not in range(MAX_DECIMALS + 1):
        raise refuse("the precision is no number of decimal places")
    return int(precision)
