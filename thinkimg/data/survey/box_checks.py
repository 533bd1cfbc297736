"""Checks of boxes: each lies inside its upright picture, under exactly one form."""

import json
from collections.abc import Sequence

from thinkimg.data.row import RawRow
from thinkimg.data.settings import RowsConfig
from thinkimg.data.survey.box_forms import Numbers, PlacedBox, Size, count_fits, fits_centred
from thinkimg.data.survey.oddity import Level, Oddity
from thinkimg.records import AnswerType


def numbers_of(answer: str) -> Numbers | None:
    """Return the four numbers of a right answer that is a box in any form: a JSON list. None for any other text."""
    try:
        a, b, c, d = map(float, json.loads(answer))
    except (ValueError, TypeError):
        return None
    return a, b, c, d


def list_boxes(row: RawRow, size: Size) -> list[PlacedBox]:
    """Return the boxes of a row whose form is still to be found. size: of its first picture."""
    if row.box_form is not None:
        return []
    boxes = list(row.targets)
    if row.answer_type is AnswerType.BOX:
        boxes += [box for box in map(numbers_of, row.answers) if box]
    return [PlacedBox(row.where, box, size) for box in boxes]


def find_box_oddity(boxes: Sequence[PlacedBox], data: RowsConfig) -> list[Oddity]:
    """Return a question where several forms fit all boxes, or none does; else a warning that says what was guessed."""
    if not boxes or data.boxes != "auto":
        return []
    fits = count_fits(boxes)
    fitting = [form for form, count in fits.items() if count == len(boxes)]
    example = f"{boxes[0].where} has {list(boxes[0].numbers)} in a picture of {boxes[0].size[0]}x{boxes[0].size[1]}"
    if fitting == ["unit_xywh"] and all(map(fits_centred, boxes)):
        sentence = (
            f"The boxes may be unit_xywh, or have their centres in place of corners, as YOLO writes them; {example}."
        )
        hint = "Set data.boxes=unit_xywh if they have corners; subtract half of the sides from centres."
        return [Oddity("box_form", len(boxes), sentence, Level.ASK, hint)]
    if len(fitting) == 1:
        sentence = f"{len(boxes)} boxes are read as {fitting[0]}, the only form in which all lie inside their pictures."
        return [Oddity("box_form", len(boxes), sentence, Level.WARN, form=fitting[0])]
    if fitting:
        sentence = f"The boxes may be {' or '.join(fitting)}: all {len(boxes)} lie inside their pictures; {example}."
        return [Oddity("box_form", len(boxes), sentence, Level.ASK, f"Set data.boxes={fitting[0]}, or another form.")]
    best = max(fits, key=lambda form: fits[form])
    counts = ", ".join(f"{form} {count}" for form, count in fits.items() if count) or "none of any"
    sentence = f"In no form do all {len(boxes)} boxes lie inside their pictures ({counts}); {example}."
    hint = f"Set data.boxes, perhaps to {best}; rows that it does not fit are refused then."
    return [Oddity("box_form", len(boxes), sentence, Level.ASK, hint)]
