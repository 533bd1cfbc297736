"""Choices: named by their text, by a letter, or by both."""

import re
from collections.abc import Sequence

from thinkimg.answers.text import fold, normalise

LETTERED = re.compile(r"[(\[]?([a-z])(?:[)\].:]+(?:\s*(\S.*))?)?", re.DOTALL)
OWN_LETTER = re.compile(r"\s*[(\[]?([A-Za-z])[)\].:]+\s*(\S.*)", re.DOTALL)
"""Choice that carries its letter: '(B) blue'."""


def match_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that an answer names by text, letter ('B', '(b)', 'B.') or both ('B. red').

    Text comes before letter, and the closer reading before the freer one. None where no choice fits, or several do.
    """
    readings = (str.strip, fold, normalise)
    named_by_text = any(reading(choice) == reading(answer) for reading in readings for choice in choices)
    return match_text(answer, choices) if named_by_text else match_letter(answer, choices)


def match_text(answer: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice with this text, by the closest reading; None where none fits, or several do."""
    for reading in (str.strip, fold, normalise):
        fits = [index for index, choice in enumerate(choices) if reading(choice) == reading(answer)]
        if fits:
            return fits[0] if len(fits) == 1 else None
    return None


def match_letter(answer: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice with this letter: its own where all carry one, else A is the first.

    A text after the letter must be that of the choice.
    """
    lettered = LETTERED.fullmatch(normalise(answer))
    if not lettered:
        return None
    own = [match for choice in choices if (match := OWN_LETTER.fullmatch(choice))]
    letters = [match[1].casefold() for match in own]
    texts = [match[2] for match in own]
    if len(set(letters)) < len(choices):
        letters, texts = [chr(ord("a") + index) for index in range(min(len(choices), 26))], list(choices)
    if lettered[1] not in letters:
        return None
    index = letters.index(lettered[1])
    return index if not lettered[2] or normalise(lettered[2]) == normalise(texts[index]) else None
