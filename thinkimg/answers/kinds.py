"""Kinds of right answers: the type that fits them where neither the data set nor the user says one."""

import re
import unicodedata
from collections.abc import Callable, Sequence

from thinkimg.answers.choices import is_lettered
from thinkimg.answers.formulas import may_be_formula
from thinkimg.answers.numbers import Quantity, read_number
from thinkimg.answers.text import drop_invisible, normalise
from thinkimg.answers.units import CURRENCY, is_unit
from thinkimg.answers.words import CLOSED, COLOURS, SHADES, VERBS
from thinkimg.records import AnswerType

ANNOTATORS = 10
"""Answers of a question in VQAv2, TextVQA and VizWiz, one per annotator."""
LONGEST_FORMULA = 500  # characters
COMMAND = re.compile(
    r"\\(?:[dt]?frac|sqrt|text|mathrm|mathbf|boxed|left|right|pi|theta|alpha|beta|gamma|delta|lambda|mu|sigma|phi|omega"
    r"|times|cdot|div|pm|mp|le|leq|ge|geq|ne|neq|lt|gt|approx|infty|circ|degree|angle|triangle|cup|cap|in|sin|cos|tan|log"
    r"|ln|pmatrix|begin|overline|vec|sum|int|lim|sim|cong|perp|parallel)(?![A-Za-z])"
)
FORMULA = re.compile(r"[\w)\]}][\^][\w({\\-]|[√π∞≤≥±²³×÷]|(?<![A-Za-z])[A-Za-z]\s*=\s*-?[\d.]|\$[^$]+\$")
WORD_OF_TEXT = re.compile(r"[^\W\d_]{4,}")
SIGNED = re.compile(r"[^\W\d_]|[%°$€£¥₹]")
"""Letter or sign of a unit, a currency or a scale: "5 kg", "$5", "2 million"."""
RATIO = re.compile(r"[0-9.]+(?:\s*:\s*[0-9.]+)+")
MODAL = re.compile(r"\b(?:can|will|would|could|should|may|might|must|cannot) (?:not )?(?:be|have|see|find|also)\b")
ENDED, WITH_VERB = 4, 5
"""Words of a sentence, at least: of one that ends with a full stop, and of one that has a finite verb."""
ABBREVIATION = re.compile(
    r"(?:.*\.)?(?:[a-z]|inc|ltd|co|corp|llc|bros|mfg|st|ave|blvd|rd|dr|mr|mrs|ms|jr|sr|prof|dept|no|vol|etc|est|approx"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|am|pm|ph\.?d|m\.?d|usa|u\.s)",
    re.IGNORECASE,
)

CJK_LETTERS = 6


def guess_type(answers: Sequence[str], choices: Sequence[str]) -> AnswerType:
    """Return the type that fits all right answers of a sample. Answers of several kinds are texts.

    A list of ten is one of annotators. A sentence among the answers makes them sentences.
    """
    answers = list(map(drop_invisible, answers))
    if choices:
        return AnswerType.CHOICE
    if len(answers) == ANNOTATORS:
        return AnswerType.VOTES
    if any(map(is_sentence, answers)):
        return AnswerType.JUDGE
    kinds: tuple[tuple[AnswerType, Callable[[str], bool]], ...] = (
        (AnswerType.INTEGER, _is_integer),
        (AnswerType.NUMBER, _is_number),
        (AnswerType.EXACT, _is_closed),
        (AnswerType.MATHS, _is_maths),
    )
    fitting = (kind for kind, fits in kinds if answers and all(map(fits, answers)))
    return next(fitting, AnswerType.TEXT)


def is_sentence(text: str) -> bool:
    """Tell whether a text is a sentence, for which there are other words that say the same.

    It has five words with a finite verb, or four and a full stop, or ends with one of Chinese or Japanese. A name, a
    title or an address is none: its words have capitals, or it ends with an abbreviation.
    """
    text = text.strip()
    if text.endswith(("。", "！")):
        return sum(unicodedata.category(sign) == "Lo" for sign in text) >= CJK_LETTERS
    words = text.split()
    plain = [word.strip("\"'“”‘’()[],;:.!?") for word in words]
    plain = [word for word in plain if any(map(str.isalpha, word))]
    small = [word for word in plain[1:] if word[0].islower()]
    if len(small) * 2 < len(plain) - 1 or not small:
        return False
    has_verb = any(word.replace("’", "'").lower() in VERBS for word in (*small, *plain[:1]))
    if len(plain) >= WITH_VERB and (has_verb or MODAL.search(text)):
        return True
    is_ended = text.rstrip("\"'”’)").endswith((".", "!"))
    is_short = ABBREVIATION.fullmatch(words[-1].rstrip("\"'”’).!,")) is not None
    return len(plain) >= ENDED and is_ended and not is_short


def is_mathematical(text: str) -> bool:
    """Tell whether a right answer of a mathematical question is a formula: a bare number, a ratio, or one with signs.

    A number with a plain unit is none: math-verify takes 12 mm for 12 cm, and 5 is not $5 for it.
    """
    text = text.strip()
    return (_is_number(text) and not SIGNED.search(text)) or _is_maths(text) or RATIO.fullmatch(text) is not None


def _is_number(text: str) -> bool:
    return _quantity(text) is not None


def _is_integer(text: str) -> bool:
    quantity = _quantity(text)
    return quantity is not None and quantity.is_integer


def _quantity(text: str) -> Quantity | None:
    """Return the quantity that a text is, with a usual unit or none.

    None for a code that begins with a zero, a time (8.00 A.M.), and what only looks like a unit (221 Baker).
    """
    quantity = None if re.match(r"\s*0\d", text) else read_number(text)
    if quantity is None or not quantity.unit or CURRENCY.fullmatch(quantity.unit):
        return quantity
    return quantity if is_unit(quantity.unit) and quantity.unit.casefold() not in ("am", "pm") else None


def _is_closed(text: str) -> bool:
    words = normalise(text).split()
    is_colour = words[-1:] != [] and words[-1] in COLOURS and set(words[:-1]) <= SHADES and len(words) <= 2
    return is_colour or (len(words) == 1 and words[0] in CLOSED) or is_lettered(text)


def _is_maths(text: str) -> bool:
    if len(text) > LONGEST_FORMULA or not may_be_formula(text):
        return False
    if COMMAND.search(text):
        return True
    return FORMULA.search(text) is not None and WORD_OF_TEXT.search(text) is None
