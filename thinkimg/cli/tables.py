"""Text and tables of remix, explain and diff."""

import json
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from thinkimg.analysis.joined import Scored
from thinkimg.console import console, say, takes_unicode
from thinkimg.errors import shorten
from thinkimg.rewards.mix import Mix
from thinkimg.store.manifest import Artifact

MAX_ROWS = 30  # of a table; --json has all


def print_mixes(scored: Scored, entries: list[dict[str, Any]]) -> None:
    """Print one line per mix."""
    title = f"{scored.scores.kind}/{scored.scores.short}: {entries[0]['rows']} of {len(scored.ids)} rows count"
    caption = (
        "Compared with the first line: rank correlation of the advantages, groups whose best row differs, "
        "rows whose advantage has the other sign."
    )
    headings = ("mean total", "silent groups", "rows in loss", "rank corr.", "best differs", "sign differs")
    table = make_table(title, caption, "mix", "weights", *((name, "right") for name in headings))
    for entry in entries:
        silent = f"{entry['silent']} of {entry['groups']}"
        cells = [format_value(entry["mean_total"]), silent, str(entry["included"]), format_value(entry["spearman"][0])]
        cells += [str(entry["best_changed"]), str(entry["sign_changed"])]
        add_row(table, entry["name"], Mix.from_tree(entry).describe(), *cells)
    console.print(table)
    differing = [entry["name"] for entry in entries if entry["reproduced"]]
    if differing:
        say(f"Advantages that differ from those of the training: {', '.join(differing)}; see --json.")


def print_changes(changes: dict[str, Any]) -> None:
    """Print the settings that differ, a summary of each component, and the largest changes."""
    print_recipe(changes["recipe"])
    for side, only in zip(("first", "second"), changes["only_in"].values(), strict=True):
        if only["components"]:
            say(f"Components of the {side} alone: {', '.join(only['components'])}.")
        if only["trajectories"]:
            say(f"Trajectories of the {side} alone: {len(only['trajectories'])}.")
    if not changes["rows"]:
        say(f"No score differs in the {changes['compared']} trajectories that both have.")
        return
    headings = (("changed", "right"), ("mean change", "right"), ("largest", "right"), "why")
    table = make_table(f"{changes['compared']} trajectories", None, "component", *headings)
    for name, entry in changes["components"].items():
        reasons = ", ".join(f"{count} {why}" for why, count in entry["why"].items())
        figures = [format_value(entry[key], signed=True) for key in ("mean_change", "largest_change")]
        add_row(table, name, str(entry["changed"]), *figures, reasons)
    console.print(table)
    rows = sorted(changes["rows"], key=lambda row: -abs(row["change"] if row["change"] is not None else 2))
    caption = f"The largest of {len(rows)}; --json has all." if len(rows) > MAX_ROWS else None
    table = make_table("Rows", caption, "trajectory", "component", ("from", "right"), ("to", "right"), "why")
    for row in rows[:MAX_ROWS]:
        ends = [format_value(row[side]["value"]) for side in ("from", "to")]
        add_row(table, row["trajectory_id"], row["component"], *ends, format_reasons(row))
    console.print(table)


def print_recipe(recipe: dict[str, list[Any]]) -> None:
    """Print the settings, inputs and packages that differ."""
    if not recipe:
        say("Both have the same settings, inputs and packages.")
        return
    table = make_table("Settings and inputs", None, "name", "first", "second")
    for key, (before, after) in recipe.items():
        add_row(table, key, truncate(before), truncate(after))
    console.print(table)


