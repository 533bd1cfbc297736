"""Kinds of right answers, and sentences on refused rows."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from thinkimg.answers.numbers import read_number
from thinkimg.answers.text import normalise
from thinkimg.data.refusal import Refused

SHARE = 0.9
"""Share of right answers of one kind above which they are said to be of that kind."""
MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
DATE = re.compile(
    rf"\d{{1,4}}[-/.]\d{{1,2}}[-/.]\d{{1,4}}|(?:\d{{1,2}}\.? )?(?:{MONTHS})[a-z]*\.?(?: \d{{1,2}},?)?,? \d{{4}}"
)
KINDS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("numbers", "number", lambda answer: read_number(answer) is not None),
    ("yes or no", "exact", lambda answer: normalise(answer) in ("yes", "no", "true", "false")),
    ("dates", "exact", lambda answer: DATE.fullmatch(normalise(answer)) is not None),
)
"""Kinds of answers: name, answer type that fits, test."""


def kind_of(answer: str) -> str | None:
    """Return the kind of an answer that is no free text: numbers, yes or no, dates."""
    return next((name for name, _, is_kind in KINDS if is_kind(answer)), None)


def common_kind(answers: Sequence[str]) -> tuple[int, str, str] | None:
    """Return (number of answers, kind, answer type that fits it) of the kind that nearly all are; None for none."""
    for name, better, is_kind in KINDS:
        count = sum(map(is_kind, answers))
        if answers and count >= SHARE * len(answers):
            return count, name, better
    return None


def state_refused(refused: Iterable[Refused], rows: int) -> str:
    """Return a sentence with the number of refused rows per reason."""
    reasons = Counter(str(row.reason) for row in refused)
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    return f"{reasons.total()} of {rows} rows are refused ({counts}); refused.parquet lists them."
