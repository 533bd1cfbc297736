"""Contact sheet of a data set: one HTML page with small pictures, boxes drawn on them, and the right options marked.

The page needs no server, has no script, and loads nothing: pictures are data: URIs, and its policy forbids all else.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from thinkimg.answers.boxes import read_box
from thinkimg.data.report.example import Example
from thinkimg.data.report.lines import Facts, state_right
from thinkimg.data.report.page import Box, escape_text, render_figure, render_page, write_page
from thinkimg.records import AnswerType, Sample

STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1rem;
  align-items: start; }
.answer { margin: .4rem 0; color: var(--right); font-weight: 600; white-space: pre-line; }
.changes { margin: .3rem 0 0; color: var(--warn); font-size: .87rem; }
"""


@dataclass(frozen=True)
class Section:
    """Part of a sheet: a table of the data, or a prepared data set."""

    heading: str
    facts: Facts
    """Facts about all of its samples."""
    examples: tuple[Example, ...]


def write_sheet(path: Path, title: str, sections: Iterable[Section]) -> None:
    """Write the page. Raises as `page.check_page`."""
    write_page(path, title, _body(sections), STYLE)


def render_sheet(title: str, sections: Iterable[Section]) -> str:
    """Return the page as HTML."""
    return render_page(title, _body(sections), STYLE)


def _body(sections: Iterable[Section]) -> Iterator[str]:
    yield (
        '<p class="legend">Boxes: orange marks a region to look at, green a right answer. '
        "Options: the right one is green.</p>"
    )
    for section in sections:
        yield f'<section><h2 dir="auto">{escape_text(section.heading)}</h2><dl>'
        for label, lines in section.facts:
            kind = ' class="code"' if label == "reproduce" else ""
            yield f"<dt>{escape_text(label)}</dt><dd{kind}>{escape_text(chr(10).join(lines))}</dd>"
        yield '</dl><div class="cards">'
        for example in section.examples:
            yield from _card(example)
        yield "</div></section>"


def _card(example: Example) -> Iterator[str]:
    sample = example.sample
    facts = [example.where, sample.split, str(sample.answer_type)]
    yield f'<article><header class="where">{escape_text(" · ".join(fact for fact in facts if fact))}</header>'
    yield '<div class="pictures">'
    for number, picture in enumerate(example.pictures):
        boxes = {"target": sample.targets, "answer": answer_boxes(sample)} if number == 0 else {}
        share = 1.0 if len(example.pictures) == 1 else 0.5
        yield from render_figure(picture, f"picture {number}", boxes, share=share)
    yield f'</div><p class="question" dir="auto">{escape_text(sample.question)}</p>'
    yield from list_options(sample)
    if not sample.choices or not set(sample.answers) & set(sample.choices):
        yield f'<p class="answer" dir="auto">{escape_text(state_right(sample))}</p>'
    text = escape_text(example.text)
    yield f'<details><summary>as the model reads it</summary><pre dir="auto">{text}</pre></details>'
    if example.changes:
        yield f'<p class="changes">{escape_text("; ".join(example.changes))}</p>'
    yield "</article>"


def list_options(sample: Sample) -> Iterator[str]:
    """Yield the options of a sample as a list, the right ones marked; nothing where it has none."""
    if sample.choices:
        yield '<ol type="A">'
        for choice in sample.choices:
            yield f'<li dir="auto"{" class=right" if choice in sample.answers else ""}>{escape_text(choice)}</li>'
        yield "</ol>"


def answer_boxes(sample: Sample) -> list[Box]:
    """Return the right answers that are boxes, in pixels of the only picture."""
    if sample.answer_type is not AnswerType.BOX:
        return []
    return [box for answer in sample.answers if (box := read_box(answer))]
