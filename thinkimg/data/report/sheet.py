"""Contact sheet of a data set: one HTML page with small pictures, boxes drawn on them, and the right options marked.

The page needs no server, has no script, and loads nothing: pictures are data: URIs, and its policy forbids all else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from thinkimg.answers.boxes import read_box
from thinkimg.data.report.example import SIDE, Example, Thumbnail
from thinkimg.data.report.lines import Facts, crop, state_right
from thinkimg.errors import UserError
from thinkimg.records import AnswerType

Box = tuple[float, float, float, float]
HEIGHT = 380
"""Height in pixels at which a picture is shown, at most."""
SMALLEST = 120
"""Longer side in pixels to which smaller pictures are enlarged."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #62666d; --page: #f4f4f2; --card: #fff; --line: #dcdcd8;
  --right: #1a7f37; --right-back: #e4f5e8; --target: #ff7a00; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e3; --soft: #a0a4ab; --page: #16181b; --card: #202327;
  --line: #363a40; --right: #58c26e; --right-back: #1b3323; --warn: #e0b050; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 110rem; color: var(--ink); background: var(--page);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
h1, h2, p, li, dd, pre, header { overflow-wrap: anywhere; unicode-bidi: isolate; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: .5rem 0 1rem; }
dt { color: var(--soft); } dd { margin: 0; white-space: pre-line; }
dd.code { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; }
.legend, .where { color: var(--soft); font-size: .87rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1rem;
  align-items: start; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0; }
figure { margin: 0; max-width: 100%; }
.frame { position: relative; width: fit-content; max-width: 100%; line-height: 0; }
.frame img { max-width: 100%; height: auto; border-radius: .3rem; background: #888; }
.frame svg { position: absolute; left: 0; top: 0; width: 100%; height: 100%; overflow: visible; }
figcaption { font-size: .8rem; line-height: 1.4; color: var(--soft); }
rect { fill: none; vector-effect: non-scaling-stroke; }
rect.edge { stroke: #000; stroke-width: 4px; stroke-opacity: .55; }
rect.target { stroke: var(--target); stroke-width: 2px; } rect.answer { stroke: #2fd05f; stroke-width: 2px; }
.question { margin: .5rem 0; white-space: pre-line; }
ol { margin: .4rem 0; padding-left: 1.9rem; } li { padding: .05rem .4rem; border-radius: .3rem; }
li.right { background: var(--right-back); color: var(--right); font-weight: 600; }
.answer { margin: .4rem 0; color: var(--right); font-weight: 600; white-space: pre-line; }
.changes { margin: .3rem 0 0; color: var(--warn); font-size: .87rem; }
details { margin-top: .4rem; font-size: .87rem; color: var(--soft); }
pre { white-space: pre-wrap; margin: .3rem 0 0; font: 13px/1.45 ui-monospace, monospace; }
"""


@dataclass(frozen=True)
class Section:
    """Part of a sheet: a table of the data, or a prepared data set."""

    heading: str
    facts: Facts
    """Facts about all of its samples."""
    examples: tuple[Example, ...]


def check_page(path: Path) -> None:
    """Raise UserError where no page can be written, or under no name of a page: a table of the user's may have it."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path} is no name of a page.", hint="Let the file's name end in .html.")
    if not path.parent.is_dir() or path.is_dir():
        problem = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise UserError(f"{path} {problem}.", hint="Name a file in a folder that exists.")


def write_sheet(path: Path, title: str, sections: Iterable[Section]) -> None:
    """Write the page. Raises as `check_page`."""
    check_page(path)
    path.write_text(render_sheet(title, sections), encoding="utf-8")


def render_sheet(title: str, sections: Iterable[Section]) -> str:
    """Return the page as HTML."""
    return "\n".join(_page(title, sections)) + "\n"


def _page(title: str, sections: Iterable[Section]) -> Iterator[str]:
    yield "<!DOCTYPE html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
    yield f"<h1>{_text(title)}</h1>"
    yield (
        '<p class="legend">Boxes: orange marks a region to look at, green a right answer. '
        "Options: the right one is green.</p>"
    )
    for section in sections:
        yield f'<section><h2 dir="auto">{_text(section.heading)}</h2><dl>'
        for label, lines in section.facts:
            kind = ' class="code"' if label == "reproduce" else ""
            yield f"<dt>{_text(label)}</dt><dd{kind}>{_text(chr(10).join(lines))}</dd>"
        yield '</dl><div class="cards">'
        for example in section.examples:
            yield from _card(example)
        yield "</div></section>"
    yield "</body></html>"


def _card(example: Example) -> Iterator[str]:
    sample = example.sample
    facts = [example.where, sample.split, str(sample.answer_type)]
    yield f'<article><header class="where">{_text(" · ".join(fact for fact in facts if fact))}</header>'
    yield '<div class="pictures">'
    for number, picture in enumerate(example.pictures):
        boxes = {"target": sample.targets, "answer": _answer_boxes(example)} if number == 0 else {}
        yield from _figure(number, picture, boxes, alone=len(example.pictures) == 1)
    yield f'</div><p class="question" dir="auto">{_text(sample.question)}</p>'
    if sample.choices:
        yield '<ol type="A">'
        for choice in sample.choices:
            yield f'<li dir="auto"{" class=right" if choice in sample.answers else ""}>{_text(choice)}</li>'
        yield "</ol>"
    if not sample.choices or not set(sample.answers) & set(sample.choices):
        yield f'<p class="answer" dir="auto">{_text(state_right(sample))}</p>'
    yield f'<details><summary>as the model reads it</summary><pre dir="auto">{_text(example.text)}</pre></details>'
    if example.changes:
        yield f'<p class="changes">{_text("; ".join(example.changes))}</p>'
    yield "</article>"


def _answer_boxes(example: Example) -> list[Box]:
    """Return the right answers that are boxes, in pixels of the only picture."""
    if example.sample.answer_type is not AnswerType.BOX:
        return []
    return [box for answer in example.sample.answers if (box := read_box(answer))]


def _figure(number: int, picture: Thumbnail, boxes: Mapping[str, Sequence[Box]], *, alone: bool) -> Iterator[str]:
    """Yield a picture with boxes, which are in its own pixels. alone: it is the only one of its sample."""
    width, height = picture.size
    room = min(SIDE / width, HEIGHT / height) * (1.0 if alone else 0.5)
    scale = min(room, max(1, SMALLEST / max(width, height)))
    yield '<figure><div class="frame">'
    yield f'<img src="{escape(picture.uri)}" width="{max(1, round(width * scale))}" alt="picture {number}">'
    yield f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
    for kind, listed in boxes.items():
        for x, y, wide, high in listed:
            edges = f'x="{x:.10g}" y="{y:.10g}" width="{wide:.10g}" height="{high:.10g}"'
            yield f'<rect class="edge" {edges}/><rect class="{kind}" {edges}/>'
    yield "</svg>"
    yield f"</div><figcaption>picture {number}: {width} x {height} pixels</figcaption></figure>"


def _text(value: str) -> str:
    """Return a stranger's text for HTML: cropped, with its markup and its control characters to be seen."""
    return escape(crop(value, lines=200, length=8000))
