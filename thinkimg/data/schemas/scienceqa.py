"""Schema of ScienceQA: choices with the index of the right one, and the context that a question speaks of."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields, is_empty
from thinkimg.data.records.values import has_values, refuse, require_schema
from thinkimg.records import AnswerType

VERSION = 1
TITLE = "ScienceQA"
COLUMNS = ({"question", "choices", "answer", "hint", "lecture", "image"},)
READS = {"question", "choices", "answer", "hint", "image"}


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether there are choices, and the answer is an index; many a record has no picture."""
    if not has_values(record, COLUMNS, nullable=("image", "hint", "lecture")):
        return False
    return type(record.get("answer")) is int and isinstance(record.get("choices"), list | tuple)


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record, with its context before the question. Raises RowRefused without a picture."""
    require_schema(record, COLUMNS, fits)
    if record.get("image") is None:
        raise refuse("the record has no picture")
    hint, question = record.get("hint"), record.get("question")
    has_context = isinstance(hint, str) and isinstance(question, str) and not is_empty(hint)
    return Fields(
        f"{hint.strip()}\n{question}" if isinstance(hint, str) and has_context else question,
        record.get("image"),
        record.get("answer"),
        choices=record.get("choices"),
        answer_type=AnswerType.CHOICE,
        changes=("context put before the question",) if has_context else (),
    )
