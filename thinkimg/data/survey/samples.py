"""Samples of rows whose pictures were decoded: their boxes are x, y, width, height in pixels."""

import json

from thinkimg.answers.boxes import BoxXYWH
from thinkimg.data.fields import BoxForm
from thinkimg.data.refusal import Reason, RowRefused
from thinkimg.data.survey.box_checks import numbers_of
from thinkimg.data.survey.box_forms import Numbers, Size, place_box
from thinkimg.data.survey.passes import LookedRow
from thinkimg.records import AnswerType, Sample


def make_sample(looked: LookedRow, form: BoxForm | None, source: str) -> Sample:
    """Return the sample of a row, without its side of the split and without the user's columns.

    form: of boxes, for rows that state none. Raises RowRefused for a box that does not lie in the (first) picture,
    and for one that is the answer of several pictures.
    """
    row, form, size = looked.row, looked.row.box_form or form, looked.size
    answers = row.answers
    targets = [_place(numbers, form, size, Reason.TARGET) for numbers in row.targets]
    if row.answer_type is AnswerType.BOX:
        if len(looked.pictures) > 1:
            detail = f"the answer is a box, and it is not known in which of {len(looked.pictures)} pictures"
            raise RowRefused(Reason.ANSWER, detail)
        right = [numbers_of(answer) for answer in answers]
        if None in right:
            raise RowRefused(Reason.ANSWER, "the answer is no box of four numbers")
        answers = tuple(json.dumps(_place(numbers, form, size, Reason.ANSWER)) for numbers in right if numbers)
    return Sample(
        sample_id=row.id,
        question=row.question,
        answers=answers,
        answer_type=row.answer_type,
        choices=row.choices,
        images=tuple(picture.sha256 for picture in looked.pictures),
        source=source,
        split="",
        targets=tuple(targets),
        tolerance=row.tolerance,
        decimals=row.decimals,
        order=row.order,
    )


def _place(numbers: Numbers, form: BoxForm | None, size: Size, reason: Reason) -> BoxXYWH:
    assert form is not None, "a row has boxes, so their form is stated or was found"
    box = place_box(numbers, form, size)
    if box is None:
        detail = f"the box {list(numbers)} ({form}) does not lie inside its picture of {size[0]}x{size[1]}"
        raise RowRefused(reason, detail)
    return box
