"""Rule `format`: the share of turns that parse, provided that the trajectory ends with its one answer."""

from thinkimg.records import StopReason, Trajectory, TurnKind
from thinkimg.rewards.batch import Batch, Score


def score(batch: Batch) -> list[Score]:
    """Return (turns that parse / turns) if exactly one answer ends the trajectory, else 0."""
    return [_score(trajectory) for trajectory in batch.trajectories]


def _score(trajectory: Trajectory) -> Score:
    kinds = [turn.kind for turn in trajectory.turns]
    malformed = kinds.count(TurnKind.MALFORMED)
    evidence = {"turns": len(kinds), "malformed": malformed}
    ends = trajectory.stop is StopReason.ANSWER and kinds[-1:] == [TurnKind.ANSWER]
    if not ends or kinds.count(TurnKind.ANSWER) != 1:
        return Score.zero(f"The trajectory does not end with one answer ({trajectory.stop}).", evidence)
    return Score.of(1 - malformed / len(kinds), "No turn parses.", evidence)
