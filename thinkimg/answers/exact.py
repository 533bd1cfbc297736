"""Texts that have to be equal: yes and no, colours, short answers of GQA."""

import re

from thinkimg.answers.choices import is_lettered, match_lettered
from thinkimg.answers.text import fold, normalise, strip_lead_in, unbox

PUNCTUATION = re.compile(r"[-'’‘`\".,;:!?()‐‑–](?!\d)")
"""Signs that mean nothing, but before a digit, as in 4:1, 1.5 and -5."""


def match_exactly(answer: str, right: str) -> bool:
    """Tell whether an answer is the right one, but for case and punctuation. GQA's rule (lmms-eval, `gqa.yaml`).

    A right answer that is the letter of an option, or has one in front, may be given by its letter.
    """
    if is_lettered(right):
        return match_lettered(answer, right)
    return _bare(answer) == _bare(right)


def match_strictly(answer: str, right: str) -> bool:
    """Tell whether an answer is the right one, but for case. ChartQA's rule for words (lmms-eval, `chartqa`)."""
    return fold(unbox(strip_lead_in(answer))) == fold(unbox(right))


def _bare(text: str) -> str:
    plain = normalise(text)
    return " ".join(PUNCTUATION.sub("", plain).split()) or plain
