"""Numbers as people write them: parsed exactly, or not at all."""

import re
from dataclasses import dataclass
from fractions import Fraction

from thinkimg.answers.text import strip_wrapping

MAX_NUMBER_LENGTH = 64  # characters; keeps exact arithmetic small
WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+"
DIGITS = rf"(?:{WHOLE})(?:\.[0-9]*)?|\.[0-9]+"
NUMBER = rf"(?:{DIGITS})(?:[eE][+-]?[0-9]{{1,3}})?"
# One word after the number and no digits in it: "5 or 6" is no number with a unit.
QUANTITY = re.compile(
    rf"(?P<sign>[+-]?)(?P<currency>[$€£¥₹]?)(?:(?P<whole>{WHOLE})\s+(?=[0-9]+\s*/))?"
    rf"(?P<fraction>(?P<number>{NUMBER})(?:\s*/\s*(?P<divisor>{NUMBER}))?)\s*"
    r"(?P<unit>(?:[A-Za-z%°µΩ€$£¥₹][\w°²³/^.-]*)?)"
)
WORDS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
FACTORS = {"bn", "mn", "tn", "dozen", "pi"}


@dataclass(frozen=True)
class Quantity:
    """Number with its unit."""

    value: Fraction
    unit: str
    """Text of the unit; empty where there is none."""

    def is_near(self, right: "Quantity", tolerance: Fraction) -> bool:
        """Tell whether |self - right| <= tolerance * |right| and the units are equal.

        One of the two may lack its unit, unless that may be a factor or a variable, such as any single letter.
        """
        if self.unit != right.unit:
            unit = (self.unit or right.unit).casefold()
            if (self.unit and right.unit) or unit in FACTORS or re.fullmatch("[a-z]", unit):
                return False
        return abs(self.value - right.value) <= tolerance * abs(right.value)


def read_number(text: str) -> Quantity | None:
    """Return the quantity that a text states; None for any other text. A comma is no decimal point.

    1,234.5; 50 % (= 0.5); 1e3; 3/4; 2 2/3; 2 million; $5; 12 cm.
    """
    text = strip_wrapping(text)
    if len(text) > MAX_NUMBER_LENGTH:
        return None
    match = QUANTITY.fullmatch(text.replace("−", "-").replace("⁄", "/"))
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
    if word in ("%", "percent"):
        return Quantity(value / 100, "")
    return Quantity(value, match["currency"] or unit)
