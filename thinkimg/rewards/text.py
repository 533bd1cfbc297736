"""Texts made comparable: answers come with capitals, brackets and full stops that mean nothing."""

import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

MAX_WRAPPED = 1000  # characters; longer answers are compared as they are
PAIRS = ("()", "[]", "{}", '""', "''", "``", "“”", "‘’", "«»", "**", "__", "$$")


def fold(text: str) -> str:
    """Without case, and with single spaces. NFC and not NFKC, which would make m2 of m²."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def unwrap(text: str) -> str:
    """Without what is around a text: pairs of brackets, quotes or asterisks, and punctuation at the end.

    Signs and points in front stay, for they belong to numbers. A text of nothing else is kept as it is.
    """
    inner = text.strip()
    while len(inner) <= MAX_WRAPPED:
        shorter = inner.rstrip(" .,;:!?")
        pair = shorter[:1] + shorter[-1:]
        # Not "(a) or (b)": the brackets must belong together.
        if len(shorter) > 1 and pair in PAIRS and not set(shorter[1:-1].strip(pair)) & set(pair):
            shorter = shorter[1:-1].strip()
        if shorter == inner or not shorter:
            break
        inner = shorter
    return inner


def plain(text: str) -> str:
    return fold(unwrap(text))


def choose(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that an answer names, by its text, its letter ('B', '(b)', 'B.') or both ('B. red').

    Text comes before letter, the closer reading before the freer one; None where none fits or several do.
    """
    for reading in (str.strip, fold, plain):
        fits = [index for index, choice in enumerate(choices) if reading(choice) == reading(answer)]
        if fits:
            return fits[0] if len(fits) == 1 else None
    lettered = re.fullmatch(r"[(\[]?([a-z])(?:[)\].:]+(?:\s*(\S.*))?)?", plain(answer), re.DOTALL)
    if not lettered:
        return None
    index = ord(lettered[1]) - ord("a")
    if index >= len(choices) or (lettered[2] and plain(lettered[2]) != plain(choices[index])):
        return None
    return index


def anls(answer: str, right: str, threshold: float = 0.5) -> tuple[float, float]:
    """(reward, similarity) in [0, 1] of two texts: 1 - normalised Levenshtein distance, reward 0 from the threshold on.

    Scene Text Visual Question Answering (arXiv 1905.13648), eq. 1, for one right answer; case and white space don't count.
    """
    distance = Levenshtein.normalized_distance(fold(answer), fold(right))
    return (1 - distance if distance < threshold else 0.0), 1 - distance
