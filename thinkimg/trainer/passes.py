"""Forward passes over the rows of a job, for GRPO and the warm start."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from thinkimg.trainer.forward import shared_prompts
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.packing import Conversation
from thinkimg.trainer.forward.shared_prompts import Unit
from thinkimg.trainer.micro_batches import Lockstep, MicroBatches, split
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import Patches, Row


@dataclass(frozen=True)
class Passes:
    """Forward passes over the rows of a job, which are named by their index."""

    policy: PolicyModel
    ranks: Ranks
    scorer: Scorer
    pixels: Patches
    rows: Sequence[Row]
    token_budget: int
    """Tokens of a micro-batch."""
    packed: bool
    """True if the rows of a group share their prompt."""

    def share(self, batch: Sequence[int]) -> list[int]:
        """Return this process's share of a batch."""
        conversations = self.conversations(batch)
        if not self.packed:
            return self.ranks.share(batch, {i: len(row.tokens) for i, row in zip(batch, conversations, strict=True)})
        groups = [self.rows[i].group_id for i in batch]
        dealt = shared_prompts.balance(conversations, groups, self.scorer.image_token, self.ranks.count)
        return [batch[k] for k in dealt[self.ranks.rank]]

    def score_together(self, indices: Sequence[int], *, autocast: bool = True) -> dict[int, np.ndarray]:
        """Return the log-probabilities of rows, each computed by one process. All call it.

        An error in one is one in all, except for a sharded policy: there it ends the process, as the others are within
        a pass, and the heartbeat ends these.
        """
        share = self.share(indices)
        if self.policy.sharded:
            return self.ranks.merge(self.score(share, autocast=autocast)[0])
        return self.ranks.merge(self.ranks.together(lambda: self.score(share, autocast=autocast)[0]))

    def score(
        self, indices: Sequence[int], *, entropy: bool = False, autocast: bool = True
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Return the log-probabilities of each row's scored tokens, and entropies if asked for, without gradient.

        autocast: False: in the dtype of the weights.
        """
        logps: dict[int, np.ndarray] = {}
        entropies: dict[int, np.ndarray] = {}
        with torch.no_grad():
            for batch in self.micro_batches(indices):
                rows = [indices[k] for k in batch.rows]
                ends = np.cumsum([len(self.rows[i].engine) for i in rows])[:-1]
                with self.policy.autocast() if autocast else nullcontext():
                    scores = self.scorer(self.conversations(rows), batch.units, entropy=entropy)
                for target, values in zip((logps, entropies), scores, strict=True):
                    if values is not None:
                        target |= zip(rows, np.split(values.float().cpu().numpy(), ends), strict=True)
        return logps, entropies

    def micro_batches(self, share: Sequence[int]) -> MicroBatches:
        """Return the micro-batches of a share; their rows are positions in it."""
        lockstep = Lockstep.of(self.policy, self.ranks, self.rows[0].conversation)
        rows, groups = self.conversations(share), self._groups(share)
        return MicroBatches(rows, self.token_budget, self.scorer, self.pixels, groups, lockstep)

    def split(self, share: Sequence[int]) -> list[tuple[list[Conversation], list[Unit] | None]]:
        """Return the micro-batches of a share as conversations and their packing; computes nothing."""
        rows = self.conversations(share)
        batches = split(rows, self._groups(share), self.token_budget, self.scorer.image_token)
        return [([rows[k] for k in batch.rows], batch.units) for batch in batches]

    def conversations(self, indices: Sequence[int]) -> list[Conversation]:
        """Return the rows' conversations."""
        return [self.rows[i].conversation for i in indices]

    def _groups(self, indices: Sequence[int]) -> list[str] | None:
        return [self.rows[i].group_id for i in indices] if self.packed else None


def build_scorer(job: dict, policy: PolicyModel, pixels: Patches, *, train_vision: bool) -> Scorer:
    """Return the scorer that processes logits as the job's conversations were sampled."""
    talk, features = job["conversation"], None if train_vision else {}
    return Scorer(policy.model, pixels, temperature=talk["temperature"], banned=talk["banned"], features=features)