def print_pairs(changes: dict[str, Any]) -> None:
    """Print the settings that differ, a summary of the greedy answers, and those that changed."""
    print_recipe(changes["recipe"])
    for line in pair_lines(changes):
        say(line)
    if not changes["rows"]:
        return
    caption = f"The first of {len(changes['rows'])}; --json has all." if len(changes["rows"]) > MAX_ROWS else None
    table = make_table("Answers that changed", caption, "sample", "change", "first", "second", "calls")
    for row in changes["rows"][:MAX_ROWS]:
        answers = [
            truncate(f"({row[side]['stop']})" if row[side]["answer"] is None else row[side]["answer"])
            for side in ("from", "to")
        ]
        calls = " → ".join(", ".join(row[side]["calls"]) or "none" for side in ("from", "to"))
        add_row(table, row["sample_id"], row["change"], *answers, truncate(calls))
    console.print(table)


def pair_lines(changes: dict[str, Any]) -> Iterator[str]:
    """Yield the accuracies of two evaluations over the samples of both, and the number of each kind of change."""
    before, after = ("none" if value is None else f"{100 * value:.1f} %" for value in changes["accuracy"])
    yield f"{changes['compared']} samples in both; accuracy of the first {before}, of the second {after}."
    counts = [f"{count} {kind}" for kind, count in changes["changes"].items()]
    chance = "" if changes["p_value"] is None else f" Sign test of lost against gained: p = {changes['p_value']:.3g}."
    yield f"Answers: {', '.join(counts)}.{chance}"
    for side, only in zip(("first", "second"), changes["only_in"].values(), strict=True):
        if only:
            yield f"Samples of the {side} alone: {len(only)}."


def format_reasons(row: dict[str, Any]) -> str:
    """Return the reasons of a change, with both values where they are short."""
    parts = []
    for why in row["why"]:
        part, _, name = why.partition(": ")
        if part in ("status", "reason"):
            why = f"{part}: {truncate(row['from'][part])} → {truncate(row['to'][part])}"
        elif part == "judgement":
            pairs = [change[name] for change in row["judgements"] if name in change]
            why += f" {truncate(pairs[0][0])} → {truncate(pairs[0][1])}"
        elif part == "evidence" and name != "all":
            values = [(row[side]["evidence"] or {}).get(name) for side in ("from", "to")]
            why += f" {truncate(values[0])} → {truncate(values[1])}"
        parts.append(why)
    return "; ".join(parts)


def print_explanation(explanation: dict[str, Any], others: list[Artifact]) -> None:
    """Print all about one trajectory. others: other scores of it."""
    for lines in (conversation_lines, component_lines, mix_lines):
        for line in lines(explanation):
            say(line)
    if others:
        names = ", ".join(f"scores/{other.short}/{other.attempt}" for other in others)
        say(f"\nOther scores of this trajectory: {names}. Choose them with --scores.")


def conversation_lines(explanation: dict[str, Any]) -> Iterator[str]:
    """Yield the question, the turns and the images."""
    yield f"Trajectory {explanation['trajectory_id']}, rollout {explanation['index']} of {explanation['sample_id']}"
    yield from explanation["artifacts"].values()
    yield f"Sampled from the policy {explanation['policy'][:12]}, weights {explanation['weights'][:12]}"
    choices = f" ({', '.join(explanation['choices'])})" if explanation["choices"] else ""
    answer = "none" if explanation["answer"] is None else explanation["answer"]
    yield f"\nQuestion: {explanation['question']}{choices}"
    yield f"Right answer: {explanation['right_answer']}"
    yield f"Given answer: {answer} (stop reason: {explanation['stop']})"
    if explanation["error"]:
        yield f"Error: {explanation['error']}"
    yield f"\nTurns (coordinates are {explanation['coordinates']})"
    for index, turn in enumerate(explanation["turns"]):
        yield f"  {index} [{turn['kind']}, {turn['tokens']} tokens] {turn['text']}"
        if turn["tool"]:
            image = f", image {turn['image'][:12]}" if turn["image"] else ""
            yield f"      {turn['tool']} {turn['args']} on image {turn['source']}: {turn['status']}{image}"
        if turn["error"]:
            yield f"      error: {turn['error']}"
        elif turn["observation"]:
            yield f"      observation: {turn['observation']}"
    yield "\nImages"
    for image in explanation["images"]:
        size = f"{image['width']}x{image['height']}" if image["width"] else "not stored"
        origin = "of the question" if image["made_by_turn"] is None else f"made by turn {image['made_by_turn']}"
        seen = f"seen at {image['seen_width']}x{image['seen_height']}"
        yield f"  {image['index']} {image['sha256'][:16]} {size}, {seen}, {origin}"


