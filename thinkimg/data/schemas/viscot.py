"""Schema of Visual-CoT: questions with the box that answers them, and the form for LLaVA."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.conversations import is_conversation, read_turns
from thinkimg.data.records.values import first_of, has_values, read_boxes, refuse, require_schema

VERSION = 1
TITLE = "Visual-CoT"
COLUMNS = (
    *({"question", "answer", image, boxes} for image in ("image", "images") for boxes in ("bboxs", "bboxes")),
    {"conversations", "image"},
)
READS = {"question", "answer", "image", "images", "bboxs", "bboxes", "possible_answers", "conversations"}
FOLDERS = {"textcap": "textvqa"}
"""Folder of pictures of the data sets that have none of their own."""
MARK = "###"
REQUESTS = (
    " Please provide the bounding box coordinate of the region",
    " Please think step by step and provide the bounding box coordinate of the region",
)


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether the question is a text; in the form for LLaVA, whether an image has a box behind its path."""
    if not has_values(record, COLUMNS):
        return False
    if record.get("conversations") is None:
        return isinstance(record.get("question"), str)
    return is_conversation(record.get("conversations")) and _marked(record.get("image")) is not None


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record; boxes are x1 y1 x2 y2 in pixels."""
    require_schema(record, COLUMNS, fits)
    if record.get("conversations") is not None:
        return _from_llava(record)
    image, dataset = first_of(record, "image", "images"), record.get("dataset")
    if isinstance(image, str) and "/" not in image and isinstance(dataset, str):
        image = f"cot/{FOLDERS.get(dataset, dataset)}/{image}"
    targets = read_boxes(first_of(record, "bboxs", "bboxes"), "bboxs")
    answers = record.get("possible_answers")
    return Fields(
        record.get("question"), image, record.get("answer"), answers or None, targets=targets, box_form="xyxy"
    )


def _from_llava(record: Mapping[str, Any]) -> Fields:
    turns = [turn for turn in read_turns(record.get("conversations")) if turn.role != "system"]
    if [turn.role for turn in turns] != ["user", "assistant", "user", "assistant"] or "[" not in turns[1].text:
        raise refuse("the conversation is not a question, a box, the region and the answer")
    question = turns[0].text
    for request in REQUESTS:
        question = question.partition(request)[0]
    path, _, box = (_marked(record.get("image")) or "").partition(MARK)
    changes = ("question and last answer read from a conversation",)
    targets = read_boxes(box, "the box behind the image's path")
    return Fields(question, path, turns[3].text, targets=targets, box_form="xyxy", changes=changes)


def _marked(images: Any) -> str | None:
    """Return the path with a box behind it, of an image and its region; None for other images."""
    if isinstance(images, list | tuple) and len(images) == 2 and all(isinstance(image, str) for image in images):
        return images[1] if images[1].startswith(f"{images[0]}{MARK}") else None
    return None
