"""Pages about stored conversations: one with its group, and the pairs of two policies whose answers differ.

Made with the writer of data sheets: no script, no server, nothing loaded; what a model or user wrote is escaped.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkimg.analysis.view import Entry, explain_component, format_score
from thinkimg.conversation.regions import source_box
from thinkimg.data.report.example import make_thumbnail
from thinkimg.data.report.lines import state_right
from thinkimg.data.report.page import Box, escape_text, render_figure, write_page
from thinkimg.data.report.sheet import answer_boxes, list_options
from thinkimg.records import Turn, TurnKind

STYLE = """
.side { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(20rem, 1fr); gap: 1rem; overflow-x: auto;
  align-items: start; padding-bottom: .5rem; }
article.own { border-color: var(--target); border-width: 2px; }
.turn { border-top: 1px solid var(--line); margin-top: .7rem; padding-top: .5rem; }
.turn h4, article h3 { margin: 0 0 .3rem; font-size: .95rem; overflow-wrap: anywhere; }
.turn pre { margin: .2rem 0; }
.call { color: var(--soft); } .error, .wrong { color: var(--wrong); } .ok { color: var(--right); }
table { border-collapse: collapse; font-size: .9rem; } th { text-align: left; font-weight: 600; }
td, th { padding: .25rem 1.4rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; white-space: pre-line; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
"""
LEGEND = (
    '<p class="legend">Boxes: orange marks a region to look at, green a right answer, '
    "magenta what a call cut out of its source.</p>"
)


def write_explanation(path: Path, explanation: Mapping[str, Any], members: Sequence[Entry]) -> None:
    """Write the page of one trajectory.

    explanation: as `explain.explain_reward` gives it. members: the conversations of its group, itself among them.
    Raises UserError where no page can be written at `path`.
    """
    name = explanation["trajectory_id"]
    write_page(path, f"Trajectory {name}", explanation_body(explanation, members), STYLE)


def explanation_body(explanation: Mapping[str, Any], members: Sequence[Entry]) -> Iterator[str]:
    """Yield the trajectory's conversation, its rewards, its totals and advantages, and its group side by side."""
    entry = next(member for member in members if member.row.trajectory_id == explanation["trajectory_id"])
    yield "<dl>"
    for label, value in (
        ("sample", f"{explanation['sample_id']}, rollout {explanation['index']}"),
        *explanation["artifacts"].items(),
        ("policy", f"{explanation['policy'][:12]}, weights {explanation['weights'][:12]}"),
    ):
        yield f"<dt>{escape_text(label)}</dt><dd>{escape_text(str(value))}</dd>"
    yield f"</dl>{LEGEND}<h2>Conversation</h2>"
    yield from question_lines(entry)
    yield from conversation_card(entry)
    yield "<h2>Rewards</h2>"
    yield from component_table(entry.components)
    for weighed in explanation["weighed"]:
        yield from weighed_lines(weighed)
    yield f"<h2>Group: {len(members)} rollouts of the same question</h2>"
    yield from side_by_side(members, own=entry.row.trajectory_id)


def write_pairs(path: Path, title: str, facts: Iterable[str], pairs: Iterable[tuple[str, Entry, Entry]]) -> None:
    """Write a page of pairs of conversations about the same samples. pairs: (heading, of the first, of the second)."""

    def body() -> Iterator[str]:
        for fact in facts:
            yield f"<p>{escape_text(fact)}</p>"
        yield LEGEND
        for heading, first, second in pairs:
            yield f'<section><h2 dir="auto">{escape_text(heading)}</h2>'
            yield from question_lines(first)
            yield from side_by_side((first, second))
            yield "</section>"

    write_page(path, title, body(), STYLE)


def question_lines(entry: Entry) -> Iterator[str]:
    """Yield the question with its pictures, options, and right answer."""
    sample = entry.sample
    yield '<div class="pictures">'
    for number, sha256 in enumerate(sample.images):
        boxes = {"target": sample.targets, "answer": answer_boxes(sample)} if number == 0 else {}
        share = 1.0 if len(sample.images) == 1 else 0.5
        yield from render_figure(make_thumbnail(entry.images[sha256]), f"image {number}", boxes, share=share)
    yield f'</div><p class="question" dir="auto">{escape_text(sample.question)}</p>'
    yield from list_options(sample)
    yield f'<p class="where" dir="auto">{escape_text(state_right(sample))}</p>'


def side_by_side(entries: Iterable[Entry], own: str = "") -> Iterator[str]:
    """Yield conversations beside each other. own: id of the one that is marked."""
    yield '<div class="side">'
    for entry in entries:
        yield from conversation_card(entry, marked=entry.row.trajectory_id == own, small=True)
    yield "</div>"


def conversation_card(entry: Entry, *, marked: bool = False, small: bool = False) -> Iterator[str]:
    """Yield a conversation: answer, advantage, turns. small: with its scores, and smaller pictures."""
    row = entry.row
    kind = {True: "ok", False: "wrong", None: ""}[entry.is_right]
    verdict = {True: "right", False: "wrong", None: "not judged"}[entry.is_right]
    answer = "no answer" if row.answer is None else row.answer
    yield f"<article{' class=own' if marked else ''}>"
    if small:
        yield f'<header class="where">{escape_text(row.trajectory_id)}</header>'
    yield f'<h3 class="{kind}" dir="auto">{escape_text(answer)} <span class="where">({verdict}, {row.stop})</span></h3>'
    if small:
        for weighed in entry.weighed:
            text = f"total {weighed['total']:.4g}, advantage {weighed['advantage']:+.4g} ({weighed['reason']})"
            yield f'<p class="where">{escape_text(text)}</p>'
        values = ", ".join(f"{name} {format_score(score['value'])}" for name, score in entry.components.items())
        yield f'<p class="where">{escape_text(values)}</p>'
    if row.error:
        yield f'<p class="error">{escape_text(row.error)}</p>'
    for number, turn in enumerate(row.turns):
        yield from turn_lines(entry, number, turn, share=0.55 if small else 1.0)
    yield "</article>"


def turn_lines(entry: Entry, number: int, turn: Turn, *, share: float) -> Iterator[str]:
    """Yield a turn's text, its call, the source with the box that was cut out, the result, and what was told."""
    yield f'<div class="turn"><h4>Turn {number} <span class="where">{turn.kind}, {turn.tokens} tokens</span></h4>'
    yield f'<pre dir="auto">{escape_text(turn.text)}</pre>'
    if turn.kind is TurnKind.TOOL:
        on = "" if turn.source is None else f" on image {turn.source}"
        yield f'<p class="call">{escape_text(f"{turn.tool} {turn.args}{on}: {turn.status}")}</p>'
    if turn.image is not None and turn.source is not None:
        yield '<div class="pictures">'
        source = entry.images[entry.row.images[turn.source]]
        box = source_box(entry.row, turn, source.size, entry.tools)
        if box is not None:
            cut: Box = (box[0], box[1], box[2] - box[0], box[3] - box[1])
            yield from render_figure(make_thumbnail(source), f"image {turn.source}", {"cut": [cut]}, share=share)
        yield from render_figure(make_thumbnail(entry.images[turn.image]), "result", {}, share=share)
        yield "</div>"
    if turn.error:
        yield f'<p class="error" dir="auto">{escape_text(turn.error)}</p>'
    elif turn.observation:
        yield f'<p class="call" dir="auto">{escape_text(turn.observation)}</p>'
    yield "</div>"


def component_table(components: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the components with their reasons, judgements and evidence."""
    yield '<table><tr><th>component</th><th class="number">value</th><th>status</th><th>reason, judgements</th></tr>'
    for name, score in components.items():
        cells = f'<td>{escape_text(name)}</td><td class="number">{format_score(score["value"])}</td>'
        reasons = escape_text("\n".join(explain_component(score)))
        details = {key: score[key] for key in ("evidence", "judgements") if score[key]}
        if details:
            evidence = escape_text(json.dumps(details, indent=1, ensure_ascii=False))
            reasons += f"<details><summary>evidence</summary><pre>{evidence}</pre></details>"
        yield f"<tr>{cells}<td>{escape_text(score['status'])}</td><td>{reasons}</td></tr>"
    yield "</table>"


def weighed_lines(weighed: Mapping[str, Any]) -> Iterator[str]:
    """Yield the terms of a total under one mix, the advantage, and the reason for it."""
    trained = "" if weighed["trained"] else " (no policy was trained on these scores)"
    yield f"<h2>{escape_text('Mix of ' + weighed['by'] + trained)}</h2>"
    headings = "".join(f'<th class="number">{name}</th>' for name in ("weight", "value", "adds"))
    yield f"<table><tr><th>term</th>{headings}</tr>"
    for term in weighed["terms"]:
        name = term["name"] if term["name"] == term["column"] else f"{term['name']}: {term['column']}"
        mean = " (its group's mean)" if term["group_mean"] else ""
        cells = "".join(
            f'<td class="number">{text}</td>'
            for text in (
                f"{term['weight']:.4g}",
                format_score(term["value"]) + escape_text(mean),
                f"{term['adds']:.4f}",
            )
        )
        yield f"<tr><td>{escape_text(name)}</td>{cells}</tr>"
    yield "</table>"
    line = f"Total {weighed['total']:.4f}, advantage {weighed['advantage']:+.4f} ({weighed['reason']})."
    yield f"<p>{escape_text(line)} {escape_text(weighed['why'])}</p>"
