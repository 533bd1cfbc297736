"""Advice on data that can be used, but perhaps otherwise than they were meant."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from thinkimg.answers.numbers import read_number
from thinkimg.answers.text import normalise
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import Refused
from thinkimg.records import Sample

SHARE = 0.9
"""Share of right answers of one kind above which they are said to be of that kind."""
MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
DATE = re.compile(
    rf"\d{{1,4}}[-/.]\d{{1,2}}[-/.]\d{{1,4}}|(?:\d{{1,2}}\.? )?(?:{MONTHS})[a-z]*\.?(?: \d{{1,2}},?)?,? \d{{4}}"
)


def advise(samples: Sequence[Sample], data: RowsConfig) -> Iterator[str]:
    """Yield a sentence for each thing that looks odd about the samples that a source's rows became."""
    mapped = {name for _, name in data.columns}
    for role in ("answers", "target"):
        if role not in mapped and any(role in sample.columns for sample in samples):
            yield f"There is a column '{role}' that is not used. Set data.columns.{role}={role} to use it."
    if data.answer_type == "text" and (kind := common_kind([sample.answer for sample in samples])):
        count, name, better = kind
        comparison = (
            "compares them as they are written. Set data.answer_type=number to compare their values: whole numbers "
            "exactly, others within rewards.answer.number_tolerance."
            if better == "number"
            else f"also pays for answers that are only similar. Set data.answer_type={better} to compare them exactly."
        )
        yield f"{count} of {len(samples)} right answers are {name}, but data.answer_type is text, which {comparison}"


def common_kind(answers: Sequence[str]) -> tuple[int, str, str] | None:
    """Return (number of answers, kind, answer type that fits it) of the kind that nearly all are; None for none."""
    kinds: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
        ("numbers", "number", lambda answer: read_number(answer) is not None),
        ("yes or no", "choice", lambda answer: normalise(answer) in ("yes", "no", "true", "false")),
        ("dates", "choice", lambda answer: DATE.fullmatch(normalise(answer)) is not None),
    )
    for name, better, is_kind in kinds:
        count = sum(map(is_kind, answers))
        if answers and count >= SHARE * len(answers):
            return count, name, better
    return None


def state_refused(refused: Iterable[Refused], rows: int) -> str:
    """Return a sentence with the number of refused rows per reason."""
    reasons = Counter(str(row.reason) for row in refused)
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    return f"{reasons.total()} of {rows} rows are refused ({counts}); refused.parquet lists them."
