"""Right answers as a data set has them, read as the reward will read them, or refused."""

import json
import re
from collections.abc import Sequence
from typing import Any

from thinkimg.answers.boxes import read_box
from thinkimg.answers.choices import match_letter, match_text
from thinkimg.answers.compare import Right, is_paid
from thinkimg.answers.formulas import may_be_formula
from thinkimg.answers.numbers import read_number
from thinkimg.answers.text import drop_invisible, strip_label
from thinkimg.records import AnswerType

OWN_NUMBER = re.compile(r"\s*[(\[]?([0-9]{1,2})[)\].:、]+(?:\s+\S|[^\s0-9]).*", re.DOTALL)
"""Choice that carries its number: '(2) blue', '2. blue', but not 2.5."""


def read_right(value: Any, text: str, answer_type: AnswerType, *, tolerance: float | None = None) -> str:
    """Return a right answer that is no choice, as it is stored. Raises ValueError where the reward could not read it.

    value: as the source has it. text: the same as a text. tolerance: the data set's own; words are right answers, too,
    where it has one, as in ChartQA.
    """
    text = strip_label(text)
    match answer_type:
        case AnswerType.NUMBER | AnswerType.INTEGER:
            # JSON's true is no 1; a number of the source is read from its digits.
            number = None if isinstance(value, bool) else read_number(text)
            if number is None and tolerance is None:
                raise ValueError("is no number")
            if answer_type is AnswerType.INTEGER and (number is None or number.value.denominator > 1):
                raise ValueError("is no whole number")
        case AnswerType.BOX:
            box = read_box(text)
            text = json.dumps(list(box or ()))
            if box is None or read_box(text) != box:
                raise ValueError("is no box of four numbers x, y, width, height")
        case AnswerType.MATHS:
            if not may_be_formula(text):
                raise ValueError("is no formula")
    return text


def can_be_right(sample: Right) -> bool:
    """Tell whether the right answers of a sample are paid for: each of them scores 1 under the sample's own type.

    That of annotators scores what they agree on, and a sentence is for a judge: these need to be texts.
    """
    match sample.answer_type:
        case AnswerType.JUDGE | AnswerType.VOTES:
            return bool(sample.answers) and all(answer.strip() for answer in sample.answers)
        case AnswerType.CHOICE if sample.choices:
            return all(is_paid(answer, sample) and answer in sample.choices for answer in sample.answers)
    try:
        for answer in sample.answers:
            read_right(answer, answer, sample.answer_type, tolerance=sample.tolerance)
    except ValueError:
        return False
    return bool(sample.answers) and all(is_paid(answer, sample) for answer in sample.answers)


def read_choice(value: Any, text: str, choices: Sequence[str], form: str, *, ambiguous: bool) -> str:
    """Return the choice that is right. Raises ValueError where none is, or where two readings differ.

    form: `data.answer_is`. With "any", a number is an index from 0, and a text is a choice's text or its letter.
    ambiguous: digits may be either, since a choice is a number itself, or since the source, such as CSV, has no types.
    """
    text = strip_label(drop_invisible(text))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    either = ambiguous and (is_number or re.fullmatch("-?[0-9.]+", text) is not None)
    index = int(text) if re.fullmatch("[0-9]{1,6}", text) and int(text) < len(choices) else None
    by_text = match_text(text, choices)
    readings: dict[str, int | None] = {}
    if form == "text" or (form == "any" and (either or not is_number)):
        readings["text"] = by_text
    if form == "letter" or (form == "any" and not is_number):
        readings["letter"] = match_letter(text, choices)
    if form in ("any", "letter") and (own := _own_numbers(choices)) and text.isdecimal():
        readings["own number"] = own.index(text) if text in own else None
    if form == "index" or (form == "any" and (either or is_number)):
        readings["index"] = index
    named = {reading: choices[index] for reading, index in readings.items() if index is not None}
    if len(set(named.values())) > 1:
        meanings = " or ".join(f"by {reading} {ascii(choice)}" for reading, choice in named.items())
        raise ValueError(f"may be {meanings}: set data.answer_is")
    if not named:
        if by_text is not None or index is not None:  # a form that is not read: 2010 of "2009" and "2010"
            reading = "text" if by_text is not None else "index"
            raise ValueError(f"is, by {' or '.join(readings)}, none of the choices; data.answer_is={reading} fits")
        forms = ["index from 0" if reading == "index" else reading for reading in readings]
        raise ValueError(f"is, by {' or '.join(forms)}, none of the choices")
    return next(iter(named.values()))


def _own_numbers(choices: Sequence[str]) -> list[str]:
    """Return the consecutive numbers, from 0 or from 1, that all choices carry; none where one carries none."""
    matches = [OWN_NUMBER.fullmatch(choice) for choice in choices]
    numbers = [match[1] for match in matches if match]
    series = ([str(start + place) for place in range(len(choices))] for start in (0, 1))
    return numbers if numbers in series else []
