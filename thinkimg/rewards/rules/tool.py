"""Rule `tool`: the share of tool calls that succeeded and brought something new."""

import json

from thinkimg.records import CallStatus, Trajectory, Turn, TurnKind
from thinkimg.rewards.batch import Batch, Score


def score(batch: Batch) -> list[Score]:
    """Return (successful calls that are no duplicates / calls); 0 without a call.

    A call is a duplicate if its image was in the conversation before, or if the same call on the same image succeeded
    before.
    """
    return [_score(trajectory) for trajectory in batch.trajectories]


def _score(trajectory: Trajectory) -> Score:
    calls = [turn for turn in trajectory.turns if turn.kind is TurnKind.TOOL]
    if not calls:
        return Score.zero("No tool was called.")
    succeeded: set[tuple[str, str, int]] = set()
    duplicates = 0
    for turn in calls:
        if turn.status is CallStatus.OK and _identity(turn) not in succeeded:
            succeeded.add(_identity(turn))
        elif turn.status in (CallStatus.OK, CallStatus.DUPLICATE):
            duplicates += 1
    new = len(succeeded)
    evidence = {"calls": len(calls), "new": new, "duplicates": duplicates, "errors": len(calls) - new - duplicates}
    return Score.of(new / len(calls), "No call brought anything new.", evidence)


def _identity(turn: Turn) -> tuple[str, str, int]:
    """Return tool, arguments and source of a call; without `image`, as "current" and 0 may name the same source."""
    assert turn.tool is not None and turn.args is not None and turn.source is not None
    args = json.loads(turn.args)
    args.pop("image", None)
    return turn.tool, json.dumps(args, sort_keys=True), turn.source
