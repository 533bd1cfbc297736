"""Formulas as people write them, before math-verify reads them as LaTeX."""

import re
import unicodedata
from dataclasses import dataclass

from thinkimg.answers.text import strip_wrapping

MAX_FORMULA_LENGTH = 500  # characters of a formula

MIXED = re.compile(r"(?<![\w.^\\}])(\d+) (\d+) ?/ ?(\d+)(?![\w./^])")
SIDE_BY_SIDE = re.compile(r"\d [\d.]")
BRACKETS = ("()", "[]", "{}")
RATIO = re.compile(r"[0-9]\s*:\s*[0-9]")
ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|([0-9.]+|[A-Za-z]))")


@dataclass(frozen=True)
class Verdict:
    """Result of a comparison."""

    equal: bool
    reason: str | None = None
    """Reason why nothing was compared."""


def compare_texts(answer: str, right: str) -> Verdict | None:
    """Return the verdict on a formula where the texts decide; None where mathematics has to.

    Case counts: X is not x. A ratio is no fraction: 1:3 is not 1/3.
    """
    if _same(strip_wrapping(answer), strip_wrapping(right)):
        # [1, 2] is 1, 2 without brackets, but no (1, 2).
        pairs = {bracket for bracket in (_brackets(answer), _brackets(right)) if bracket}
        return Verdict(True) if len(pairs) < 2 else None
    if len(answer) > MAX_FORMULA_LENGTH:
        return Verdict(False, "The answer is too long for a formula.")
    is_word = re.fullmatch(r"[^\W\d_]{3,}", strip_wrapping(right)) is not None
    if len(right) > MAX_FORMULA_LENGTH or is_word:
        # A word would be read as the product of its letters, and "lube" would equal "blue".
        return Verdict(False)
    if bool(RATIO.search(answer)) != bool(RATIO.search(right)):
        return Verdict(False)
    return None


def _same(one: str, other: str) -> bool:
    return " ".join(one.split()) == " ".join(other.split())


def _brackets(text: str) -> str:
    pair = text.strip(" .$")
    pair = pair[:1] + pair[-1:]
    return pair if pair in BRACKETS and "," in text else ""


def plain_formula(text: str) -> str:
    r"""Return a formula with Unicode's signs in ASCII and LaTeX: 2⅔ is 2 2/3, 2√3 is 2\sqrt{3}, and 60° is 60."""
    signs = []
    for index, sign in enumerate(text):
        if unicodedata.category(sign) == "No" and "⁄" in (fraction := unicodedata.normalize("NFKC", sign)):
            gap = " " if index and text[index - 1].isdecimal() else ""
            sign = gap + fraction
        signs.append(sign)
    text = "".join(signs).replace("⁄", "/")
    text = re.sub(r"\s*(?:°|\^\{?\\circ\}?)(?![A-Za-z])", "", text)
    return ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)


def sum_mixed(text: str) -> str:
    """Return a formula with its mixed numbers as sums: 2 2/3 is (2+2/3); an improper fraction stays as it is."""
    return MIXED.sub(_add_fraction, text)


def _add_fraction(mixed: re.Match[str]) -> str:
    whole, numerator, denominator = mixed.groups()
    is_proper = len(numerator) <= len(denominator) < 20 and int(numerator) < int(denominator)
    return f"({whole}+{numerator}/{denominator})" if is_proper else mixed[0]


def may_be_formula(text: str) -> bool:
    """Tell whether a text may be a formula: it has a letter or digit, and no two numbers stand side by side.

    A text of more than MAX_FORMULA_LENGTH characters is none, for it is not compared as one.
    """
    text = " ".join(text.split())
    if len(text) > MAX_FORMULA_LENGTH:
        return False
    text = " ".join(plain_formula(text).split())
    if not any(map(str.isalnum, text)):
        return False
    return "\\" in text or SIDE_BY_SIDE.search(sum_mixed(text)) is None
