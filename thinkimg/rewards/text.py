"""Comparison of texts: answers come with capitals, brackets and full stops that mean nothing."""

import re
import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

MAX_WRAPPED_LENGTH = 1000  # characters; longer answers are compared as they are
WRAPPERS = ("()", "[]", "{}", '""', "''", "``", "“”", "‘’", "«»", "**", "__", "$$")


def fold(text: str) -> str:
    """Return a text without case and with single spaces. NFC and not NFKC, which would make m2 of m²."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def strip_wrapping(text: str) -> str:
    """Return a text without the brackets, quotes or asterisks around it, and without punctuation at its end.

    Signs and points in front stay, for they belong to numbers. A text of nothing else is returned as it is.
    """
    inner = text.strip()
    while len(inner) <= MAX_WRAPPED_LENGTH:
        shorter = inner.rstrip(" .,;:!?")
        pair = shorter[:1] + shorter[-1:]
        # Not "(a) or (b)": the brackets must belong together.
        if len(shorter) > 1 and pair in WRAPPERS and not set(shorter[1:-1].strip(pair)) & set(pair):
            shorter = shorter[1:-1].strip()
        if shorter == inner or not shorter:
            break
        inner = shorter
    return inner


def normalise(text: str) -> str:
    """Return a text without its wrapping and case, for comparisons."""
    return fold(strip_wrapping(text))


def match_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Return the index of the choice that an answer names by text, letter ('B', '(b)', 'B.') or both ('B. red').

    Text comes before letter, and the closer reading before the freer one. None where no choice fits, or several do.
    """
    for reading in (str.strip, fold, normalise):
        fits = [index for index, choice in enumerate(choices) if reading(choice) == reading(answer)]
        if fits:
            return fits[0] if len(fits) == 1 else None
    lettered = re.fullmatch(r"[(\[]?([a-z])(?:[)\].:]+(?:\s*(\S.*))?)?", normalise(answer), re.DOTALL)
    if not lettered:
        return None
    index = ord(lettered[1]) - ord("a")
    if index >= len(choices) or (lettered[2] and normalise(lettered[2]) != normalise(choices[index])):
        return None
    return index


def anls(answer: str, right: str, threshold: float = 0.5) -> tuple[float, float]:
    """Return (reward, similarity) of two texts, in [0, 1]; similarity = 1 - normalised Levenshtein distance.

    The reward is the similarity, or 0 where the distance reaches the threshold. Scene Text Visual Question Answering
    (arXiv 1905.13648), eq. 1, for one right answer; case and white space don't count.
    """
    distance = Levenshtein.normalized_distance(fold(answer), fold(right))
    return (1 - distance if distance < threshold else 0.0), 1 - distance
