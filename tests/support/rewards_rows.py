"""Rows for the tests of rewards: samples and trajectories in one line."""

import json
from dataclasses import replace

from thinkimg.records import AnswerType, CallStatus, Sample, StopReason, Trajectory, Turn, TurnKind
from thinkimg.rewards.batch import Batch
from thinkimg.rewards.settings import RewardsConfig


def sample(answer: str = "red", kind: AnswerType = AnswerType.TEXT, choices: tuple[str, ...] = (), **changes) -> Sample:
    row = Sample("s0", "Which colour?", (answer,), kind, choices, ("ab" * 32,), "test", "train")
    return replace(row, **changes)


def call(
    tool: str = "crop_image", status: CallStatus = CallStatus.OK, source: int = 0, observation: str = "Image 1.", **args
) -> Turn:
    text = f"<think>I look.</think><tool>{tool}</tool>"
    return Turn(text, TurnKind.TOOL, tool, json.dumps(args), status, source=source, observation=observation, tokens=3)


def malformed() -> Turn:
    return Turn("what?", TurnKind.MALFORMED, error="Begin with one <think>.", observation="Error: Begin.", tokens=1)


def final(text: str = "red") -> Turn:
    return Turn(f"<think>So.</think><answer>{text}</answer>", TurnKind.ANSWER, tokens=2)


def trajectory(*turns: Turn, answer: str | None = None, stop: StopReason | None = None, **changes) -> Trajectory:
    """Ends with an answer if one is given; without turns this is the only one.

    Images are seen at 14 pixels per patch.
    """
    turns = turns or ((final(answer),) if answer is not None else (malformed(),))
    stop = stop or (StopReason.MAX_TURNS if answer is None else StopReason.ANSWER)
    row = Trajectory(
        trajectory_id="t0", sample_id="s0", group_id="g0", index=0, policy="p", tokens=(1, 2, 7, 8, 9),
        roles=(0, 0, 1, 1, 2),
        logprobs=(-0.5, -0.25), images=("ab" * 32,), grids=((1, 4, 4),), turns=turns,
        answer=answer, stop=stop, error=None,
        weights="v0", sizes=(),
    )  # fmt: skip
    sizes = tuple((14 * wide, 14 * high) for _, high, wide in changes.get("grids", row.grids))
    return replace(row, **{"sizes": sizes} | changes)


def failed() -> Trajectory:
    return trajectory(stop=StopReason.FAILED, turns=(), error="the engine broke")


def batch(trajectories: list[Trajectory], one: Sample | None = None, images=None, **config) -> Batch:
    return Batch(trajectories, {"s0": one or sample()}, RewardsConfig(**config), images)
