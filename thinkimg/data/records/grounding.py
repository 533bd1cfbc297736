"""Objects of ms-swift's records for grounding: names and boxes for the places `<ref-object>` and `<bbox>` of texts."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import BoxForm, Fields
from thinkimg.data.records.values import read_boxes, refuse
from thinkimg.records import AnswerType

PLACES = ("<bbox>", "<ref-object>")
"""Marks in a text whose content is that of the objects."""


def fill_in_objects(fields: Fields, objects: Any) -> Fields:
    """Return the fields with the names of objects in the question, and the box that is the answer: x1 y1 x2 y2.

    Raises RowRefused where the answer is not one box alone, and where the question has a box.
    """
    if not isinstance(objects, Mapping) or "<bbox>" in fields.question:
        raise refuse("the question holds a box, or the objects are none")
    names, answer = objects.get("ref") or (), fields.answer
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise refuse("the objects' names are no texts")
    if not isinstance(answer, str) or "<bbox>" not in answer:
        raise refuse("the answer is no box, although the record has objects")
    parts = fields.question.split("<ref-object>")
    if len(names) < len(parts) - 1 + answer.count("<ref-object>"):
        raise refuse(f"there are {len(names)} names of objects for more places")
    question = "".join(text + name for text, name in zip(parts, (*names[: len(parts) - 1], ""), strict=True))
    boxes, form = read_boxes(objects.get("bbox"), "objects.bbox"), objects.get("bbox_type") or "real"
    is_first = objects.get("image_id") in (None, 0, [], [0])
    if answer.replace("<ref-object>", "").strip() != "<bbox>" or len(boxes) != 1 or not is_first:
        raise refuse("the answer is not one box of the only image")
    if form not in ("real", "norm1"):
        raise refuse("the boxes are neither in pixels nor 0..1")
    box_form: BoxForm = "xyxy" if form == "real" else "unit_xyxy"
    return Fields(question, fields.images, list(boxes[0]), answer_type=AnswerType.BOX, box_form=box_form)
