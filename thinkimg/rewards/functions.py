"""A user's own rewards: functions by import path, called as TRL's GRPOTrainer calls its reward functions.

TRL 1.16, trl/trainer/grpo_trainer.py, `_calculate_rewards`: fn(prompts=, completions=, completion_ids=, **columns,
trainer_state=, log_extra=, log_metric=) -> one float or None for each completion; may be async.
"""

import asyncio
import functools
import importlib
import inspect
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkimg.errors import UserError
from thinkimg.records import Role, StopReason, Trajectory, TurnKind
from thinkimg.rewards.batch import Batch, Score, Status

log = logging.getLogger(__name__)

FORM = "Write it as def name(completions, **columns) -> list[float]."
SAMPLED = list(Role).index(Role.SAMPLED)


@dataclass(frozen=True)
class UserFunction:
    """A loaded reward function; source is the file that defines it."""

    path: str
    name: str
    function: Callable[..., Any]
    source: bytes

    def score(self, batch: Batch) -> list[Score]:
        """One score per trajectory. None, NaN and infinities are missing, as are failed conversations, which the function
        is not shown. Values outside [0, 1] are kept, and the reason says so.

        Raises UserError, naming the function, if it raises or gives back something else than one number or None each.
        """
        shown = [t for t in batch.trajectories if t.stop is not StopReason.FAILED]
        extra: dict[str, list] = {}
        values = iter(self._call(shown, batch, extra) if shown else [])
        evidence = iter({name: column[i] for name, column in extra.items()} or None for i in range(len(shown)))
        failed = Score.missing("The conversation failed.")
        return [
            failed if t.stop is StopReason.FAILED else _score(next(values), next(evidence)) for t in batch.trajectories
        ]

    def _call(self, shown: list[Trajectory], batch: Batch, extra: dict[str, list]) -> list[float | None]:
        def log_extra(column: str, values: list) -> None:
            extra.setdefault(column, []).extend(map(_plain, values))

        def log_metric(name: str, value: float) -> None:
            log.info("%s: %s = %s", self.name, name, value)

        arguments = columns(shown, batch, images="images" in inspect.signature(self.function).parameters)
        trainer = {"trainer_state": None, "log_extra": log_extra, "log_metric": log_metric}
        try:
            result = self.function(**arguments | trainer)
            if inspect.isawaitable(result):
                result = asyncio.run(_finish(result))
            values = [None if value is None else _number(value) for value in result]
        except Exception as error:
            raise UserError(f"The reward function {self.path} failed: {type(error).__name__}: {error}") from error
        for what, column in [("values", values), *((f"values of {name}", column) for name, column in extra.items())]:
            if len(column) != len(shown):
                raise UserError(
                    f"The reward function {self.path} gave {len(column)} {what} for {len(shown)} completions.",
                    hint="Give one per completion, None where there is none.",
                )
        return values


@functools.cache
def load(path: str) -> UserFunction:
    """The function at `package.module:function`. Raises UserError with what is wrong with it.

    Cached as the import is: a file that is changed later is neither run nor recorded by this process.
    """
    module_name, _, name = path.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"The reward '{path}' is no import path.", hint="Write it as package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        message = f"The module of the reward function {path} cannot be imported: {type(error).__name__}: {error}"
        raise UserError(message, hint="It must be installed, or its folder be on PYTHONPATH.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"There is no function '{name}' in {module_name}.")
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise UserError(f"The reward function {path} does not take all columns.", hint=FORM)
    try:
        source = Path(inspect.getsourcefile(inspect.unwrap(function))).read_bytes()
    except (TypeError, OSError):
        raise UserError(f"The reward function {path} has no source that could be recorded.", hint=FORM) from None
    return UserFunction(path, name, function, source)


def columns(shown: list[Trajectory], batch: Batch, *, images: bool) -> dict[str, list]:
    """The arguments, each a list with one entry per trajectory.

    prompts and completions in TRL's conversational form; completion_ids: compact token ids after the first prompt; the
    sample's own fields (`answer` is the right one, `final_answer` the model's or None); with `images`, the sample's images in
    RGB at full resolution; the user's columns, and a puzzle's metadata, None where a sample has none of that name. A user's
    column with one of our names is in `columns` only, which has all of them: a dict per trajectory.
    """
    samples = [batch.sample(trajectory) for trajectory in shown]
    named = [sample.columns | sample.metadata for sample in samples]
    keys = dict.fromkeys(key for values in named for key in values)
    found: dict[str, list] = {key: [values.get(key) for values in named] for key in keys}
    found["columns"] = [sample.columns for sample in samples]
    found |= {
        name: [getattr(sample, name) for sample in samples] for name in ("sample_id", "question", "answer", "source")
    }
    found["answer_type"] = [str(sample.answer_type) for sample in samples]
    found["choices"] = [list(sample.choices) for sample in samples]
    found["final_answer"] = [trajectory.answer for trajectory in shown]
    found["prompts"] = [[{"role": "user", "content": sample.question}] for sample in samples]
    found["completions"] = [messages(trajectory) for trajectory in shown]
    found["completion_ids"] = [completion_ids(trajectory) for trajectory in shown]
    if images:
        assert batch.images is not None, "a reward function asks for images"
        found["images"] = [[batch.images.decoded(sha256) for sha256 in sample.images] for sample in samples]
    return found


def messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    """What was said after the prompt: the model's turns as it wrote them, and what came back to each."""
    said: list[dict[str, Any]] = []
    for turn in trajectory.turns:
        message: dict[str, Any] = {"role": "assistant", "content": turn.text}
        reply: dict[str, Any] = {"role": "user", "content": turn.observation}
        if turn.kind is TurnKind.TOOL:
            call = {"name": turn.tool, "arguments": json.loads(turn.args)}
            message["tool_calls"] = [{"type": "function", "function": call}]
            reply = {"role": "tool", "name": turn.tool, "content": turn.observation}
        said += [message, reply] if turn.observation is not None else [message]
    return said


def completion_ids(trajectory: Trajectory) -> list[int]:
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
    """A number of whatever library; a text that looks like one is a mistake."""
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else str(value)


async def _finish(awaitable: Any) -> Any:
    return await awaitable
