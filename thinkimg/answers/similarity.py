"""Similarity of texts, which forgives mistakes of reading but none of numbers, negations, units and the like."""

import re
import unicodedata

from rapidfuzz.distance import Levenshtein

from thinkimg.answers.text import normalise
from thinkimg.answers.units import CURRENCY, UNIT, fold_unit

TEXT_SIGNS = str.maketrans(dict.fromkeys("−–—‐‑", "-") | dict.fromkeys("’‘`´", "'"))
ONES = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
            "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth",
            "nineteenth")  # fmt: skip
VALUES = {"zero": 0} | {word: value for words in (ONES, ORDINALS) for value, word in enumerate(words) if word}
TEN_VALUES = {word: 10 * value for value, word in enumerate(TENS) if word}
VALUES |= TEN_VALUES | {word[:-1] + "ieth": value for word, value in TEN_VALUES.items()}
SMALL = "|".join(word for words in (ONES[1:10], ORDINALS[1:10]) for word in words)
# After a digit, "second" is a unit.
NUMBER_WORD = re.compile(rf"(?!(?<=\d[ -])second\b)\b(?:({'|'.join(TEN_VALUES)})[ -]?({SMALL})|({'|'.join(VALUES)}))\b")
SCALE = r"\b(?:hundred|thousand|million|billion|trillion|dozen)"
ROMAN = r"\b(?=[ivx]{2,}\b|[ivxlcdm]{4,}\b)m{0,3}(?:cm|cd|d?c{0,3})(?:xc|xl|l?x{0,3})(?:ix|iv|v?i{0,3})\b"
SIGN = re.compile(r"(?<![^\s(\[=:<>$€£¥₹])(?<!\d )-(?=[$€£¥₹]?\d)")
NUMERAL = re.compile(rf"\bminus\b|\d+|{SCALE}|{ROMAN}|[^\W\d_a-z]")
# Not the "no" of a number, as in "invoice no. 12".
NEGATION = re.compile(
    r"\b(?:not|no(?!\.?\s*\d)|non|never|none|nothing|nobody|neither|without|cannot"
    r"|(?:do|does|did|is|are|was|were|has|have|had|wo|ca|could|would|should|must|need|ai)n'?t"
    r"|pas|jamais|sans|aucune?|nicht|kein(?:e[mnrs]?)?|nie|niemals|ohne|sin|nunca|jamás|ningun[oa]?|ningún|senza"
    r"|nessun[oa]?|não|nao|sem|niet|geen|nooit|zonder|inte|ikke|ingen|bez|не|нет|нельзя|без)\b"
    r"|[不没沒無无勿禁]"
)
LETTER = re.compile(r"\b[^\W\d_]\b")
SUFFIX = re.compile(rf"{UNIT.pattern}|\d(?:\s?([^\W\d_])|([^\W\d_]{{2,3}}))(?!\w)")
"""Unit, letter or letters without a blank after a digit: 20 MPa, 5 N, B2B."""
SCALE_SIGN = re.compile(r"(?<=\d)\s?(?:(bn)|(mn)|(tn))\b|([$€£¥₹][\d.,]*\d)\s?(?:(b)|(m)|(t)|(k))\b")
SCALE_WORDS = ("billion", "million", "trillion", "billion", "million", "trillion", "thousand")
"""Words of the groups of SCALE_SIGN."""
SIGNED = re.compile(r"([-+±<>≤≥×÷]?)\s?[$€£¥₹]?\d+")


def anls(answer: str, right: str, threshold: float = 0.5) -> tuple[float, float]:
    """Return (reward, similarity) of two texts, in [0, 1]; similarity = 1 - normalised Levenshtein distance.

    The reward is the similarity, or 0 where the distance reaches the threshold. Scene Text Visual Question Answering
    (arXiv 1905.13648), eq. 1, for one right answer. It departs from that in two points: what `normalise` removes does
    not count, nor how a number is written; and the reward is 0 where numerals, negations or units differ.
    """
    plain, plain_right = (normalise(text).translate(TEXT_SIGNS) for text in (answer, right))
    canonical, canonical_right = canonicalise(plain), canonicalise(plain_right)
    distance = min(
        Levenshtein.normalized_distance(plain, plain_right),
        Levenshtein.normalized_distance(canonical, canonical_right),
    )
    # "Oneway" for "One Way": the same letters cannot differ in meaning.
    similar = join_letters(plain) == join_letters(plain_right) or (
        count_negations(plain) == count_negations(plain_right) and agree(canonical, canonical_right)
    )
    return (1 - distance if similar and distance < threshold else 0.0), 1 - distance


