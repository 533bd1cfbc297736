"""One optimizer step over any number of micro-batches and processes; what GRPO and the warm start share."""

import resource
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.trainer.checkpoint import Policy
from thinkimg.trainer.forward.fsdp import clip_gradients, is_shard
from thinkimg.trainer.forward.logprobs import Scorer, base_model
from thinkimg.trainer.forward.packing import Conversation, micro_batches
from thinkimg.trainer.forward.shared_prompts import Unit, cost, plan
from thinkimg.trainer.rows import Patches, Row

T = TypeVar("T")
Progress = Callable[[dict], None]


@dataclass(frozen=True)
class Ranks:
    """The processes of a job. Models are not wrapped: gradients are summed here, so uneven work is no trouble."""

    rank: int = 0
    count: int = 1

    def share(self, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """This process's part of rows (indices into lengths): dealt by length, so that all have about as much to do."""
        return sorted(rows, key=lambda i: (lengths[i], i))[self.rank :: self.count]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum in place over processes."""
        if self.count > 1:
            for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def together_with(self, policy: Policy, spare: Conversation) -> dict:
        """What MicroBatches has to know where each forward pass is made by all processes at once."""
        return (
            {"company": lambda own: max(self.gather(own)), "spare": spare, "autocast": policy.autocast}
            if policy.sharded
            else {}
        )

    def together(self, function: Callable[[], T]) -> T:
        """Call it in every process; if it fails in one, it fails in all, so that none waits for another.

        Raises what it raised here; elsewhere a UserError as it is, anything else as a RuntimeError.
        """
        result, error = None, None
        try:
            result = function()
        except Exception as caught:  # raised again below, in every process
            error = caught
        told = error if error is None or isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        failures = [failure for failure in self.gather(told) if failure is not None]
        if failures:
            first = failures[0]
            raise error or (first if isinstance(first, UserError) else RuntimeError(f"in another process: {first}"))
        return result


class Stepper:
    """Accumulates gradients and steps AdamW. Parameters without a gradient in a step count as gradient 0."""

    def __init__(
        self,
        policy: Policy,
        parameters: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.AdamW,
        ranks: Ranks,
        max_grad_norm: float,
    ):
        self.policy, self.ranks, self.max_grad_norm = policy, ranks, max_grad_norm
        self.parameters, self.optimizer = list(parameters.values()), optimizer
        self.clear()

    def clear(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def step(self, learning_rate: float) -> float:
        """Sum the gradients over processes, clip, update, clear; returns the norm before clipping.

        Raises ArithmeticError if that is not finite; the weights are then unchanged.
        """
        grads = [parameter.grad for parameter in self.parameters]
        self.ranks.sum([grad for grad in grads if not is_shard(grad)])  # FSDP2 has summed the others
        if self.policy.sharded:
            norm = clip_gradients(self.parameters, self.max_grad_norm)
        else:
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if not np.isfinite(norm):
            raise ArithmeticError(f"the gradient's norm is {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.clear()
        return norm

    def release(self) -> None:
        """Give the gradients' memory back."""
        for parameter in self.parameters:
            parameter.grad = None


class Micro(NamedTuple):
    """rows: indices of conversations. units: how they are packed, by place in `rows`; None: a padded batch."""

    rows: list[int]
    units: list[Unit] | None


class MicroBatches:
    """Iterates over micro-batches, the largest first, while the next one's images are being read.

    The largest go first so that a batch that is too large for the memory shows at once.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        token_budget: int,
        scorer: Scorer,
        pixels: Patches,
        groups: Sequence[Hashable] | None = None,
        company: Callable[[int], int] = lambda own: own,
        spare: Conversation | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """groups: of each conversation; those of one group share their prompt. None: padded batches.

        company: own number of micro-batches -> that of the process that has most, where all have to make as many passes
        (FSDP2). What is missing is made up with passes over `spare` that add nothing.
        """
        self.company, self.spare, self.autocast = company, spare, autocast
        self.conversations, self.scorer, self.pixels = conversations, scorer, pixels
        self.batches = split(conversations, groups, token_budget, scorer.image_token)

    def __iter__(self) -> Iterator[Micro]:
        self._prepare(0)
        for number, batch in enumerate(self.batches):
            self._prepare(number + 1)
            yield batch
            self.pixels.trim()
            self.scorer.trim()
        for _ in range(self.company(len(self.batches)) - len(self.batches)):
            self.pixels.prepare([self.spare], self.scorer.features or ())
            with self.autocast():
                logps, _ = self.scorer([self.spare])
            if torch.is_grad_enabled():
                (logps.sum() * 0).backward()

    def _prepare(self, number: int) -> None:
        for batch in self.batches[number : number + 1]:
            self.pixels.prepare([self.conversations[i] for i in batch.rows], self.scorer.features or ())


def split(
    conversations: Sequence[Conversation], groups: Sequence[Hashable] | None, token_budget: int, image_token: int
) -> list[Micro]:
    """Micro-batches, packed by group or, without groups, padded."""
    if groups is None:
        return [Micro(rows, None) for rows in micro_batches(conversations, token_budget)][::-1]
    return [micro(units) for units in plan(conversations, groups, token_budget, image_token)]


def computed(rows: Sequence[Conversation], units: Sequence[Unit] | None) -> int:
    """Tokens of a micro-batch, those of a shared prompt once and padding included."""
    if units is None:
        return len(rows) * max(len(row.tokens) for row in rows)
    return sum(cost(unit, rows) for unit in units)


def micro(units: Sequence[Unit]) -> Micro:
    """Units of conversations' indices as a micro-batch."""
    rows = [i for unit in units for i in unit.rows]
    place = {i: k for k, i in enumerate(rows)}
    return Micro(rows, [Unit(tuple(place[i] for i in unit.rows), unit.prefix) for unit in units])


def score_all(
    policy: Policy,
    scorer: Scorer,
    pixels: Patches,
    rows: Sequence[Row],
    token_budget: int,
    *,
    packed: bool = False,
    entropy: bool = False,
    **together,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-probabilities, and entropies if asked for, of the scored tokens of each row, without gradient.

    packed: rows of a group share their prompt; else padded batches. together: company and spare, as MicroBatches has them.
    """
    logps: list[np.ndarray] = [np.empty(0)] * len(rows)
    entropies = list(logps)
    conversations = [row.conversation for row in rows]
    groups = [row.group_id for row in rows] if packed else None
    with torch.no_grad():
        for batch in MicroBatches(conversations, token_budget, scorer, pixels, groups, **together):
            with policy.autocast():
                found, spread = scorer([conversations[i] for i in batch.rows], batch.units, entropy=entropy)
            for target, values in ((logps, found), (entropies, spread)):
                if values is not None:
                    counts = [len(rows[i].engine) for i in batch.rows]
                    parts = values.float().cpu().numpy()
                    for i, part in zip(batch.rows, np.split(parts, np.cumsum(counts)[:-1]), strict=True):
                        target[i] = part
    return logps, entropies


def peak_memory_mb(device: torch.device) -> float:
    """Of the device since the job began, or of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Seconds between calls, the device's queue included."""

    def __init__(self, device: torch.device):
        self._device, self._last = device, time.perf_counter()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        last, self._last = self._last, time.perf_counter()
        return self._last - last


def checkpointing(policy: Policy, on: bool) -> None:
    """Compute activations of the language model again in the backward pass; transformers does so in training mode only."""
    language_model = base_model(policy.model).language_model
    if on:
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        language_model.gradient_checkpointing_disable()
    policy.model.train(on)
