"""Formulas as people write them, before math-verify reads them as LaTeX."""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from thinkimg.answers.numbers import NUMBER_SIGNS, UNIT_COMMAND, plain_latex, read_number
from thinkimg.answers.text import strip_wrapping
from thinkimg.answers.units import fold_unit, is_unit

MAX_FORMULA_LENGTH = 500  # characters of a formula

MIXED = re.compile(r"(?<![\w.^\\}])(\d+) (\d+) ?/ ?(\d+)(?![\w./^])")
SIDE_BY_SIDE = re.compile(r"\d [\d.]")
BRACKETS = ("()", "[]", "{}")
RATIO = re.compile(r"[0-9]\s*:\s*[0-9]")
ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|([0-9.]+|[A-Za-z]))")
POWER = re.compile(r"[⁻⁰¹²³⁴-⁹]+")
POWER_SIGNS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
SIGNS = NUMBER_SIGNS | str.maketrans({"∞": r"\infty ", "·": r"\cdot ", "∪": r"\cup ", "∩": r"\cap "})
"""Signs that math-verify's grammar lacks, or knows in one form alone."""
COMMAND = re.compile(r"\\[A-Za-z]+")
VARIABLE = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
PERCENT = re.compile(r"%|\bpercent\b")
SCIENTIFIC = re.compile(r"\s*([+-]?[0-9]+\.?[0-9]*)[eE]([+-]?[0-9]{1,3})\s*")
GAP = re.compile(r"[${}]|\\[,;: ]")
NUMERIC = re.compile(r"\s*[+-]?[^A-Za-z+-]*[0-9][^A-Za-z+-]*")
LAST_WORD = re.compile(r"(?<![A-Za-zμΩ°²³/\\])[A-Za-zμΩ°][A-Za-zμΩ°²³/]*\Z")


@dataclass(frozen=True)
class Verdict:
    """Result of a comparison."""

    equal: bool
    reason: str | None = None
    """Reason why nothing was compared."""


def compare_texts(answer: str, right: str) -> Verdict | None:
    """Return the verdict on a formula where the texts decide; None where mathematics has to.

    Case counts: X is not x. A ratio is no fraction: 1:3 is not 1/3. Units count where both have one: 5 cm is not 5 mm,
    and 30 is not 30%. Mathematics knows none of these.
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
    # (1,234) is a point.
    if not (_brackets(answer) or _brackets(right)) and (verdict := _compare_numbers(answer, right)):
        return verdict
    units = read_unit(answer), read_unit(right)
    is_other = _differ_in_case(answer, right) or (all(units) and units[0] != units[1])
    return Verdict(False) if is_other or bool(RATIO.search(answer)) != bool(RATIO.search(right)) else None


def _compare_numbers(answer: str, right: str) -> Verdict | None:
    """Return the verdict on two numbers: equal ones in any form, and a share that only one of them states."""
    given, wanted = (read_number(plain_latex(text)) for text in (answer, right))
    # Of 5xy mathematics decides: it may be a product.
    if given is None or wanted is None or any(unit and not is_unit(unit) for unit in (given.unit, wanted.unit)):
        return None
    if bool(given.unit) == bool(wanted.unit) and given.is_near(wanted, Fraction(0)):
        return Verdict(True)
    return Verdict(False) if PERCENT.search(answer) or PERCENT.search(right) else None


def _differ_in_case(one: str, other: str) -> bool:
    """Tell whether the variables of two formulas, as single letters, are the same but for case."""
    texts = (COMMAND.sub(" ", UNIT_COMMAND.sub(r" \1 ", strip_wrapping(text))) for text in (one, other))
    letters, others = (set(VARIABLE.findall(text)) for text in texts)
    return letters != others and {*map(str.lower, letters)} == {*map(str.lower, others)}


def read_unit(text: str) -> str:
    r"""Return the usual unit of a formula, as `fold_unit` does: cm of 2\sqrt{3}\text{ cm} and of x = 2√3 cm.

    Outside of \text it stands after a number: in 3k + 2m these are variables.
    """
    plain = GAP.sub(" ", plain_latex(strip_wrapping(text).rstrip(" $"))).replace(" / ", "/").strip()
    word = LAST_WORD.search(plain)
    if word is None or not is_unit(word[0]):
        return ""
    number = COMMAND.sub("", plain[: word.start()].rpartition("=")[2])
    return fold_unit(word[0]) if UNIT_COMMAND.search(text) or NUMERIC.fullmatch(number) else ""


def _same(one: str, other: str) -> bool:
    return " ".join(one.split()) == " ".join(other.split())


def _brackets(text: str) -> str:
    pair = text.strip(" .$")
    pair = pair[:1] + pair[-1:]
    return pair if pair in BRACKETS and "," in text else ""


def plain_formula(text: str) -> str:
    r"""Return a formula with Unicode's signs in ASCII and LaTeX: 2⅔ is 2 2/3, 2√3 is 2\sqrt{3}, x² is x^{2}.

    Degrees go: 60° is 60.
    """
    signs = []
    for index, sign in enumerate(text):
        if unicodedata.category(sign) == "No" and "⁄" in (fraction := unicodedata.normalize("NFKC", sign)):
            gap = " " if index and text[index - 1].isdecimal() else ""
            sign = gap + fraction
        signs.append(sign)
    text = POWER.sub(lambda power: f"^{{{power[0].translate(POWER_SIGNS)}}}", "".join(signs)).translate(SIGNS)
    text = SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text) if SCIENTIFIC.fullmatch(text) else text
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