def canonicalise(text: str) -> str:
    """Return a normalised text with its numbers in digits and in one form: twenty-one is 21, 03.50 is 3.5."""
    text = "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else sign for sign in text)
    text = re.sub(r"(?<=\d)(\s?)([ap])\.?\s?m\b", r"\1\2m", text)
    text = re.sub(r"\b(\d{1,2})\.(\d\d)(?=\s?[ap]m\b)", r"\1:\2", text)
    text = NUMBER_WORD.sub(_in_digits, text)
    text = SCALE_SIGN.sub(_spell_scale, text)
    text = re.sub(rf"\ban? (?={SCALE})", "1 ", text)
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<![^\s$€£¥₹-])\.(?=\d)", "0.", text)
    return re.sub(r"\d+(?:\.\d+)*", _trim_zeros, text)


def _in_digits(word: re.Match[str]) -> str:
    tens, unit, alone = word.groups()
    return str(VALUES[alone] if alone else VALUES[tens] + VALUES[unit])


def _spell_scale(sign: re.Match[str]) -> str:
    *after, amount = sign[1], sign[2], sign[3], sign[4]
    scales = (*after, *sign.groups()[4:])
    return f"{amount or ''} {next(word for scale, word in zip(scales, SCALE_WORDS, strict=True) if scale)}"


def _trim_zeros(number: re.Match[str]) -> str:
    parts = number[0].split(".")
    if len(parts) == 2:
        fraction = parts[1].rstrip("0")
        return (parts[0].lstrip("0") or "0") + (f".{fraction}" if fraction else "")
    return ".".join(part.lstrip("0") or "0" for part in parts)


def join_letters(text: str) -> str:
    """Return a text without blanks, hyphens and apostrophes between two letters."""
    return re.sub(r"(?<=[^\W\d_])[\s'-]+(?=[^\W\d_])", "", text)


def agree(one: str, other: str) -> bool:
    """Tell whether two canonical texts agree in numerals, in what belongs to these, and in single letters.

    Signs, units and currencies belong to a numeral, and letters after its digits. One of the texts may lack them, but
    for a minus, and some of the single letters.
    """
    if list_numerals(one) != list_numerals(other):
        return False
    signs = zip(SIGNED.findall(one), SIGNED.findall(other), strict=False)
    if any(sign and other_sign and sign != other_sign for sign, other_sign in signs):
        return False
    for mark in (SUFFIX, CURRENCY):
        marks, other_marks = list_marks(mark, one), list_marks(mark, other)
        if marks and other_marks and marks != other_marks:
            return False
    letters, other_letters = (LETTER.findall(text.replace("'", "")) for text in (one, other))
    return letters == other_letters or len(letters) != len(other_letters)


def list_numerals(text: str) -> list[str]:
    """Return the numerals in a canonical text, in order, each sign before its digits: 1350.5 has 1350 and 5.

    Words such as million, Roman numerals, superscripts, fractions, and numerals of other scripts stand for themselves.
    """
    tokens = NUMERAL.findall(SIGN.sub(" minus ", text))
    return [token for token in tokens if token.isascii() or token.isnumeric()]


def count_negations(text: str) -> int:
    """Return the number of words in a normalised text that negate, of some languages."""
    return len(NEGATION.findall(text))


def list_marks(mark: re.Pattern[str], text: str) -> list[str]:
    """Return what a pattern finds, by a group of its or as a whole; units as `fold_unit` does."""
    return [fold_unit(next(filter(None, found.groups()), found[0])) for found in mark.finditer(text)]
