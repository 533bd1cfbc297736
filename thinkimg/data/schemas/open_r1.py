"""Schema of multimodal open-r1 and R1-V: a problem, and a solution with the answer in a tag."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.values import claims, final_answer, first_of, has_values, require_agreement, require_schema
from thinkimg.data.schemas import letters, mini_o3

VERSION = 1
TITLE = "multimodal open-r1, R1-V"
COLUMNS = ({"image", "problem", "solution"}, {"images", "problem", "solution"})
READS = {"image", "images", "problem", "solution", "original_question", "original_answer", "answer"}


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether problem and solution are texts, and the record is not one of Mini-o3 or TreeVGR."""
    if not has_values(record, COLUMNS) or claims(mini_o3, record) or claims(letters, record):
        return False
    return isinstance(record.get("problem"), str) and isinstance(record.get("solution"), str)


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record: the original question and answer, where it has them."""
    require_schema(record, COLUMNS, fits)
    answer, solved = first_of(record, "original_answer", "answer"), final_answer(record.get("solution"))
    require_agreement(answer, solved)
    return Fields(
        first_of(record, "original_question", "problem"),
        first_of(record, "images", "image"),
        solved if answer is None else answer,
    )
