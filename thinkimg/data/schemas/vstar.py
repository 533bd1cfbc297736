"""Schema of V* Bench: a JSON file beside each picture, and its table of lettered questions."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.values import has_options, has_values, is_letter, read_boxes, refuse, require_schema
from thinkimg.records import AnswerType

VERSION = 1
TITLE = "V* Bench"
COLUMNS = ({"question", "options", "bbox", "target_object"}, {"image", "text", "category", "label"})
READS = {"question", "options", "bbox", "image", "text", "label"}


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether there is a list of options, or a text that has options and a letter that names one."""
    if not has_values(record, COLUMNS):
        return False
    if record.get("options") is not None:
        return isinstance(record.get("options"), list | tuple)
    return is_letter(record.get("label")) and has_options(record.get("text"))


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record; of a picture's JSON file, the first option is the right one."""
    require_schema(record, COLUMNS, fits)
    options = record.get("options")
    if options is None:
        choice = AnswerType.CHOICE
        return Fields(
            record.get("text"),
            record.get("image"),
            record.get("label"),
            answer_type=choice,
        )
    if len(options) < 2 or record.get("image") is None:
        raise refuse("there are no two options, or there is no picture beside the file")
    return Fields(
        record.get("question"),
        record.get("image"),
        options[0],
        choices=list(options),
        answer_type=AnswerType.CHOICE,
        targets=read_boxes(record.get("bbox"), "bbox"),
        box_form="xywh",
        shuffle=True,
        changes=("the first option is the right one",),
    )
