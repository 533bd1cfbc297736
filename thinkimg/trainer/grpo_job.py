"""GRPO's train job: from a policy and the advantages of its rollouts to the next policy."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.grpo.loss import Normaliser, grpo_loss, step_normaliser
from thinkimg.grpo.settings import LossConfig
from thinkimg.models.settings import ModelConfig
from thinkimg.store.kinds import Rollouts
from thinkimg.trainer import checkpoint, checksums, memory, packing_check, parity, parity_diagnosis
from thinkimg.trainer.checkpoint import Policy
from thinkimg.trainer.forward import shared_prompts
from thinkimg.trainer.forward.logprobs import Scorer, base_model, unwrap
from thinkimg.trainer.forward.packing import Conversation
from thinkimg.trainer.forward.shared_prompts import Unit
from thinkimg.trainer.optimise import (
    Clock,
    MicroBatches,
    Progress,
    Ranks,
    Stepper,
    checkpointing,
    peak_memory_mb,
    score_all,
    split,
)
from thinkimg.trainer.rows import Patches, Row, read_advantages, read_rows
from thinkimg.trainer.settings import TrainConfig

log = logging.getLogger(__name__)


def deal(rows: Sequence[Row], steps: int, epochs: int, seed: int) -> list[list[int]]:
    """Row indices of each optimizer step: per epoch the groups, shuffled by seed, in `steps` batches; none is empty."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.group_id, []).append(i)
    names = sorted(groups)
    batches = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, 0, epoch]).permutation(len(names))
        for part in np.array_split(order, min(steps, len(names))):
            batches.append(sorted(i for g in part for i in groups[names[g]]))
    return batches


def learning_rate(config: TrainConfig, updates: int) -> float:
    """Of the step after `updates` steps: linear warm-up, then constant."""
    return config.learning_rate * min(1.0, (updates + 1) / max(config.warmup_steps, 1))


