"""The commands that read the ledger: remix, explain, diff. They need neither an engine nor a GPU, and write nothing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from rich.table import Table

    from thinkimg.config.tree import Config
    from thinkimg.store.artifacts import Store

ledger = App(name="ledger")

Scores = Annotated[str, Parameter(help="A scores artifact: the beginning of its fingerprint, or its path.")]
Preset = Annotated[str, Parameter(name=["--preset", "-p"], help="Name of a preset, or the path of a YAML file.")]
Set = Annotated[
    list[str] | None, Parameter(name=["--set", "-s"], help="A setting, as a.b=value; may be repeated.", negative=[])
]
Json = Annotated[bool, Parameter(name="--json", help="Print everything as JSON.", negative=[])]
ROWS = 30  # of a table; --json has all


def opened(preset: str, overrides: list[str] | None) -> "tuple[Config, Store]":
    from thinkimg.config.load import load
    from thinkimg.store.artifacts import Store

    config = load(preset, overrides or ())
    return config, Store(config.where.store)


@ledger.command
def remix(
    scores: Scores,
    /,
    *,
    mix: Annotated[list[Path] | None, Parameter(help="YAML with `mix`, and `image` if it names that; may be repeated.",
                                                negative=[])] = None,
    preset: Preset = "development",
    set: Set = None,
    json: Json = False,
) -> None:  # fmt: skip
    """What another mix would have made of stored scores: advantages, silent groups, who is best, rank correlation.

    The first line is the mix that the scores were trained with; that of the preset where they were not.
    """
    from thinkimg.analysis import remix as made
    from thinkimg.analysis.joined import open_scores, weighings

    config, store = opened(preset, set)
    scored = open_scores(store.resolve(scores, "scores"), store)
    own = weighings(store, scored.scores, config)
    entries = made.remix(scored, own + made.read_mixes(mix or [], own[0], scored))
    if json:
        printed({"scores": str(scored.scores.reference), "mixes": entries})
        return
    title = f"{scored.scores.kind}/{scored.scores.short}: {entries[0]['rows']} of {len(scored.ids)} rows count"
    caption = "Compared with the first line: rank correlation of advantages, groups with another best row, rows whose sign changes."
    shown = table(title, caption, "mix", "weights", *((name, "right") for name in (
        "mean total", "silent", "rows in loss", "rank corr.", "other best", "other sign")))  # fmt: skip
    for entry in entries:
        silent = f"{entry['silent']} of {entry['groups']}"
        cells = [number(entry["mean_total"]), silent, str(entry["included"]), number(entry["spearman"][0])]
        cells += [str(entry["best_changed"]), str(entry["sign_changed"])]
        add(shown, entry["name"], readable_mix(entry), *cells)
    show(shown)
    differing = [entry["name"] for entry in entries if entry["reproduced"]]
    if differing:
        say(f"Not bit for bit what these were trained with: {', '.join(differing)}; see --json.")


@ledger.command
def explain(
    trajectory: Annotated[str, Parameter(help="Id of a trajectory, or its beginning.")],
    /,
    *,
    scores: Annotated[str | None, Parameter(help="The scores to explain; those that were made last.")] = None,
    preset: Preset = "development",
    set: Set = None,
    json: Json = False,
) -> None:
    """The whole story of one trajectory's reward, from the question to the advantage."""
    from thinkimg.analysis.explain import find, story

    config, store = opened(preset, set)
    named = store.resolve(scores, "scores") if scores else None
    artifact, name, others = find(store, trajectory, named)
    told = story(store, artifact, name, config)
    if json:
        printed(told | {"other_scores": [str(other.reference) for other in others]})
        return
    for line in lines(told):
        say(line)
    if others:
        say(
            f"\nIt was also scored as {', '.join(f'scores/{one.short}/{one.attempt}' for one in others)}: see --scores."
        )


@ledger.command
def diff(one: Scores, other: Scores, /, *, preset: Preset = "development", set: Set = None, json: Json = False) -> None:
    """Which scores differ between two artifacts, and why: settings first, then component by component."""
    from thinkimg.analysis.diff import diff as compare

    _, store = opened(preset, set)
    found = compare(*(store.resolve(reference, "scores") for reference in (one, other)))
    if json:
        printed(found)
        return
    if found["recipe"]:
        shown = table("Made with", None, "setting", "one", "other")
        for key, (before, after) in found["recipe"].items():
            add(shown, key, brief(before), brief(after))
        show(shown)
    else:
        say("Both were made with the same settings, inputs and packages.")
    for side, only in found["only_in"].items():
        if only["components"]:
            say(f"Components of {side} alone: {', '.join(only['components'])}.")
        if only["trajectories"]:
            say(f"Trajectories of {side} alone: {len(only['trajectories'])}.")
    if not found["rows"]:
        say(f"No score differs in the {found['compared']} trajectories that both have.")
        return
    headings = (("changed", "right"), ("mean change", "right"), ("largest", "right"), "why")
    shown = table(f"{found['compared']} trajectories", None, "component", *headings)
    for name, entry in found["components"].items():
        reasons = ", ".join(f"{count} {why}" for why, count in entry["why"].items())
        changes = [number(entry[key], signed=True) for key in ("mean_change", "largest_change")]
        add(shown, name, str(entry["changed"]), *changes, reasons)
    show(shown)
    rows = sorted(found["rows"], key=lambda row: -abs(row["change"] if row["change"] is not None else 2))
    left = len(rows) - ROWS
    caption = f"The largest of {len(rows)}; --json has all." if left > 0 else None
    shown = table("Rows", caption, "trajectory", "component", ("from", "right"), ("to", "right"), "why")
    for row in rows[:ROWS]:
        ends = [number(row[side]["value"]) for side in ("from", "to")]
        add(shown, row["trajectory_id"], row["component"], *ends, because(row))
    show(shown)


