"""Schema of questions with lettered options in columns: HR-Bench, MMBench, MME-RealWorld, TreeBench, TreeVGR."""

import string
from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields, is_empty
from thinkimg.data.records.values import (
    first_of,
    has_options,
    has_values,
    is_letter,
    read_boxes,
    refuse,
    require_schema,
)  # fmt: skip
from thinkimg.data.texts.literals import read_literal
from thinkimg.records import AnswerType

VERSION = 1
TITLE = "lettered options: HR-Bench, MMBench, MME-RealWorld, TreeBench, TreeVGR"
IMAGES = ("image", "bytes", "images", "image_path", "Image", "path")
LISTS = ("multi-choice options", "Answer choices")
QUESTIONS, ANSWERS = ("question", "problem", "Text"), ("answer", "solution", "Ground truth")
COLUMNS = (
    *({"question", "answer", "A", "B", image} for image in IMAGES[:4]),
    *({"question", "answer", LISTS[0], image} for image in IMAGES[:4]),
    {"Image", "Text", LISTS[1], "Ground truth"},
    *(
        {question, answer, "target_instances", image}
        for question in QUESTIONS[:2]
        for answer in ANSWERS[:2]
        for image in IMAGES[:4]
    ),
)
READS = {*IMAGES, *LISTS, *QUESTIONS, *ANSWERS, *string.ascii_uppercase, "target_instances", "hint"}


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether question and answer are texts."""
    if not has_values(record, COLUMNS):
        return False
    return all(isinstance(first_of(record, *columns), str) for columns in (QUESTIONS, ANSWERS))


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record. Raises RowRefused where the right letter has no option."""
    require_schema(record, COLUMNS, fits)
    question, answer, hint = first_of(record, *QUESTIONS), first_of(record, *ANSWERS), record.get("hint")
    hint = None if is_empty(hint) else hint
    choices = _choices(record)
    if not choices and is_letter(answer) and not has_options(question):
        raise refuse("the answer is a letter, but there are no options")
    return Fields(
        f"{hint.strip()}\n{question}" if isinstance(hint, str) and hint.strip() else question,
        first_of(record, *IMAGES),
        answer,
        choices=choices or None,
        answer_type=AnswerType.CHOICE if choices else None,
        targets=read_boxes(record.get("target_instances"), "target_instances"),
        box_form="xyxy" if record.get("target_instances") is not None else None,
        changes=("hint put before the question",) if isinstance(hint, str) and hint.strip() else (),
    )


def _choices(record: Mapping[str, Any]) -> list[Any]:
    """Return the options of the columns A, B, … or of the list."""
    values = [record.get(letter) for letter in string.ascii_uppercase]
    filled = [not is_empty(value) for value in values]
    if any(filled[1:]):
        count = sum(filled)
        if not all(filled[:count]):
            raise refuse("a column of the options is empty, and a later one is not")
        return values[:count]
    options = read_literal(first_of(record, *LISTS))
    if isinstance(options, str) and options.strip():
        options = [line for line in options.split("\n") if line.strip()]
    if options and (not isinstance(options, list | tuple) or len(options) < 2):
        raise refuse("the options are no list")
    return list(options or ())