@dataclass(frozen=True)
class Passes:
    """Forward passes over the rows of a job, which are named by their index."""

    policy: Policy
    ranks: Ranks
    scorer: Scorer
    pixels: Patches
    rows: Sequence[Row]
    budget: int
    """Tokens of a micro-batch."""
    packed: bool
    """Whether the rows of a group share their prompt."""

    def share(self, batch: Sequence[int]) -> list[int]:
        """This process's part of a batch."""
        conversations = self.conversations(batch)
        if not self.packed:
            lengths = {i: len(row.tokens) for i, row in zip(batch, conversations, strict=True)}
            return self.ranks.share(batch, lengths)
        groups = [self.rows[i].group_id for i in batch]
        dealt = shared_prompts.balance(conversations, groups, self.scorer.image_token, self.ranks.count)
        return [batch[k] for k in dealt[self.ranks.rank]]

    def score(
        self, indices: Sequence[int], *, entropy: bool = False
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Log-probabilities, and entropies if asked for, of the scored tokens of each row, without gradient."""
        rows = [self.rows[i] for i in indices]
        logps, entropies = score_all(
            self.policy,
            self.scorer,
            self.pixels,
            rows,
            self.budget,
            packed=self.packed,
            entropy=entropy,
            **self._together,
        )
        return dict(zip(indices, logps, strict=True)), dict(zip(indices, entropies, strict=True))

    def micro_batches(self, share: Sequence[int]) -> MicroBatches:
        rows, groups = self.conversations(share), self._groups(share)
        return MicroBatches(rows, self.budget, self.scorer, self.pixels, groups, **self._together)

    def split(self, share: Sequence[int]) -> list[tuple[list[Conversation], list[Unit] | None]]:
        """The micro-batches as conversations and how they are packed, for who wants to know and not to compute."""
        rows = self.conversations(share)
        batches = split(rows, self._groups(share), self.budget, self.scorer.image_token)
        return [([rows[k] for k in batch.rows], batch.units) for batch in batches]

    def conversations(self, indices: Sequence[int]) -> list[Conversation]:
        return [self.rows[i].conversation for i in indices]

    def _groups(self, indices: Sequence[int]) -> list[str] | None:
        return [self.rows[i].group_id for i in indices] if self.packed else None

    @property
    def _together(self) -> dict:
        return self.ranks.together_with(self.policy, self.rows[0].conversation)


@dataclass(frozen=True)
class Objective:
    """The loss, and the log-probabilities that it compares with, by row index."""

    loss: LossConfig
    max_tokens: int
    """Of a completion, for the losses that divide by it."""
    reference: dict[int, np.ndarray]
    old: dict[int, np.ndarray]
    """Of the policy before its first update. The first step, which is its own old policy, adds its rows."""
    entropies: dict[int, np.ndarray]
    """Of all rows, with top_entropy_quantile."""

    def accumulate(self, passes: Passes, batch: Sequence[int], share: Sequence[int]) -> dict[str, float]:
        """Add the gradients of this process's share of a step; returns the metrics of the whole step."""
        masks = [torch.ones(1, len(passes.rows[i].engine)) for i in batch]
        spread: dict[int, np.ndarray] = {}
        if self.loss.top_entropy_quantile < 1:
            for part in passes.ranks.gather({i: self.entropies[i] for i in share}):
                spread |= part
        entropies = [torch.from_numpy(spread[i])[None] for i in batch] if spread else ()
        normaliser = step_normaliser(self.loss, masks, max_completion_length=self.max_tokens, entropies=entropies)
        totals: dict[str, float] = {}
        for micro in passes.micro_batches(share):
            add(totals, self._backward(passes, [share[k] for k in micro.rows], micro.units, normaliser))
        merged: dict[str, float] = {}
        for part in passes.ranks.gather(totals):
            add(merged, part)
        return merged

    def _backward(
        self, passes: Passes, indices: Sequence[int], units: list[Unit] | None, normaliser: Normaliser
    ) -> dict[str, float]:
        """Of one micro-batch; returns its metrics."""
        rows, loss = [passes.rows[i] for i in indices], self.loss
        with passes.policy.autocast():
            flat, entropy = passes.scorer(
                passes.conversations(indices), units, entropy=True, entropy_grad=loss.entropy_coef != 0
            )
        mask = row_mask(rows, flat.device)

        def padded(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=values.dtype, device=flat.device).masked_scatter(mask, values)

        def stored(values: Sequence[np.ndarray]) -> Tensor:
            return padded(torch.from_numpy(np.concatenate(values)).to(flat.device))

        if indices[0] not in self.old:
            for i, part in zip(indices, flat.detach().split([len(row.engine) for row in rows]), strict=True):
                self.old[i] = part.cpu().numpy()
        correction = loss.vllm_importance_sampling_correction or loss.off_policy_mask_threshold is not None
        output = grpo_loss(
            loss,
            logps=padded(flat),
            old_logps=stored([self.old[i] for i in indices]),
            ref_logps=stored([self.reference[i] for i in indices]) if loss.beta else None,
            engine_logps=stored([row.engine for row in rows]) if correction else None,
            advantages=torch.tensor([row.advantage for row in rows], device=flat.device),
            mask=mask,
            entropies=padded(entropy),
            normaliser=normaliser,
        )
        output.loss.backward()
        return {"loss": float(output.loss.detach())} | {name: float(value) for name, value in output.metrics.items()}


def run(job: dict, policy: Policy, ranks: Ranks, progress: Progress) -> dict:
    """Train the policy in place, and return the result; rank 0 writes `output`."""
    clock, config = Clock(policy.device), TrainConfig.model_validate(job["train"])
    # The file lies in the scratch folder of the loop's own machine; all else in the store.
    read = ranks.together(lambda: None if ranks.rank else read_advantages(job["advantages"]))
    advantages = ranks.gather(read)[0]
    rows, pixels = ranks.together(lambda: _read(job, policy, advantages))
    with contextlib.closing(pixels):
        passes, packing = _passes(job, config, policy, ranks, rows, pixels)
        batches = deal(rows, config.steps, config.epochs, job["seed"])
        shares = [passes.share(batch) for batch in batches]
        packing |= ranks.together(lambda: _preflight(config, passes, shares))
        checks = _parity_gate(job, config, passes)
        reference = _reference(job, config, passes, shares)
        old, entropies = _old(config, passes, shares)
        objective = Objective(config.loss, job["conversation"]["max_tokens"], reference, old, entropies)
        prepared_s = clock.lap()
        steps = _steps(config, passes, objective, batches, shares, clock, progress)
    checkpoint.save(policy, job["output"], learning_rate=steps[-1]["lr"], seed=job["seed"], write=ranks.rank == 0)
    means = {
        name: float(np.mean([step[name] for step in steps if name in step])) for name in steps[0] if name != "step"
    }
    means |= checks | packing | {"peak_memory_mb": peak_memory_mb(policy.device), "prepare_seconds": prepared_s}
    return {"metrics": means | {"write_seconds": clock.lap()}, "steps": steps, "updates": policy.updates}


def _read(job: dict, policy: Policy, advantages: dict[str, float]) -> tuple[list[Row], Patches]:
    if not advantages:
        raise UserError("No row is left to train on: every group is silent or excluded.", hint="See train.min_std.")
    image_token, images = unwrap(policy.model).config.image_token_id, job["images"]
    rows = read_rows(Rollouts.open(Path(job["rollouts"])), image_token, advantages)
    return rows, Patches(images["tables"], min_pixels=images["min_pixels"], max_pixels=images["max_pixels"])


def scorer_of(job: dict, policy: Policy, pixels: Patches, *, train_vision: bool) -> Scorer:
    talk = job["conversation"]
    features = None if train_vision else {}
    return Scorer(policy.model, pixels, temperature=talk["temperature"], banned=talk["banned"], features=features)


def _passes(
    job: dict, config: TrainConfig, policy: Policy, ranks: Ranks, rows: Sequence[Row], pixels: Patches
) -> tuple[Passes, dict[str, float]]:
    """The passes, packed if that is wanted and right on every process's machine, and metrics of the packing."""
    scorer, reason = scorer_of(job, policy, pixels, train_vision=policy.config.train_vision), None
    if config.shared_prompts:
        found = ranks.together(lambda: packing_check.obstacle(policy, scorer, pixels, rows))
        reason = next((r for r in ranks.gather(found) if r), None)
        if reason and ranks.rank == 0:
            log.warning("prompts are not shared: %s", reason)
    packed = config.shared_prompts and reason is None
    metrics = packing_check.savings(rows, scorer.image_token) if packed else {}
    if metrics.get("packing/unshared_rows"):
        log.warning("%d rows begin otherwise than their group: computed alone", metrics["packing/unshared_rows"])
    passes = Passes(policy, ranks, scorer, pixels, rows, config.token_budget, packed)
    return passes, metrics | {"packing/fallback": float(reason is not None)}


def _preflight(config: TrainConfig, passes: Passes, shares: Sequence[Sequence[int]]) -> dict[str, float]:
    """Whether the largest micro-batch fits, if it is larger than what was tried before; returns metrics."""
    return memory.check_job(
        passes.policy, passes.scorer, [row.conversation for row in passes.rows],
        [batch for share in shares if share for batch in passes.split(share)], passes.ranks,
        token_budget=config.token_budget, checkpointing=config.gradient_checkpointing,
        entropy_grad=config.loss.entropy_coef != 0,
    )  # fmt: skip


def _parity_gate(job: dict, config: TrainConfig, passes: Passes) -> dict[str, float]:
    """Raises UserError where the trainer does not compute what the engine has; returns metrics."""
    gate, ranks, policy, scorer = config.parity, passes.ranks, passes.policy, passes.scorer
    chosen = parity.choose(passes.rows, gate.trajectories, job["seed"])
    rows = [passes.rows[i] for i in chosen]

    def measure() -> dict[int, np.ndarray]:
        parity.check_weights(passes.rows, job["policy"]["digest"])
        parity.check_tokens(passes.rows, scorer.image_token)
        parity.check_positions(rows, base_model(policy.model))
        return passes.score(passes.share(chosen))[0]

    found: dict[int, np.ndarray] = {}
    for part in ranks.gather(ranks.together(measure)):
        found |= part
    trainer = [found[i] for i in chosen]
    metrics = parity.compare(np.concatenate([row.engine for row in rows]), np.concatenate(trainer))

    def explain(worst: Sequence[int]) -> str:
        return parity_diagnosis.split(
            policy, passes.pixels, [rows[i] for i in worst], [trainer[i] for i in worst],
            temperature=scorer.temperature, banned=job["conversation"]["banned"],
        )  # fmt: skip

    parity.check_numbers(metrics, rows, trainer, limit=gate.max_kl, files=policy.files, explain=explain)
    return metrics


def _reference(
    job: dict, config: TrainConfig, passes: Passes, shares: Sequence[Sequence[int]]
) -> dict[int, np.ndarray]:
    """Log-probabilities of this process's rows under the reference policy, if the loss has a KL term."""
    if config.loss.beta == 0:
        return {}
    mine, policy, ranks = sorted({i for share in shares for i in share}), passes.policy, passes.ranks
    if policy.config.adaptation == "lora":
        with policy.model.disable_adapter():
            return passes.score(mine)[0]
    directory = job["reference"]
    if directory is None:
        raise UserError("train.loss.beta > 0 needs a reference policy.", hint="Set train.loss.beta=0.")
    model = ModelConfig.model_validate(job["model"])
    state = torch.get_rng_state()  # loading a policy sets it
    reference = ranks.together(lambda: checkpoint.load(directory, model, policy.device))
    torch.set_rng_state(state)
    if ranks.count > 1:
        checksums.verify(reference, checksums.expected(reference, ranks), ranks)
    scorer = scorer_of(job, reference, passes.pixels, train_vision=False)
    return replace(passes, policy=reference, scorer=scorer).score(mine)[0]


def _old(
    config: TrainConfig, passes: Passes, shares: Sequence[Sequence[int]]
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Log-probabilities before the first update, of the rows that are trained on after it (as TRL, else the ratio is 1),
    and entropies.

    With top_entropy_quantile every step's threshold needs the entropies of all its tokens first.
    """
    quantile = config.loss.top_entropy_quantile < 1
    first = () if quantile else shares[0]  # its own forward pass gives them
    later = sorted({i for share in (shares if quantile else shares[1:]) for i in share} - set(first))
    return passes.score(later, entropy=quantile) if later else ({}, {})


def _steps(
    config: TrainConfig, passes: Passes, objective: Objective, batches: Sequence[Sequence[int]],
    shares: Sequence[Sequence[int]], clock: Clock, progress: Progress,
) -> list[dict]:  # fmt: skip
    policy = passes.policy
    parameters = policy.train_only(vision=policy.config.train_vision)
    optimizer = policy.resume_optimizer(parameters, config.weight_decay)
    stepper = Stepper(policy, parameters, optimizer, passes.ranks, config.max_grad_norm)
    if config.gradient_checkpointing:
        checkpointing(policy, True)
    steps = []
    for number, (batch, share) in enumerate(zip(batches, shares, strict=True)):
        rate = learning_rate(config, policy.updates)
        totals = objective.accumulate(passes, batch, share)
        norm = stepper.step(rate)
        policy.updates += 1
        tokens = sum(len(row.tokens) for row in passes.conversations(batch))
        values = totals | {"grad_norm": norm, "lr": rate, "rows": len(batch), "tokens": tokens, "seconds": clock.lap()}
        steps.append({"step": number + 1, **values})
        progress(steps[-1] | {"steps": len(batches)})
    stepper.release()
    if config.gradient_checkpointing:
        checkpointing(policy, False)
    return steps


def add(totals: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value


def row_mask(rows: Sequence[Row], device: torch.device) -> Tensor:
    """(B, T) bool, True for the scored tokens of each row, which stand one after the other."""
    counts = torch.tensor([len(row.engine) for row in rows], device=device)
    return torch.arange(int(counts.max()), device=device) < counts[:, None]
