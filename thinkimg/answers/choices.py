"""Choices: named by their text, by a letter, or by both."""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from thinkimg.answers.numbers import read_number
from thinkimg.answers.text import MAX_WRAPPED_LENGTH, fold, normalise, strip_wrapping

LETTER_FIRST = re.compile(r"[(\[{]?\s*([a-z])(?:\s*[)\]}.:,、=–—-]+\s*|\s+|$)(.*)", re.DOTALL)
"""'b', '(b)', 'b. blue', 'b) blue', 'b blue', 'b (blue)', in lower case."""
LETTER_LAST = re.compile(r"(.*\S)\s*[(\[]\s*([a-z])\s*[)\]]", re.DOTALL)
"""'blue (b)'."""
OWN_LETTER = re.compile(r"\s*[(\[]?([A-Za-z])[)\].:]+\s*(\S.*)", re.DOTALL)
"""Choice that carries its letter: '(B) blue'."""
BARE_LETTER = re.compile(r"[(\[]?([A-Z])[)\].:]*")
LETTERED_TEXT = re.compile(
    r"(?:[(\[]([A-Z])[)\]][.:]?|([A-Z])(?:[)\]]|:(?=\s))|([A-Z])\.(?=\s*[a-z0-9]))\s*(\S.*)", re.DOTALL
)
"""Right answer with the letter of an option that nobody knows: '(A) red', 'A. red', but not the name 'A. Monk'."""
PROSE = re.compile(
    r"\A(?:(?:so|thus|hence|therefore),?\s+)?"
    r"(?:(?:it|this|that)\s+is\b|it's\b|i\s+(?:choose|chose|pick|select)\b"
    r"|(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)?(?:answer\s+is\b|(?:option|choice|letter)\b(?:\s+is\b)?))"
    r"\s*:?\s*(?=\S)"
)
"""Words that people put in front of the choice, in lower case: 'it is', 'option', 'the best choice is'."""
ANY_CASE_PROSE = re.compile(PROSE.pattern, re.IGNORECASE)
MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
READINGS = (str.strip, fold, normalise)


def match_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that an answer names by text, letter ('B', '(b)', 'B.') or both ('B. red').

    Text comes before letter, the closer reading before the freer one, and a number's value last: 145 is 145°. "Option",
    "it is" and the like may stand in front. None where no choice fits, or several do.
    """
    texts = label_choices(choices)[1]
    for wordings in (choices, texts):
        if any(reading(text) == reading(answer) for reading in READINGS for text in wordings):
            return match_text(answer, wordings)
    if (index := match_letter(answer, choices)) is not None:
        return index
    if len(answer) > MAX_WRAPPED_LENGTH:
        return None
    plain = normalise(answer)
    shorter = PROSE.sub("", plain, count=1)
    return match_choice(shorter, choices) if shorter != plain else match_value(answer, texts)


def match_value(answer: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that is the answer's number, of which one may lack its unit; else None."""
    given = read_number(answer)
    if given is None:
        return None
    values = [read_number(choice) for choice in choices]
    fits = [index for index, value in enumerate(values) if value is not None and given.is_near(value, Fraction(0))]
    return fits[0] if len(fits) == 1 else None


def match_text(answer: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice with this text, by the closest reading; None where none fits, or several do."""
    for reading in READINGS:
        fits = [index for index, choice in enumerate(choices) if reading(choice) == reading(answer)]
        if fits:
            return fits[0] if len(fits) == 1 else None
    return None


def match_letter(answer: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice with this letter: its own where all carry one, else A is the first.

    A text beside the letter must be that of the choice.
    """
    letters, texts = label_choices(choices)
    for letter, text in read_letters(answer):
        if letter not in letters:
            continue
        index = letters.index(letter)
        if not text or normalise(text) in (normalise(texts[index]), normalise(choices[index])):
            return index
    return None


def label_choices(choices: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return (letters in lower case, texts) of choices: the letters that they carry, else a, b, c for the first 26."""
    own = [match for choice in choices if (match := OWN_LETTER.fullmatch(choice))]
    letters = [match[1].casefold() for match in own]
    if choices and len(set(letters)) == len(choices):
        return letters, [match[2] for match in own]
    return [chr(ord("a") + index) for index in range(min(len(choices), 26))], list(choices)


def read_letters(answer: str) -> list[tuple[str, str]]:
    """Return the readings of an answer as (letter in lower case, text beside it or nothing)."""
    if len(answer) > MAX_WRAPPED_LENGTH:
        return []
    plain = MARKUP.sub(r"\1", answer.replace("**", ""))
    # Full-width brackets and letters, as in Chinese texts.
    plain = normalise(unicodedata.normalize("NFKC", plain))
    readings = []
    if first := LETTER_FIRST.fullmatch(plain):
        readings.append((first[1], first[2].strip()))
    if last := LETTER_LAST.fullmatch(plain):
        readings.append((last[2], last[1]))
    return readings


def is_lettered(right: str) -> bool:
    """Tell whether a right answer without choices is a letter, or has one in front: 'B', '(B) blue'."""
    return bool(BARE_LETTER.fullmatch(right.strip()) or LETTERED_TEXT.fullmatch(right.strip()))


def match_lettered(answer: str, right: str) -> bool:
    """Tell whether an answer is a lettered right answer, whose options nobody knows, by letter, text or both.

    The letter is a capital one. What follows the letter of a bare right one cannot be checked, but may be no other.
    """
    answer = strip_wrapping(ANY_CASE_PROSE.sub("", strip_wrapping(MARKUP.sub(r"\1", answer)), count=1))
    letter = answer if BARE_LETTER.fullmatch(answer) else None
    given = OWN_LETTER.fullmatch(answer)
    lettered = LETTERED_TEXT.fullmatch(right.strip())
    if not lettered:
        bare = BARE_LETTER.fullmatch(right.strip())
        is_plain = given is not None and BARE_LETTER.fullmatch(given[2].strip()) is None
        return bare is not None and bare[1] == (letter or (given[1] if given and is_plain else None))
    wanted, text = lettered[1] or lettered[2] or lettered[3], normalise(lettered[4])
    if given:
        return given[1] == wanted and normalise(given[2]) == text
    return letter == wanted or normalise(answer) == text