def because(row: dict[str, Any]) -> str:
    """Each reason; with both texts where it is short."""
    parts = []
    for why in row["why"]:
        part, _, name = why.partition(": ")
        if part in ("status", "reason"):
            why = f"{part}: {brief(row['from'][part])} → {brief(row['to'][part])}"
        elif part == "judgement":
            pairs = [change[name] for change in row["judgements"] if name in change]
            why += f" {brief(pairs[0][0])} → {brief(pairs[0][1])}"
        elif part == "evidence" and name != "all":
            values = [(row[side]["evidence"] or {}).get(name) for side in ("from", "to")]
            why += f" {brief(values[0])} → {brief(values[1])}"
        parts.append(why)
    return "; ".join(parts)


def lines(told: dict[str, Any]) -> "list[str]":
    """A story as text for people."""
    artifacts = ", ".join(told["artifacts"].values())
    out = [f"Trajectory {told['trajectory_id']}, rollout {told['index']} of {told['sample_id']}", artifacts]
    out += [f"played by the policy {told['policy'][:12]}, weights {told['weights'][:12]}"]
    choices = f" ({', '.join(told['choices'])})" if told["choices"] else ""
    out += ["", f"Question: {told['question']}{choices}", f"Right answer: {told['right_answer']}"]
    out += [f"Its answer: {'none' if told['answer'] is None else told['answer']} (ended by {told['stop']})"]
    out += [f"Error: {told['error']}"] if told["error"] else []
    out += ["", "Turns"]
    for index, turn in enumerate(told["turns"]):
        out.append(f"  {index} [{turn['kind']}, {turn['tokens']} tokens] {turn['text']}")
        if turn["tool"]:
            image = f", image {turn['image'][:12]}" if turn["image"] else ""
            out.append(f"      {turn['tool']} {turn['args']} on image {turn['source']}: {turn['status']}{image}")
        for label in ("error", "observation"):
            if turn[label] and not (label == "observation" and turn["error"]):
                out.append(f"      {label}: {turn[label]}")
    out += ["", "Images"]
    for image in told["images"]:
        size = f"{image['width']}x{image['height']}" if image["width"] else "not stored"
        origin = "of the question" if image["made_by_turn"] is None else f"made by turn {image['made_by_turn']}"
        seen = f"seen at {image['seen_width']}x{image['seen_height']}"
        out.append(f"  {image['index']} {image['sha256'][:16]} {size}, {seen}, {origin}")
    out += ["", "Components"]
    for name, score in told["components"].items():
        reason = f": {score['reason']}" if score["reason"] else ""
        out.append(f"  {name} {number(score['value'])} ({score['status']}{reason})")
        evidence = score["evidence"]
        if isinstance(evidence, dict):
            evidence = {key: value for key, value in evidence.items() if key != "judgements"}
        out += [f"      evidence: {compact(evidence)}"] if evidence else []
        out += [f"      judged: {judged(judgement)}" for judgement in score["judgements"]]
    for weighed in told["weighed"]:
        out += ["", f"Mix of {weighed['by']}{'' if weighed['trained'] else ' (no policy was trained on these scores)'}"]
        for term in weighed["terms"]:
            name = term["name"] if term["name"] == term["column"] else f"{term['name']}: {term['column']}"
            mean = ", its group's mean" if term["group_mean"] else ""
            out.append(f"  {name} {term['weight']:.4g} x {number(term['value'])}{mean} = {term['adds']:.4f}")
        out.append(f"  total {weighed['total']:.4f}, advantage {weighed['advantage']:+.4f} ({weighed['reason']})")
        out += [f"  {weighed['why']}", "  Its group:"]
        for row in weighed["group"]:
            mark = ">" if row["trajectory_id"] == told["trajectory_id"] else " "
            figures = f"total {row['total']:.4f}, advantage {row['advantage']:+.4f} ({row['reason']})"
            out.append(f"  {mark} {row['trajectory_id']} {figures}")
    return out


def judged(judgement: dict[str, Any]) -> str:
    if "model" not in judgement:
        return f"{judgement['key']}, which is not stored"
    texts = {name: judgement.get(name) or "" for name in ("model", "weights", "prompt", "original", "processed")}
    by = f"by {judgement.get('judge') or 'nobody'}, {texts['model'] or 'no model'} (weights {texts['weights'][:12]}), prompt {texts['prompt'][:12]}"
    images = f"images {texts['original'][:12]} and {texts['processed'][:12]}"
    reason = f", {judgement['reason']}" if judgement.get("reason") else ""
    evidence = f", {compact(judgement['evidence'])}" if judgement.get("evidence") else ""
    return f"{number(judgement['value'])} {by}, {images}{reason}{evidence}"


def table(title: str, caption: str | None, *headings: str | tuple[str, str]) -> "Table":
    from rich import box
    from rich.table import Table

    made = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        name, justify = (heading, "left") if isinstance(heading, str) else heading
        made.add_column(name, justify=justify, overflow="fold")
    return made


def readable_mix(entry: dict[str, Any]) -> str:
    from thinkimg.rewards.mix import Mix

    return Mix.of(entry).readable()


def number(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}.4f}"


def brief(value: Any, length: int = 60) -> str:
    text = value if isinstance(value, str) else compact(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def compact(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def printed(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False))


def add(shown: "Table", *cells: str) -> None:
    from rich.text import Text

    shown.add_row(*map(Text, cells))  # what a model or a user wrote is no markup


def show(shown: "Table") -> None:
    from thinkimg.console import console

    console.print(shown)


def say(line: str) -> None:
    from thinkimg import console

    console.say(line)
