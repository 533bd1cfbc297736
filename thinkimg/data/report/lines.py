"""Reports on data as labelled texts, for a terminal and for a sheet: of tables as they are, and of a prepared set."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from thinkimg.answers.boxes import read_box
from thinkimg.answers.numbers import read_number
from thinkimg.console import escape_controls
from thinkimg.data.report.example import Example
from thinkimg.data.report.summary import Summary
from thinkimg.data.report.table_report import TableReport
from thinkimg.data.survey.oddity import Level, Oddity
from thinkimg.errors import count_more, name_some, shorten
from thinkimg.records import AnswerType, Sample

MAX_LINES, MAX_LENGTH = 30, 2000
"""Lines and characters of a sample's text that are shown."""
MAX_KINDS = 12
"""Different values of one count that are named; the others are added up."""
MAX_COLUMNS = 30
"""Columns that are named."""
MAX_VALUES = 5
"""Values of a list, keys of an object, right answers and boxes that are written out."""
LABEL = 12
"""Characters in front of a value."""

Facts = list[tuple[str, list[str]]]
"""(label, lines) of what is known."""


def table_title(report: TableReport) -> str:
    """Return the name of a table, its format and size."""
    rows = f"{report.rows:,} rows" if report.rows is not None else "rows not counted"
    more = f" and {report.alike - 1:,} alike" if report.alike > 1 else ""
    return f"{clean(report.name)}{more} ({report.format}, {rows}; {report.looked} looked at)"


def table_facts(report: TableReport, command: str, allowed: float) -> Facts:
    """Return what is known about a table, and the command that prepares it; its columns where it can't be read.

    allowed: `data.max_refused`, the share of rows that may be left out.
    """
    facts: Facts = [("columns", [escape_controls(name_some(report.columns, MAX_COLUMNS, 60))])]
    if report.schema is None:
        values = [f"{clean(name, 60)}: {describe(value)}" for name, value in report.record.items()]
        return [*facts, ("a row", list_some(values, MAX_COLUMNS)), ("problem", [clean(str(report.problem), 600)])]
    facts += [
        ("schema", list(_schema_lines(report))),
        ("pictures", [count_text(report.pictures), *_size_lines(report)]),
        ("done", _count_lines(report.changes)),
        ("answers", [count_text(report.types)]),
        ("asks", list(_oddity_lines(report.oddities, Level.ASK))),
        ("stands out", list(_oddity_lines(report.oddities, Level.WARN))),
        ("left out", list(refused_lines(report.refused, report.details, report.looked, allowed))),
        ("reproduce", escape_controls(command).split("\n") if report.types else []),
    ]
    return [(label, lines) for label, lines in facts if lines]


def _count_lines(counts: Mapping[str, int]) -> list[str]:
    ordered = sorted(counts.items(), key=lambda entry: -entry[1])
    return list_some([f"{clean(value, 600)} ({count:,})" for value, count in ordered], MAX_KINDS)


def _oddity_lines(oddities: Iterable[Oddity], level: Level) -> Iterator[str]:
    for oddity in oddities:
        if oddity.level is level:
            yield f"{clean(oddity.sentence, 600)} {oddity.hint}".rstrip()


