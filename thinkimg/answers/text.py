"""Comparison of texts: answers come with capitals, brackets and full stops that mean nothing."""

import re
import unicodedata

from rapidfuzz.distance import Levenshtein

MAX_WRAPPED_LENGTH = 1000  # characters; longer answers are compared as they are
WRAPPERS = ("()", "[]", "{}", '""', "''", "``", "“”", "‘’", "«»", "**", "__", "$$")
BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
LEAD_IN = re.compile(
    r"\s*(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\b:?|:)\s*",
    re.IGNORECASE,
)

THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
SIGN = re.compile(r"(?<![^\s(\[=:<>$€£¥₹])[-−](?=[$€£¥₹]?\.?\d)")
WORDS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "thirteen": "13", "fourteen": "14", "fifteen": "15",
    "sixteen": "16", "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20", "thirty": "30",
    "forty": "40", "fifty": "50", "sixty": "60", "seventy": "70", "eighty": "80", "ninety": "90",
}  # fmt: skip
NUMERAL = re.compile(rf"\d+|\b(?:{'|'.join(WORDS)})\b|[^\W\d_a-z]")
# Not the "no" of a number, as in "invoice no. 12".
NEGATION = re.compile(
    r"\b(?:not|no(?!\.?\s*\d)|non|never|none|nothing|nobody|neither|nor|without|cannot"
    r"|(?:do|does|did|is|are|was|were|has|have|had|wo|ca|could|would|should|must|need|ai)n['’]?t)\b"
)


def fold(text: str) -> str:
    """Return a text without case and with single spaces. NFC and not NFKC, which would make m2 of m²."""
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def unbox(text: str) -> str:
    r"""Return what a text that is `\boxed{…}` holds, without the dollars around it; other texts as they are."""
    if len(text) > MAX_WRAPPED_LENGTH:
        return text
    boxed = BOXED.fullmatch(text.strip(" .$"))
    return boxed[1].strip() if boxed and boxed[1].strip() else text


def strip_lead_in(text: str) -> str:
    """Return a text without "The answer is" or the like in front of it; a text of nothing else as it is."""
    lead = LEAD_IN.match(text)
    return text[lead.end() :] or text if lead else text


def strip_wrapping(text: str) -> str:
    r"""Return a text without brackets, quotes, asterisks or \boxed around it, and without punctuation at its end.

    "The answer is" in front of it goes, too. Signs and points in front stay, for they belong to numbers. A text of
    nothing else is returned as it is.
    """
    inner = text.strip()
    while len(inner) <= MAX_WRAPPED_LENGTH:
        shorter = inner.rstrip(" .,;:!?")
        pair = shorter[:1] + shorter[-1:]
        # Not "(a) or (b)": the brackets must belong together.
        if len(shorter) > 1 and pair in WRAPPERS and not set(shorter[1:-1].strip(pair)) & set(pair):
            shorter = shorter[1:-1].strip()
        shorter = strip_lead_in(unbox(shorter))
        if shorter == inner or not shorter:
            break
        inner = shorter
    return inner


def normalise(text: str) -> str:
    """Return a text without its wrapping and case, for comparisons."""
    return fold(strip_wrapping(text))


def anls(answer: str, right: str, threshold: float = 0.5) -> tuple[float, float]:
    """Return (reward, similarity) of two texts, in [0, 1]; similarity = 1 - normalised Levenshtein distance.

    The reward is the similarity, or 0 where the distance reaches the threshold. Scene Text Visual Question Answering
    (arXiv 1905.13648), eq. 1, for one right answer; case and white space don't count. It departs from that in two
    points: the reward is 0 where the numerals differ, and where one of the two is negated and the other is not.
    """
    one, other = fold(unbox(answer)), fold(unbox(right))
    distance = Levenshtein.normalized_distance(one, other)
    similar = distance < threshold and list_numerals(one) == list_numerals(other) and negates(one) == negates(other)
    return (1 - distance if similar else 0.0), 1 - distance


def list_numerals(text: str) -> list[str]:
    """Return the runs of digits in a folded text, in order, with the sign of each: 1,350.00 has 1350 and 00.

    Number words up to ninety count as digits; superscripts, fractions and numerals of other scripts for themselves.
    """
    numerals = []
    marked = SIGN.sub(" minus ", THOUSANDS.sub("", text))
    for token in re.findall(rf"\bminus\b|{NUMERAL.pattern}", marked):
        if token.isdecimal():
            token = "".join(str(unicodedata.decimal(digit)) for digit in token)
        if token == "minus" or token in WORDS or token.isnumeric():
            numerals.append(WORDS.get(token, token))
    return numerals


def negates(text: str) -> bool:
    """Tell whether a folded text holds a word that negates."""
    return NEGATION.search(text) is not None
