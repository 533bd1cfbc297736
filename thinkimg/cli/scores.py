"""Verbs that read stored scores: remix, explain, diff. They need neither engine nor GPU, and write nothing."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from thinkimg.cli.flags import JsonFlag, PresetFlag, SetFlag, open_config, read_path, read_paths, read_reference
from thinkimg.errors import UserError

ledger = App(name="ledger")

SCORES_HELP = "A scores artifact: the beginning of its fingerprint, or its path."
ScoresFlag = Annotated[str, Parameter(help=SCORES_HELP, converter=read_reference)]
TRAJECTORY_HELP = (
    "Id of a trajectory, or its beginning. MLflow's traces have it in the tag `trajectory`, and `thinkimg diff` prints "
    "it; one that there is not, such as ?, gets a list of some."
)
SIDE_HELP = "Scores, an evaluation, or a policy with one: the beginning of the fingerprint, or the path."
SideFlag = Annotated[str, Parameter(help=SIDE_HELP, converter=read_reference)]
HtmlFlag = Annotated[
    Path | None, Parameter(name="--html", help="Write a page with pictures to this file, too.", converter=read_path)
]
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
    html: HtmlFlag = None,
    preset: PresetFlag = "development",
    set: SetFlag = None,
    json: JsonFlag = False,
) -> None:
    """Explain the reward of one trajectory, from its question to its advantage."""
    from thinkimg.analysis.explain import explain_reward, find_trajectory
    from thinkimg.cli import tables
    from thinkimg.data.report.page import check_page

    config, store = open_config(preset, set)
    if html:
        check_page(html)
    artifact, name, others = find_trajectory(store, trajectory, store.resolve(scores, "scores") if scores else None)
    explanation = explain_reward(store, artifact, name, config)
    if html:
        from thinkimg.analysis.pages import write_explanation
        from thinkimg.analysis.view import View

        write_explanation(html, explanation, View(store, artifact, config).group(explanation["group_id"]))
    if json:
        tables.print_json(explanation | {"other_scores": [str(other.reference) for other in others]})
    else:
        tables.print_explanation(explanation, others)


@ledger.command
def diff(
    first: SideFlag,
    second: SideFlag,
    /,
    *,
    html: HtmlFlag = None,
    preset: PresetFlag = "development",
    set: SetFlag = None,
    json: JsonFlag = False,
) -> None:
    """Compare two scores by component, or two evaluations or policies by their greedy answers to the same samples.

    Settings come first, then what changed, with its reasons.
    """
    from thinkimg.cli import tables
    from thinkimg.data.report.page import check_page

    config, store = open_config(preset, set)
    if html:
        check_page(html)
    sides = [store.resolve(reference) for reference in (first, second)]
    if all(side.kind == "scores" for side in sides):
        from thinkimg.analysis.diff import compare_scores

        if html:
            raise UserError("Two scores have no page of pairs.", hint="Name two evaluations, or two policies.")
        changes = compare_scores(*sides)
        show = tables.print_changes
    else:
        from thinkimg.analysis.compare_policies import compare_evaluations, find_evaluation, read_pairs
        from thinkimg.analysis.view import View

        evaluations = [find_evaluation(store, side) for side in sides]
        changes = compare_evaluations(store, *evaluations)
        show = tables.print_pairs
        if html:
            from thinkimg.analysis.pages import write_pairs

            pairs = read_pairs(changes, *(View(store, evaluation, config) for evaluation in evaluations))
            title = " and ".join(f"evaluation/{evaluation.short}" for evaluation in evaluations)
            write_pairs(html, title, list(tables.pair_lines(changes)), pairs)
    if json:
        tables.print_json(changes)
    else:
        show(changes)
