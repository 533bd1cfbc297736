"""Numbers as people write them: parsed exactly, or not at all."""

import re
from dataclasses import dataclass, field
from fractions import Fraction

from thinkimg.answers.text import strip_wrapping
from thinkimg.answers.units import fold_unit

MAX_NUMBER_LENGTH = 64  # characters; keeps exact arithmetic small
WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+"
DIGITS = rf"(?:{WHOLE})(?:\.[0-9]*)?|\.[0-9]+"
NUMBER = rf"(?:{DIGITS})(?:[eE][+-]?[0-9]{{1,3}})?"
# One word after the number and no digits in it: "5 or 6" is no number with a unit.
QUANTITY = re.compile(
    rf"(?P<sign>[+-]?)(?P<currency>[$€£¥₹]?)(?:(?P<whole>{WHOLE})\s+(?=[0-9]+\s*/))?"
    rf"(?P<fraction>(?P<number>{NUMBER})(?:\s*/\s*(?P<divisor>{NUMBER}))?)\s*"
    r"(?P<unit>(?:[A-Za-z%°μΩ€$£¥₹][\w°²³/^.-]*)?)"
)
PLAIN = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2})?)\s*(%?)\s*")
# Signs with several forms. The micro sign and the ohm sign are the Greek letters.
NUMBER_SIGNS = str.maketrans({"−": "-", "–": "-", "⁄": "/", "\u00b5": "\u03bc", "\u2126": "\u03a9"})
LATEX_SIGNS = ((r"^{\circ}", "°"), (r"^\circ", "°"), (r"\%", "%"), (r"\$", "$"), ("{,}", ","), (r"\,", " "), ("~", " "))
SQUARED = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:\{([23])\}|([23])(?![0-9]))")
"""Power of a unit: cm^2, \\text{cm}^{3}."""
UNIT_COMMAND = re.compile(r"\\(?:text|mathrm|textrm|operatorname)\s*\{([^{}\\]*)\}")
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
SCALES |= {"lakh": 10**5, "crore": 10**7}
WORDS = SCALES | {f"{word}s": factor for word, factor in SCALES.items()} | {"bn": 10**9, "mn": 10**6, "tn": 10**12}
PERCENT = {"%", "percent", "percents", "pct"}
FACTORS = {"pi", "half", "halves", "third", "thirds", "quarter", "quarters", "tenth", "tenths", "hundredth",
           "hundredths", "thousandth", "thousandths", "millionth", "millionths", "pair", "pairs"}  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """Number with its unit."""

    value: Fraction
    unit: str
    """Text of the unit; empty where there is none."""
    is_integer: bool = field(default=False, compare=False)
    """True where it is written as a whole number: without point, exponent, fraction, percent or a word as million."""

    def is_near(self, right: "Quantity", tolerance: Fraction) -> bool:
        """Tell whether |self - right| <= tolerance * |right| and the units are equal.

        A right integer, such as a year or a count, is compared exactly. One of the two may lack its unit, unless that
        may be a factor or a variable, such as any single letter.
        """
        if fold_unit(self.unit) != fold_unit(right.unit):
            unit = self.unit or right.unit
            is_factor = unit.casefold() in FACTORS or unit == "MM" or re.fullmatch("[A-Za-z]", unit)
            if (self.unit and right.unit) or is_factor:
                return False
        return abs(self.value - right.value) <= (0 if right.is_integer else tolerance * abs(right.value))


def read_plain_number(text: str, *, percent: bool = False) -> float | None:
    """Return the number that a text states in plain digits, as the scorers of benchmarks read it; else None.

    percent: 45% is 0.45; else it is none. Separators, units, currencies and fractions are none.
    """
    plain = PLAIN.fullmatch(text.translate(NUMBER_SIGNS)) if len(text) <= MAX_NUMBER_LENGTH else None
    if not plain or (plain[2] and not percent):
        return None
    return float(plain[1]) / (100 if plain[2] else 1)


def plain_latex(text: str) -> str:
    r"""Return a number of LaTeX with plain signs: 60^\circ is 60°, 12\text{ cm}^2 is 12 cm², 1{,}234 is 1,234."""
    if len(text) > MAX_NUMBER_LENGTH or not re.search(r"[\\{$^]", text):
        return text
    text = UNIT_COMMAND.sub(r"\1", text.replace("$", "") if text.count("$") == 2 else text)
    for command, sign in LATEX_SIGNS:
        text = text.replace(command, sign)
    return SQUARED.sub(lambda power: "²³"[int(power[1] or power[2]) - 2], text)


def read_number(text: str) -> Quantity | None:
    """Return the quantity that a text states; None for any other text. A comma is no decimal point.

    1,234.5; 50 % (= 0.5); 1e3; 3/4; 2 2/3; 2 million; $5; 12 cm.
    """
    text = strip_wrapping(text)
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    match = QUANTITY.fullmatch(text.translate(NUMBER_SIGNS))
    if not match or re.search(r"[\d_]", match["unit"]):
        return None
    unit, word = match["unit"], match["unit"].casefold()
    if match["currency"] and unit and word not in WORDS:
        return None
    value = Fraction(match["number"].replace(",", ""))
    if match["divisor"]:
        divisor = Fraction(match["divisor"].replace(",", ""))
        if not divisor:
            return None
        value /= divisor
    if match["whole"]:
        # A mixed number, and no product or list: its fraction is a proper one of whole numbers.
        if not re.fullmatch(r"[0-9]+\s*/\s*[0-9]+", match["fraction"]) or value >= 1:
            return None
        value += Fraction(match["whole"].replace(",", ""))
    value = -value if match["sign"] == "-" else value
    if word in WORDS:
        return Quantity(value * WORDS[word], match["currency"])
    if word in PERCENT:
        return Quantity(value / 100, "")
    is_integer = re.fullmatch(WHOLE, match["fraction"]) is not None
    return Quantity(value, match["currency"] or unit, is_integer)
