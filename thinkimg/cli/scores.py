"""Verbs that read stored scores: remix, explain, diff. They need neither engine nor GPU, and write nothing."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from thinkimg.cli.flags import JsonFlag, PresetFlag, SetFlag, open_config, read_paths, read_reference

ledger = App(name="ledger")

SCORES_HELP = "A scores artifact: the beginning of its fingerprint, or its path."
ScoresFlag = Annotated[str, Parameter(help=SCORES_HELP, converter=read_reference)]
TRAJECTORY_HELP = (
    "Id of a trajectory, or its beginning. MLflow's traces have it in the tag `trajectory`, and `thinkimg diff` prints "
    "it; one that there is not, such as ?, gets a list of some."
)
MixFlag = Annotated[
    list[Path] | None,
    Parameter(
        help="YAML file with `mix`, and `image` if that is in it; may be repeated.", negative=[], converter=read_paths
    ),
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
    trajectory: Annotated[str, Parameter(help=TRAJECTORY_HELP)],
    /,
    *,
    scores: Annotated[
        str | None,
        Parameter(help="Scores to explain. Left out: the newest of the trajectory.", converter=read_reference),
    ] = None,
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
