"""Comparison of texts: answers come with capitals, brackets and full stops that mean nothing."""

import re
import unicodedata

MAX_WRAPPED_LENGTH = 1000  # characters; longer answers are compared as they are
WRAPPERS = ("()", "[]", "{}", '""', "''", "``", "“”", "‘’", "«»", "**", "__", "$$")
BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
LEAD_IN = re.compile(
    r"\s*(?:(?:so|thus|hence|therefore),?\s+)?"
    r"(?:(?:the\s+)?(?:final\s+|correct\s+)?answer\s+is\b:?|(?:the\s+|final\s+|correct\s+){1,2}answer\s*:)\s*",
    re.IGNORECASE,
)
LABEL = re.compile(r"\s*answer\s*:\s*(?=\S)", re.IGNORECASE)
"""Label in front of a right answer. Before a model's answer it stays, as in the official scorers."""


def drop_invisible(text: str) -> str:
    """Return a text without characters that are not seen: Unicode's category Cf, such as U+200B."""
    return text if text.isascii() else "".join(sign for sign in text if unicodedata.category(sign) != "Cf")


def fold(text: str) -> str:
    """Return a text without case and with single spaces. NFC and not NFKC, which would make m2 of m²."""
    return " ".join(unicodedata.normalize("NFC", drop_invisible(text).casefold()).split())


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


def strip_label(text: str) -> str:
    """Return a right answer without the label "Answer:" in front of it."""
    label = LABEL.match(text)
    return text[label.end() :] if label else text


def strip_wrapping(text: str) -> str:
    r"""Return a text without brackets, quotes, asterisks or \boxed around it, and without punctuation at its end.

    "The answer is" in front of it goes, and so do invisible characters. Signs and points in front stay, for they belong
    to numbers. A text of nothing else is returned as it is.
    """
    inner = drop_invisible(text).strip()
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
