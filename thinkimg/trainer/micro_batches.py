"""Micro-batches of a step: rows that go through the model together, with their images read ahead."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.packing import Conversation, ImageToken, batch_by_length
from thinkimg.trainer.forward.shared_prompts import Unit, count_unit_tokens, plan
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import Patches


class MicroBatch(NamedTuple):
    """Rows of one forward pass."""

    rows: list[int]
    """Indices of conversations."""
    units: list[Unit] | None
    """Packing of these rows, by their position in `rows`; None: a padded batch."""


@dataclass(frozen=True)
class Lockstep:
    """Passes that all processes make at once (FSDP2).

    A process with fewer micro-batches makes up the difference with passes over `spare` that add nothing.
    """

    policy: PolicyModel
    ranks: Ranks
    spare: Conversation

    @classmethod
    def of(cls, policy: PolicyModel, ranks: Ranks, spare: Conversation) -> "Lockstep | None":
        """Return the lockstep of a sharded policy, None for another."""
        return cls(policy, ranks, spare) if policy.sharded else None


class MicroBatches:
    """Iterator over micro-batches, the largest first, while the next one's images are being read.

    The largest go first so that a batch that is too large for the memory shows at once.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        token_budget: int,
        scorer: Scorer,
        pixels: Patches,
        groups: Sequence[Hashable] | None = None,
        lockstep: Lockstep | None = None,
    ):
        """groups: of each conversation; those of one group share their prompt. None: padded batches."""
        self.conversations, self.scorer, self.pixels, self.lockstep = conversations, scorer, pixels, lockstep
        self.batches = split(conversations, groups, token_budget, scorer.image_token)

    def __iter__(self) -> Iterator[MicroBatch]:
        # Counted before the first pass: a process that is done early would wait in another collective than the others.
        passes = 0 if self.lockstep is None else max(self.lockstep.ranks.gather(len(self.batches)))
        self._prepare(0)
        for number, batch in enumerate(self.batches):
            self._prepare(number + 1)
            yield batch
            self.pixels.trim()
            self.scorer.trim()
        if self.lockstep is not None:
            self._keep_step(self.lockstep, passes - len(self.batches))

    def _prepare(self, number: int) -> None:
        for batch in self.batches[number : number + 1]:
            self.pixels.prepare([self.conversations[i] for i in batch.rows], self.scorer.features or ())

    def _keep_step(self, lockstep: Lockstep, missing: int) -> None:
        for _ in range(missing):
            self.pixels.prepare([lockstep.spare], self.scorer.features or ())
            with lockstep.policy.autocast():
                logps, _ = self.scorer([lockstep.spare])
            if torch.is_grad_enabled():
                (logps.sum() * 0).backward()


def split(
    conversations: Sequence[Conversation], groups: Sequence[Hashable] | None, token_budget: int, image_token: ImageToken
) -> list[MicroBatch]:
    """Return micro-batches, packed by group or, without groups, padded; the largest first."""
    if groups is None:
        return [MicroBatch(rows, None) for rows in batch_by_length(conversations, token_budget)][::-1]
    batches = []
    for units in plan(conversations, groups, token_budget, image_token):
        rows = [i for unit in units for i in unit.rows]
        positions = {i: k for k, i in enumerate(rows)}
        units = [Unit(tuple(positions[i] for i in unit.rows), unit.prefix) for unit in units]
        batches.append(MicroBatch(rows, units))
    return batches


def count_tokens(rows: Sequence[Conversation], units: Sequence[Unit] | None) -> int:
    """Return the tokens that a micro-batch computes: a shared prompt's once, padding included."""
    if units is None:
        return len(rows) * max(len(row.tokens) for row in rows)
    return sum(count_unit_tokens(unit, rows) for unit in units)
