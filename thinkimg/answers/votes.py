"""Answers of several annotators, compared as VQA's evaluation does.

The rules are those of VQA's vqaEval.py and EvalAI's answer processor, which lmms-eval uses for TextVQA and VQAv2.
"""

import re
from collections.abc import Sequence

from thinkimg.answers.text import strip_wrapping
from thinkimg.answers.words import CONTRACTIONS

NEEDED = 3
"""Other annotators who give an answer that is worth all (VQA, arXiv 1505.00468, section 3)."""
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
ARTICLES = {"a", "an", "the"}
SIGNS = ';/[]"{}()=+\\_-><@`!'
POINT = re.compile(r"\.(?!\d)")


def normalise_vote(answer: str) -> str:
    """Return an answer without case, articles and punctuation, with number words in digits."""
    text = strip_wrapping(answer).lower().replace(",", "").replace("?", "").replace("’", "'").replace("'s", " 's")
    text = plain = " ".join(text.split())
    for sign in SIGNS:
        stands_alone = f"{sign} " in plain or f" {sign}" in plain
        text = text.replace(sign, "" if stands_alone else " ")
    words = [NUMBERS.get(word, word) for word in POINT.sub("", text).split() if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def count_votes(answer: str, votes: Sequence[str]) -> float:
    """Return the soft accuracy of an answer in [0, 1]: the mean, over all annotators, of min(1, n / 3).

    n is the number of the other annotators who gave the answer. Of fewer than four annotators all others are needed.
    """
    given = normalise_vote(answer)
    same = sum(normalise_vote(vote) == given for vote in votes)
    needed = min(NEEDED, max(len(votes) - 1, 1))
    if len(votes) == 1:
        return float(same)
    left_out_same, left_out_other = min(1.0, (same - 1) / needed), min(1.0, same / needed)
    return (same * max(left_out_same, 0.0) + (len(votes) - same) * left_out_other) / len(votes)
