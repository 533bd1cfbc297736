"""Verbs that read stored scores: remix, explain, diff. They need neither engine nor GPU, and write nothing."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from thinkimg.cli.flags import JsonFlag, PresetFlag, SetFlag, open_config

ledger = App(name="ledger")

ScoresFlag = Annotated[str, Parameter(help="A scores artifact: the beginning of its fingerprint, or its path.")]
MixFlag = Annotated[
    list[Path] | None,
    Parameter(help="YAML file with `mix`, and `image` if that is in it; may be repeated.", negative=[]),
]


@ledger.command
def remix(
    scores: ScoresFlag,
    /,
    *,
    mix: MixFlag = None,
    preset: PresetFlag = "development",
    set: SetFlag = None,
    json: JsonFlag = False,
) -> None:
    """Compare mixes on stored scores: advantages, silent groups, best rows, rank correlation.

    The first line is the mix of the policy that was trained on the scores, or else the preset's.
    """
    from thinkimg.analysis.joined import open_scores, weighings
    from thinkimg.analysis.remix import compare_mixes, read_mixes
    from thinkimg.cli import tables

    config, store = open_config(preset, set)
    scored = open_scores(store.resolve(scores, "scores"), store)
    trained = weighings(store, scored.scores, config)
    entries = compare_mixes(scored, trained + read_mixes(mix or [], trained[0], scored))
    if json:
        tables.print_json({"scores": str(scored.scores.reference), "mixes": entries})
    else:
        tables.print_mixes(scored, entries)


@ledger.command
def explain(
    trajectory: Annotated[str, Parameter(help="Id of a trajectory, or its beginning.")],
    /,
    *,
    scores: Annotated[str | None, Parameter(help="Scores to explain. Left out: the newest of the trajectory.")] = None,
    preset: PresetFlag = "development",
    set: SetFlag = None,
    json: JsonFlag = False,
) -> None:
    """Explain the reward of one trajectory, from its question to its advantage."""
    from thinkimg.analysis.explain import explain_reward, find_trajectory
    from thinkimg.cli import tables

    config, store = open_config(preset, set)
    artifact, name, others = find_trajectory(store, trajectory, store.resolve(scores, "scores") if scores else None)
    explanation = explain_reward(store, artifact, name, config)
    if json:
        tables.print_json(explanation | {"other_scores": [str(other.reference) for other in others]})
    else:
        tables.print_explanation(explanation, others)


@ledger.command
def diff(
    first: ScoresFlag,
    second: ScoresFlag,
    /,
    *,
    preset: PresetFlag = "development",
    set: SetFlag = None,
    json: JsonFlag = False,
) -> None:
    """Compare two scores artifacts: settings first, then each component, with the reasons of every change."""
    from thinkimg.analysis.diff import compare_scores
    from thinkimg.cli import tables

    _, store = open_config(preset, set)
    changes = compare_scores(*(store.resolve(reference, "scores") for reference in (first, second)))
    if json:
        tables.print_json(changes)
    else:
        tables.print_changes(changes)
