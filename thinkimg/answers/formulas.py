"""Formulas as people write them, before math-verify reads them as LaTeX."""

import re
import unicodedata

MIXED = re.compile(r"(?<![\w.^\\}])(\d+) (\d+) ?/ ?(\d+)(?![\w./^])")
SIDE_BY_SIDE = re.compile(r"\d [\d.]")
ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|([0-9.]+|[A-Za-z]))")


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
    """Tell whether a text may be a formula: it has a letter or digit, and no two numbers stand side by side."""
    text = " ".join(plain_formula(text).split())
    if not any(map(str.isalnum, text)):
        return False
    return "\\" in text or SIDE_BY_SIDE.search(sum_mixed(text)) is None