def component_lines(explanation: dict[str, Any]) -> Iterator[str]:
    """Yield each reward component with its evidence and judgements."""
    yield "\nComponents"
    for name, score in explanation["components"].items():
        reason = f": {score['reason']}" if score["reason"] else ""
        yield f"  {name} {format_value(score['value'])} ({score['status']}{reason})"
        evidence = score["evidence"]
        if isinstance(evidence, dict):
            evidence = {key: value for key, value in evidence.items() if key != "judgements"}
        if evidence:
            yield f"      evidence: {to_json(evidence)}"
        for judgement in score["judgements"]:
            yield f"      judgement: {format_judgement(judgement)}"


def mix_lines(explanation: dict[str, Any]) -> Iterator[str]:
    """Yield the total and the advantage under each mix, and those of the group."""
    if not explanation["weighed"]:
        yield "\nThe preset's mix needs columns that these scores lack. Name another with --set mix=…"
    for weighed in explanation["weighed"]:
        yield f"\nMix of {weighed['by']}{'' if weighed['trained'] else ' (no policy was trained on these scores)'}"
        for term in weighed["terms"]:
            name = term["name"] if term["name"] == term["column"] else f"{term['name']}: {term['column']}"
            mean = ", its group's mean" if term["group_mean"] else ""
            yield f"  {name} {term['weight']:.4g} x {format_value(term['value'])}{mean} = {term['adds']:.4f}"
        yield f"  {format_row(weighed)}"
        yield f"  {weighed['why']}"
        yield "  Group:"
        for row in weighed["group"]:
            mark = ">" if row["trajectory_id"] == explanation["trajectory_id"] else " "
            yield f"  {mark} {row['trajectory_id']} {format_row(row)}"


def format_row(row: dict[str, Any]) -> str:
    return f"total {row['total']:.4f}, advantage {row['advantage']:+.4f} ({row['reason']})"


def format_judgement(judgement: dict[str, Any]) -> str:
    """Return value, judge, model, weights, prompt and images of a judgement."""
    if "model" not in judgement:
        return f"{judgement['key']}, which is not stored"
    texts = {name: judgement.get(name) or "" for name in ("model", "weights", "prompt", "original", "processed")}
    model = f"{texts['model'] or 'no model'} (weights {texts['weights'][:12]})"
    judge = f"by {judgement.get('judge') or 'no judge'}, {model}, prompt {texts['prompt'][:12]}"
    images = f"images {texts['original'][:12]} and {texts['processed'][:12]}"
    reason = f", {judgement['reason']}" if judgement.get("reason") else ""
    evidence = f", {to_json(judgement['evidence'])}" if judgement.get("evidence") else ""
    return f"{format_value(judgement['value'])} {judge}, {images}{reason}{evidence}"


def make_table(title: str, caption: str | None, *headings: str | tuple[str, str]) -> Table:
    """Return an empty table. headings: names, or (name, justify)."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        name, justify = (heading, "left") if isinstance(heading, str) else heading
        table.add_column(name, justify=justify, overflow="fold")
    return table


def add_row(table: Table, *cells: str) -> None:
    """Add a row as it is: text of a model or a user may look like markup."""
    table.add_row(*map(Text, cells))


def format_value(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}.4f}"


def truncate(value: Any, length: int = 60) -> str:
    text = value if isinstance(value, str) else to_json(value)
    return shorten(text, length)


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=not takes_unicode())


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=not takes_unicode()))
