"""Schema of geometry3k and EasyR1: a problem with its images and its written answer."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.values import first_of, has_values, require_schema
from thinkimg.records import AnswerType

VERSION = 1
TITLE = "geometry3k, EasyR1"
COLUMNS = ({"images", "problem", "answer"}, {"image", "problem", "answer"})
READS = {"images", "image", "problem", "answer"}


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether the problem is a text, and the answer neither explained nor one of TreeVGR's."""
    others = ("solution", "target_instances")
    if not has_values(record, COLUMNS):
        return False
    return isinstance(record.get("problem"), str) and all(record.get(other) is None for other in others)


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record; geometry3k's answers are written out, its choices stay a column."""
    require_schema(record, COLUMNS, fits)
    images = first_of(record, "images", "image")
    if has_values(record, ({"choices", "ground_truth"},)):
        changes = ("choices left out: the answer is written out",)
        return Fields(
            record.get("problem"), images, record.get("answer"), answer_type=AnswerType.MATHS, changes=changes
        )
    return Fields(record.get("problem"), images, record.get("answer"), choices=record.get("choices"))
