"""A user's own reward functions, called as TRL's GRPOTrainer calls its reward functions.

TRL 1.16, trl/trainer/grpo_trainer.py, `_calculate_rewards`: fn(prompts=, completions=, completion_ids=, **columns,
trainer_state=, log_extra=, log_metric=) -> one float or None for each completion. The function may be async.
"""

import asyncio
import inspect
import json
import logging
import math
from typing import Any

from thinkimg.errors import UserError, describe_error
from thinkimg.records import Role, StopReason, Trajectory, TurnKind
from thinkimg.rewards.batch import Batch, Score, Status
from thinkimg.rewards.user_function import UserFunction

log = logging.getLogger(__name__)

SAMPLED = list(Role).index(Role.SAMPLED)


def score_with(own: UserFunction, batch: Batch) -> list[Score]:
    """Return one score per trajectory, by a user's function.

    None, NaN and infinities are missing values, and so are failed conversations, which the function does not get.
    Values outside [0, 1] are kept with a reason that says so. Raises UserError, naming the function, if it raises, or
    returns anything but one number or None each.
    """
    shown = [t for t in batch.trajectories if t.stop is not StopReason.FAILED]
    extra: dict[str, list[Any]] = {}
    values = iter(_call(own, shown, batch, extra) if shown else [])
    evidence = iter({name: column[i] for name, column in extra.items()} or None for i in range(len(shown)))
    failed = Score.missing("The conversation failed.")
    return [failed if t.stop is StopReason.FAILED else _score(next(values), next(evidence)) for t in batch.trajectories]


def _call(own: UserFunction, shown: list[Trajectory], batch: Batch, extra: dict[str, list[Any]]) -> list[float | None]:
    def log_extra(column: str, values: list[Any]) -> None:
        extra.setdefault(column, []).extend(map(_plain, values))

    def log_metric(name: str, value: float) -> None:
        log.info("%s: %s = %s", own.name, name, value)

    arguments = build_columns(shown, batch, images="images" in inspect.signature(own.function).parameters)
    trainer = {"trainer_state": None, "log_extra": log_extra, "log_metric": log_metric}
    try:
        result = own.function(**arguments | trainer)
        if inspect.isawaitable(result):
            result = asyncio.run(_finish(result))
        values = [None if value is None else _number(value) for value in result]
    except Exception as error:
        hint = "It gets a list per column and returns one number per completion; see docs/rewards.md."
        raise UserError(f"The reward function {own.path} failed: {describe_error(error)}.", hint=hint) from error
    columns: dict[str, list[Any]] = {"values": values} | {f"values of {name}": column for name, column in extra.items()}
    for kind, column in columns.items():
        if len(column) != len(shown):
            raise UserError(
                f"The reward function {own.path} returned {len(column)} {kind} for {len(shown)} completions.",
                hint="Return one per completion, None where there is none.",
            )
    return values


def build_columns(shown: list[Trajectory], batch: Batch, *, images: bool) -> dict[str, list[Any]]:
    """Return the arguments of a reward function, each a list with one entry per trajectory.

    prompts, completions: in TRL's conversational form. completion_ids: compact token ids after the first prompt.
    final_answer: the model's answer or None. images: the sample's images, RGB at full resolution. sample_id, question,
    answers (the right ones), answer (the first), answer_type, choices, source, targets (x, y, width, height): of the
    sample.

    The user's own columns and a puzzle's metadata are further arguments, None where a sample has none of that name. A
    user's column with one of the names above is in `columns` only, which holds all of them: a dict per trajectory.
    """
    samples = [batch.sample(trajectory) for trajectory in shown]
    named = [sample.columns | sample.metadata for sample in samples]
    keys = dict.fromkeys(key for row in named for key in row)
    arguments: dict[str, list[Any]] = {key: [row.get(key) for row in named] for key in keys}
    arguments |= {
        name: [getattr(sample, name) for sample in samples]
        for name in ("columns", "sample_id", "question", "answer", "source")
    }
    arguments |= {
        "answers": [list(sample.answers) for sample in samples],
        "targets": [[list(box) for box in sample.targets] for sample in samples],
        "answer_type": [str(sample.answer_type) for sample in samples],
        "choices": [list(sample.choices) for sample in samples],
        "final_answer": [trajectory.answer for trajectory in shown],
        "prompts": [[{"role": "user", "content": sample.question}] for sample in samples],
        "completions": [render_messages(trajectory) for trajectory in shown],
        "completion_ids": [completion_ids(trajectory) for trajectory in shown],
    }
    if images:
        assert batch.images is not None, "a reward function asks for images"
        arguments["images"] = [[batch.images.decoded(sha256) for sha256 in sample.images] for sample in samples]
    return arguments


def render_messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Return the messages after the prompt: the model's turns as it wrote them, and the reply to each."""
    messages: list[dict[str, Any]] = []
    for turn in trajectory.turns:
        message: dict[str, Any] = {"role": "assistant", "content": turn.text}
        reply: dict[str, Any] = {"role": "user", "content": turn.observation}
        if turn.kind is TurnKind.TOOL:
            assert turn.args is not None
            call = {"name": turn.tool, "arguments": json.loads(turn.args)}
            message["tool_calls"] = [{"type": "function", "function": call}]
            reply = {"role": "tool", "name": turn.tool, "content": turn.observation}
        messages += [message, reply] if turn.observation is not None else [message]
    return messages


def completion_ids(trajectory: Trajectory) -> list[int]:
    """Return the compact token ids from the first sampled one on."""
    start = trajectory.roles.index(SAMPLED) if SAMPLED in trajectory.roles else len(trajectory.roles)
    return list(trajectory.tokens[start:])


def _score(value: float | None, evidence: dict[str, Any] | None) -> Score:
    if value is None:
        return Score.missing("The function gave None.", evidence)
    if not math.isfinite(value):
        return Score.missing(f"The function gave {value}.", evidence)
    if not 0 <= value <= 1:
        return Score(value, Status.OK, "The value is outside of [0, 1].", evidence)
    return Score.of(value, "The function gave 0.", evidence)


def _number(value: Any) -> float:
    """Return a number of any library as a float. Raises TypeError for a text, even one that looks like a number."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else str(value)


async def _finish(awaitable: Any) -> Any:
    return await awaitable