def describe(value: Any) -> str:
    """Return a value of a table, or its size where it is long, in one line."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, Mapping):
        few = islice(value.items(), MAX_VALUES)
        pairs = (f"{clean(str(name), 40)}: {describe(inner)}" for name, inner in few)
        return f"{{{', '.join(pairs)}{count_more(value, MAX_VALUES)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe, value[:MAX_VALUES]))}{count_more(value, MAX_VALUES)}]"
    return clean(value if isinstance(value, str) else str(value), 100)


def _schema_lines(report: TableReport) -> Iterator[str]:
    schema = report.schema
    assert schema is not None
    if schema.looked:
        yield f"{schema.name}, version {schema.version}: {schema.matched} of {schema.looked} rows are of it"
        yield clean(schema.title)
    else:
        yield f"{clean(schema.name)}: {clean(schema.title)}"
        for role, column in schema.columns:
            guessed = ", by its name" if role in schema.guessed else ""
            if column is not None:
                yield f"{role}: {clean(column, 60)}{guessed}"
    if schema.others:
        yield f"also fits, less closely: {', '.join(schema.others)} (set data.schema to take one of these)"


def _size_lines(report: TableReport) -> Iterator[str]:
    if report.sizes:
        areas = sorted(report.sizes, key=lambda size: size[0] * size[1])
        sizes = [f"{width}x{height}" for width, height in dict.fromkeys((areas[0], areas[-1]))]
        yield f"{len(areas)} of them were decoded: {' to '.join(sizes)} pixels"


def summary_title(summary: Summary) -> str:
    """Return the reference of a data set and its size."""
    usable = f" of {summary.accepted:,} usable rows" if summary.accepted is not None else ""
    return f"{summary.reference}: {sum(summary.splits.values()):,} samples{usable}, {summary.images:,} pictures"


def summary_facts(summary: Summary) -> Facts:
    """Return what is known about a prepared data set."""
    total = (summary.accepted or sum(summary.splits.values())) + summary.refused.total()
    facts: Facts = [
        ("schema", list(map(clean, summary.schemas))),
        ("splits", [count_text(summary.splits)]),
        ("done", _count_lines(summary.changes)),
        ("answers", [count_text(summary.types)]),
        ("stands out", _count_lines(summary.oddities)),
        ("left out", list(refused_lines(summary.refused, summary.details, total))),
    ]
    return [(label, lines) for label, lines in facts if lines]


def refused_lines(
    refused: Mapping[str, int], details: Mapping[str, str], rows: int, allowed: float = 1.0
) -> Iterator[str]:
    """Yield the number of rows that are left out; below it, that of each reason with its first row.

    allowed: share of the rows above which the data set is not prepared.
    """
    if not refused:
        yield f"none of {rows:,} rows"
        return
    yield f"{sum(refused.values()):,} of {rows:,} rows"
    for reason, count in sorted(refused.items(), key=lambda entry: -entry[1]):
        yield f"{reason} {count:,}, such as {clean(details[reason])}"
    if sum(refused.values()) > allowed * rows:
        yield f"more than data.max_refused ({allowed:g}) allows: `prepare` would stop"


def report_lines(title: str, facts: Facts, examples: Iterable[Example]) -> Iterator[str]:
    """Yield the lines of a report for a terminal."""
    yield title
    for label, lines in facts:
        for number, line in enumerate(lines):
            yield f"  {'' if number else label:<{LABEL}}{line}"
    for example in examples:
        yield ""
        yield from example_lines(example)


def example_lines(example: Example) -> Iterator[str]:
    """Yield a sample: the text that the model reads, and below it what is right."""
    split = f" ({example.sample.split})" if example.sample.split else ""
    yield f"  {clean(example.where)}{split}, as the model reads it:"
    for line in crop(example.text).split("\n"):
        yield f"    | {line}"
    yield f"    {state_right(example.sample)}"


def state_right(sample: Sample) -> str:
    """Return the right answers of a sample with their type, and the boxes to look at."""
    given = list(sample.answers)
    if sample.answer_type is AnswerType.VOTES:
        votes = Counter(given)
        given = [f"{answer} ({count} of {len(given)})" for answer, count in votes.most_common()]
    answers = " or ".join(clean(answer, 100) for answer in given[:MAX_VALUES])
    more = count_more(given, MAX_VALUES)
    details = [str(sample.answer_type)]
    if sample.answer_type is AnswerType.BOX:
        boxes_of = [read_box(answer) for answer in sample.answers[:MAX_VALUES]]
        placed = " or ".join(state_box(box) for box in boxes_of if box)
        answers, details = (placed, ["box, in pixels of the picture"]) if placed else (answers, ["box"])
    if sample.tolerance is not None and read_number(sample.answer) is not None:
        details.append(f"within {100 * sample.tolerance:g} %")
    if sample.decimals is not None:
        details.append(f"{sample.decimals} decimal places")
    boxes = "; ".join(state_box(box) for box in sample.targets[:MAX_VALUES])
    targets = f"; look at {boxes}{count_more(sample.targets, MAX_VALUES)}" if boxes else ""
    return f"right: {answers}{more} [{', '.join(details)}]{targets}"


def state_box(box: tuple[float, float, float, float]) -> str:
    """Return a box in words."""
    x, y, width, height = (f"{edge:.6g}" for edge in box)
    return f"x {x}, y {y}, {width} wide, {height} high"


def count_text(counts: Mapping[str, int]) -> str:
    """Return counts as text, the largest first: "choice 6, text 2"."""
    ordered = sorted(counts.items(), key=lambda entry: -entry[1])
    named = [f"{clean(value)} {count:,}" for value, count in ordered[:MAX_KINDS]]
    rest = ordered[MAX_KINDS:]
    more = [f"{len(rest)} others {sum(count for _, count in rest):,}"] if rest else []
    return ", ".join(named + more) or "none"


def list_some(lines: Sequence[str], most: int) -> list[str]:
    """Return the first lines; a last one counts the others."""
    return [*lines[:most], *([count_more(lines, most).strip()] if len(lines) > most else [])]


def clean(text: str, length: int = 200) -> str:
    """Return a stranger's text in one line that can be printed."""
    return escape_controls(shorten(text, length))


def crop(text: str, lines: int = MAX_LINES, length: int = MAX_LENGTH) -> str:
    """Return a stranger's text, of several lines at most, that can be printed; a last line counts what is cut."""
    shown = "\n".join(text[:length].replace("\r\n", "\n").split("\n")[:lines])
    is_cut = len(text) > length or text.count("\n") >= lines
    return escape_controls(shown) + (f"\n… ({len(text):,} characters)" if is_cut else "")
