"""GRPO's train job: from a policy and the advantages of its rollouts to the next policy."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.grpo.loss import grpo_loss, step_normaliser
from thinkimg.models.settings import ModelConfig
from thinkimg.store.kinds import Rollouts
from thinkimg.trainer import checkpoint, checksums, memory, packing_check, parity, parity_diagnosis
from thinkimg.trainer.checkpoint import Policy
from thinkimg.trainer.forward import shared_prompts
from thinkimg.trainer.forward.logprobs import Scorer, base_model, unwrap
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


class TrainJob:
    """One job: `run` trains the policy in place and returns the result; rank 0 writes `output`."""

    def __init__(self, job: dict, policy: Policy, ranks: Ranks):
        self.job, self.policy, self.ranks = job, policy, ranks
        self.config = TrainConfig.model_validate(job["train"])
        self.loss = self.config.loss
        self.budget = self.config.token_budget
        self.train_vision = policy.config.train_vision

    def run(self, progress: Progress) -> dict:
        clock = Clock(self.policy.device)
        # The file lies in the scratch folder of the loop's own machine; all else in the store.
        read = self.ranks.together(lambda: None if self.ranks.rank else read_advantages(self.job["advantages"]))
        advantages = self.ranks.gather(read)[0]
        self.ranks.together(lambda: self._read(advantages))
        try:
            packing = self._packing()
            packing |= self.ranks.together(self._preflight)
            checks = self._parity_gate()
            self._reference()
            self._old()
            prepared_s = clock.lap()
            steps = self._steps(clock, progress)
        finally:
            self.pixels.close()
        checkpoint.save(
            self.policy, self.job["output"], learning_rate=steps[-1]["lr"], seed=self.job["seed"],
            write=self.ranks.rank == 0,
        )  # fmt: skip
        means = {
            name: float(np.mean([step[name] for step in steps if name in step])) for name in steps[0] if name != "step"
        }
        means |= (
            checks | packing | {"peak_memory_mb": peak_memory_mb(self.policy.device), "prepare_seconds": prepared_s}
        )
        return {"metrics": means | {"write_seconds": clock.lap()}, "steps": steps, "updates": self.policy.updates}

    def _read(self, advantages: dict[str, float]) -> None:
        job = self.job
        if not advantages:
            raise UserError("No row is left to train on: every group is silent or excluded.", hint="See train.min_std.")
        image_token = unwrap(self.policy.model).config.image_token_id
        self.rows = read_rows(Rollouts.open(Path(job["rollouts"])), image_token, advantages)
        self.batches = deal(self.rows, self.config.steps, self.config.epochs, job["seed"])
        images = job["images"]
        self.pixels = Patches(images["tables"], min_pixels=images["min_pixels"], max_pixels=images["max_pixels"])
        self.scorer = self._scorer(self.policy)

    def _packing(self) -> dict[str, float]:
        """Decide whether rows are packed, and which are this process's; returns metrics."""
        reason = None
        if self.config.shared_prompts:
            found = self.ranks.together(
                lambda: packing_check.obstacle(self.policy, self.scorer, self.pixels, self.rows)
            )
            reason = next((r for r in self.ranks.gather(found) if r), None)
            if reason and self.ranks.rank == 0:
                log.warning("prompts are not shared: %s", reason)
        self.packed = self.config.shared_prompts and reason is None
        self.shares = [self._share(batch) for batch in self.batches]
        metrics = packing_check.savings(self.rows, self.scorer.image_token) if self.packed else {}
        if metrics.get("packing/unshared_rows"):
            log.warning("%d rows begin otherwise than their group: computed alone", metrics["packing/unshared_rows"])
        return metrics | {"packing/fallback": float(reason is not None)}

    def _preflight(self) -> dict[str, float]:
        """Whether the largest micro-batch fits, if it is larger than what was tried before; returns metrics."""
        batches = []
        for share in filter(None, self.shares):
            rows = [self.rows[i].conversation for i in share]
            groups = [self.rows[i].group_id for i in share] if self.packed else None
            for batch in split(rows, groups, self.budget, self.scorer.image_token):
                batches.append(([rows[k] for k in batch.rows], batch.units))
        return memory.check_job(
            self.policy, self.scorer, [row.conversation for row in self.rows], batches, self.ranks,
            token_budget=self.budget, checkpointing=self.config.gradient_checkpointing,
            entropy_grad=self.loss.entropy_coef != 0,
        )  # fmt: skip

    def _share(self, batch: Sequence[int]) -> list[int]:
        """This process's part of a batch of row indices."""
        conversations = [self.rows[i].conversation for i in batch]
        if not self.packed:
            lengths = {i: len(row.tokens) for i, row in zip(batch, conversations, strict=True)}
            return self.ranks.share(batch, lengths)
        groups = [self.rows[i].group_id for i in batch]
        dealt = shared_prompts.balance(conversations, groups, self.scorer.image_token, self.ranks.count)
        return [batch[k] for k in dealt[self.ranks.rank]]

    def _scorer(self, policy: Policy, *, frozen: bool = False) -> Scorer:
        talk = self.job["conversation"]
        features = None if self.train_vision and not frozen else {}
        return Scorer(
            policy.model, self.pixels, temperature=talk["temperature"], banned=talk["banned"], features=features
        )

    def _score(self, indices: Sequence[int], *, entropy: bool = False) -> tuple[dict, dict]:
        """Row index -> log-probabilities, and entropies if asked for."""
        rows = [self.rows[i] for i in indices]
        logps, entropies = self._score_rows(self.policy, self.scorer, rows, entropy=entropy)
        return dict(zip(indices, logps, strict=True)), dict(zip(indices, entropies, strict=True))

    def _score_rows(self, policy: Policy, scorer: Scorer, rows: Sequence[Row], *, entropy: bool = False) -> tuple:
        return score_all(
            policy,
            scorer,
            self.pixels,
            rows,
            self.budget,
            packed=self.packed,
            entropy=entropy,
            **self._together(policy),
        )

    def _together(self, policy: Policy) -> dict:
        return self.ranks.together_with(policy, self.rows[0].conversation)

    def _parity_gate(self) -> dict[str, float]:
        gate = self.config.parity
        chosen = parity.choose(self.rows, gate.trajectories, self.job["seed"])

        def measure() -> dict[int, np.ndarray]:
            parity.check_weights(self.rows, self.job["policy"]["digest"])
            parity.check_tokens(self.rows, self.scorer.image_token)
            parity.check_positions([self.rows[i] for i in chosen], base_model(self.policy.model))
            return self._score(self._share(chosen))[0]

        found: dict[int, np.ndarray] = {}
        for part in self.ranks.gather(self.ranks.together(measure)):
            found |= part
        rows, trainer = [self.rows[i] for i in chosen], [found[i] for i in chosen]
        metrics = parity.compare(np.concatenate([row.engine for row in rows]), np.concatenate(trainer))

        def explain(worst: Sequence[int]) -> str:
            return parity_diagnosis.split(
                self.policy, self.pixels, [rows[i] for i in worst], [trainer[i] for i in worst],
                temperature=self.scorer.temperature, banned=self.job["conversation"]["banned"],
            )  # fmt: skip

        parity.check_numbers(metrics, rows, trainer, limit=gate.max_kl, files=self.policy.files, explain=explain)
        return metrics

    def _reference(self) -> None:
        """Log-probabilities under the reference policy, if the loss has a KL term."""
        self.reference: dict[int, np.ndarray] = {}
        if self.loss.beta == 0:
            return
        mine = sorted({i for share in self.shares for i in share})
        rows = [self.rows[i] for i in mine]
        if self.policy.config.adaptation == "lora":
            with self.policy.model.disable_adapter():
                logps, _ = self._score_rows(self.policy, self.scorer, rows)
        else:
            directory = self.job["reference"]
            if directory is None:
                raise UserError("train.loss.beta > 0 needs a reference policy.", hint="Set train.loss.beta=0.")
            config = ModelConfig.model_validate(self.job["model"])
            state = torch.get_rng_state()  # loading a policy sets it
            reference = self.ranks.together(lambda: checkpoint.load(directory, config, self.policy.device))
            torch.set_rng_state(state)
            if self.ranks.count > 1:
                checksums.verify(reference, checksums.expected(reference, self.ranks), self.ranks)
            scorer = self._scorer(reference, frozen=True)
            logps, _ = self._score_rows(reference, scorer, rows)
        self.reference = dict(zip(mine, logps, strict=True))

    def _old(self) -> None:
        """Log-probabilities before the first update, of the rows that are trained on after it (as TRL, else the ratio is 1).

        With top_entropy_quantile every step's threshold needs the entropies of all its tokens first.
        """
        quantile = self.loss.top_entropy_quantile < 1
        shares = self.shares if quantile else self.shares[1:]
        first = () if quantile else self.shares[0]  # its own forward pass gives them
        later = sorted({i for share in shares for i in share} - set(first))
        self.old, self.entropies = self._score(later, entropy=quantile) if later else ({}, {})

    def _steps(self, clock: Clock, progress: Progress) -> list[dict]:
        parameters = self.policy.train_only(vision=self.train_vision)
        optimizer = self.policy.resume_optimizer(parameters, self.config.weight_decay)
        stepper = Stepper(self.policy, parameters, optimizer, self.ranks, self.config.max_grad_norm)
        if self.config.gradient_checkpointing:
            checkpointing(self.policy, True)
        steps = []
        for number, (batch, share) in enumerate(zip(self.batches, self.shares, strict=True)):
            rate = learning_rate(self.config, self.policy.updates)
            totals = self._accumulate(batch, share)
            norm = stepper.step(rate)
            self.policy.updates += 1
            tokens = sum(len(self.rows[i].conversation.tokens) for i in batch)
            values = totals | {
                "grad_norm": norm,
                "lr": rate,
                "rows": len(batch),
                "tokens": tokens,
                "seconds": clock.lap(),
            }
            steps.append({"step": number + 1, **values})
            progress(steps[-1] | {"steps": len(self.batches)})
        stepper.release()
        if self.config.gradient_checkpointing:
            checkpointing(self.policy, False)
        return steps

    def _accumulate(self, batch: Sequence[int], share: Sequence[int]) -> dict[str, float]:
        """Gradients of this process's share of the step; returns the metrics of the whole step."""
        masks = [torch.ones(1, len(self.rows[i].engine)) for i in batch]
        spread = {}
        if self.loss.top_entropy_quantile < 1:
            for part in self.ranks.gather({i: self.entropies[i] for i in share}):
                spread |= part
        normaliser = step_normaliser(
            self.loss,
            masks,
            max_completion_length=self.job["conversation"]["max_tokens"],
            entropies=[torch.from_numpy(spread[i])[None] for i in batch] if spread else (),
        )
        totals: dict[str, float] = {}
        conversations = [self.rows[i].conversation for i in share]
        groups = [self.rows[i].group_id for i in share] if self.packed else None
        together = self._together(self.policy)
        for micro in MicroBatches(conversations, self.budget, self.scorer, self.pixels, groups, **together):
            for name, value in self._micro([share[k] for k in micro.rows], micro.units, normaliser).items():
                totals[name] = totals.get(name, 0.0) + value
        merged: dict[str, float] = {}
        for part in self.ranks.gather(totals):
            for name, value in part.items():
                merged[name] = merged.get(name, 0.0) + value
        return merged

    def _micro(self, indices: Sequence[int], units, normaliser) -> dict[str, float]:
        rows = [self.rows[i] for i in indices]
        with self.policy.autocast():
            flat, entropy = self.scorer(
                [row.conversation for row in rows], units, entropy=True, entropy_grad=self.loss.entropy_coef != 0
            )
        mask = row_mask(rows, flat.device)

        def padded(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=values.dtype, device=flat.device).masked_scatter(mask, values)

        def known(values: Sequence[np.ndarray]) -> Tensor:
            return padded(torch.from_numpy(np.concatenate(values)).to(flat.device))

        if indices[0] not in self.old:  # the first step: it is its own old policy, and later epochs want to know
            for i, part in zip(indices, flat.detach().split([len(row.engine) for row in rows]), strict=True):
                self.old[i] = part.cpu().numpy()
        correction = self.loss.vllm_importance_sampling_correction or self.loss.off_policy_mask_threshold is not None
        output = grpo_loss(
            self.loss,
            logps=padded(flat),
            old_logps=known([self.old[i] for i in indices]),
            ref_logps=known([self.reference[i] for i in indices]) if self.loss.beta else None,
            engine_logps=known([row.engine for row in rows]) if correction else None,
            advantages=torch.tensor([row.advantage for row in rows], device=flat.device),
            mask=mask,
            entropies=padded(entropy),
            normaliser=normaliser,
        )
        output.loss.backward()
        return {"loss": float(output.loss.detach())} | {name: float(value) for name, value in output.metrics.items()}


def row_mask(rows: Sequence[Row], device: torch.device) -> Tensor:
    """(B, T) bool, True for the scored tokens of each row, which stand one after the other."""
    counts = torch.tensor([len(row.engine) for row in rows], device=device)
    return torch.arange(int(counts.max()), device=device) < counts[:, None]
