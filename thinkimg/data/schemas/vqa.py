"""Schema of visual question answering: DocVQA, InfoVQA, TextVQA, VQAv2 (lists of answers), ChartQA, GQA."""

import re
from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.values import first_of, has_values, refuse, require_schema
from thinkimg.records import AnswerType

VERSION = 1
TITLE = "VQA: DocVQA, InfoVQA, TextVQA, VQAv2, ChartQA, GQA"
LISTED, TEST = {"question", "answers", "image"}, {"questionId", "question", "answers", "image"}
DOCUMENTS, GQA = {"questionId", "data_split"}, {"question", "answer", "fullAnswer", "imageId"}
CHARTS = ({"query", "label", "image"}, {"query", "label", "imgname"}, {"question", "answer", "type", "image"})
COLUMNS = (LISTED, TEST, GQA, *CHARTS)
READS = {"question", "answers", "image", "answer", "imageId", "query", "label", "imgname"}
JOIN = ("imageId", "id")
"""Column of GQA's questions, and that of its table of images: the joined record has the column `image`, too."""
ANNOTATORS = 10
CHART_TOLERANCE = 0.05
"""Relaxed accuracy of ChartQA (arXiv 2203.10244, section 5)."""
YEAR = re.compile(r"(?:1[5-9]|20)[0-9]{2}")


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether the answers are a list, or the record one of a chart or of GQA."""
    if has_values(record, (LISTED,)) or has_values(record, (TEST,), nullable=("answers",)):
        return record.get("answer") is None and isinstance(record.get("answers"), list | tuple | None)
    if has_values(record, (GQA,)):
        return isinstance(record.get("imageId"), str | int)
    if has_values(record, CHARTS[:2]):
        return isinstance(record.get("label"), list | str) and isinstance(record.get("query"), str)
    kind = record.get("type")
    return has_values(record, CHARTS[2:]) and isinstance(kind, str) and kind.startswith(("human", "augmented"))


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record, with the comparison of its benchmark."""
    require_schema(record, COLUMNS, fits)
    question, image = record.get("question"), record.get("image")
    if has_values(record, (LISTED, TEST), nullable=("answers",)) and record.get("answer") is None:
        listed = record.get("answers") or ()
        answers = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in listed]
        kind = AnswerType.TEXT if has_values(record, (DOCUMENTS,)) else None
        kind = AnswerType.VOTES if len(answers) == ANNOTATORS else kind
        return Fields(question, image, answers or None, answer_type=kind)
    if has_values(record, (GQA,)):
        if image is None:
            raise refuse("imageId names a picture of another table, which is not joined")
        return Fields(
            question,
            image,
            record.get("answer"),
            answer_type=AnswerType.EXACT,
            group=record.get("imageId"),
        )
    question, answer = first_of(record, "query", "question"), first_of(record, "label", "answer")
    kind = _chart_type(question, answer)
    tolerance = CHART_TOLERANCE if kind is AnswerType.NUMBER else None
    return Fields(question, first_of(record, "image", "imgname"), answer, answer_type=kind, tolerance=tolerance)


def _chart_type(question: Any, answer: Any) -> AnswerType:
    """Return the comparison of a chart's answer: a year that is asked for exactly, all else by relaxed accuracy."""
    gold = answer[0] if isinstance(answer, list | tuple) and len(answer) == 1 else answer
    asks_year = isinstance(question, str) and re.search(r"\b(?:years?|when)\b", question, re.IGNORECASE)
    is_year = asks_year and isinstance(gold, str | int) and YEAR.fullmatch(str(gold).strip())
    return AnswerType.INTEGER if is_year else AnswerType.NUMBER
