"""GRPO's train job: from a policy and the advantages of its rollouts to the next policy.

run ─► read rows ─► Passes (packed or padded) ─► deal rows to steps and processes
    ─► memory check ─► parity gate ─► reference and old log-probabilities ─► steps of Objective ─► save
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.grpo.loss import Logps, Normaliser, compute_grpo_loss, compute_normaliser, estimate_effective_sample
from thinkimg.grpo.settings import LossConfig
from thinkimg.models.settings import ModelConfig
from thinkimg.store.kinds import Rollouts
from thinkimg.trainer import checkpoint, compile_check, memory, packing_check, parity, parity_diagnosis, weight_files
from thinkimg.trainer.forward.modules import get_base_model, unwrap
from thinkimg.trainer.forward.packing import ImageToken
from thinkimg.trainer.forward.shared_prompts import Unit
from thinkimg.trainer.loading import load_together
from thinkimg.trainer.passes import Passes, build_scorer
from thinkimg.trainer.policy import PolicyModel, train_only
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import Patches, Row, read_advantages, read_patches, read_rows
from thinkimg.trainer.settings import ParityConfig, TrainConfig
from thinkimg.trainer.stepper import Clock, Progress, Stepper, checkpoint_activations, peak_memory_mb

log = logging.getLogger(__name__)


def deal(rows: Sequence[Row], steps: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the row indices of each optimizer step: per epoch the groups, shuffled by seed, in `steps` batches.

    There are fewer batches than `steps` if there are fewer groups: none is empty.
    """
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


def compute_learning_rate(config: TrainConfig, updates: int) -> float:
    """Return the rate of the step after `updates` steps: linear warm-up, then constant."""
    return config.learning_rate * min(1.0, (updates + 1) / max(config.warmup_steps, 1))


@dataclass(frozen=True)
class Objective:
    """The loss, and the log-probabilities that it compares with, by row index."""

    loss: LossConfig
    max_tokens: int
    """Upper limit of a completion, for the losses that divide by it."""
    reference: dict[int, np.ndarray]
    old: dict[int, np.ndarray]
    """Log-probabilities before the first update. The first step, which is its own old policy, adds its rows."""
    entropies: dict[int, np.ndarray]
    """Entropies of all rows, with top_entropy_quantile."""

    def accumulate(self, passes: Passes, batch: Sequence[int], share: Sequence[int]) -> dict[str, float]:
        """Add the gradients of this process's share of a step; return the metrics of the step over all processes."""
        masks = [torch.ones(1, len(passes.rows[i].engine)) for i in batch]
        entropies: Sequence[Tensor] = ()
        if self.loss.top_entropy_quantile < 1:
            by_row = passes.ranks.merge({i: self.entropies[i] for i in share})
            entropies = [torch.from_numpy(by_row[i])[None] for i in batch]
        normaliser = compute_normaliser(self.loss, masks, max_completion_length=self.max_tokens, entropies=entropies)
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
        """Add the gradients of one micro-batch; return its metrics."""
        rows, loss = [passes.rows[i] for i in indices], self.loss
        with passes.policy.autocast():
            flat, entropy = passes.scorer(
                passes.conversations(indices), units, entropy=True, entropy_grad=loss.entropy_coef != 0
            )
        mask = build_row_mask(rows, flat.device)

        def pad(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=values.dtype, device=flat.device).masked_scatter(mask, values)

        def pad_arrays(values: Sequence[np.ndarray]) -> Tensor:
            return pad(torch.from_numpy(np.concatenate(values)).to(flat.device))

        if indices[0] not in self.old:
            for i, part in zip(indices, flat.detach().split([len(row.engine) for row in rows]), strict=True):
                self.old[i] = part.cpu().numpy()
        correction = loss.vllm_importance_sampling_correction or loss.off_policy_mask_threshold is not None
        output = compute_grpo_loss(
            loss,
            Logps(
                policy=pad(flat),
                old=pad_arrays([self.old[i] for i in indices]),
                reference=pad_arrays([self.reference[i] for i in indices]) if loss.beta else None,
                engine=pad_arrays([row.engine for row in rows]) if correction else None,
            ),
            advantages=torch.tensor([row.advantage for row in rows], device=flat.device),
            mask=mask,
            entropies=pad(entropy),
            normaliser=normaliser,
        )
        output.loss.backward()
        return {"loss": float(output.loss.detach())} | {name: float(value) for name, value in output.metrics.items()}


def run(job: dict, policy: PolicyModel, ranks: Ranks, progress: Progress) -> dict:
    """Train the policy in place, and return the result; rank 0 writes `output`."""
    clock, config = Clock(policy.device), TrainConfig.model_validate(job["train"])
    # The file lies in the scratch folder of the loop's own machine; all else in the store.
    advantages = ranks.gather(ranks.together(lambda: None if ranks.rank else read_advantages(job["advantages"])))[0]
    rows, pixels = ranks.together(lambda: _read(job, policy, advantages))
    with contextlib.closing(pixels), contextlib.ExitStack() as stack:
        passes, packing = _passes(job, config, policy, ranks, rows, pixels)
        packing |= stack.enter_context(
            compile_check.compile_layers(passes, checkpointing=bool(config.gradient_checkpointing))
        )
        batches = deal(rows, config.steps, config.epochs, job["seed"])
        shares = [passes.share(batch) for batch in batches]
        layers, memory_metrics = _check_memory(config, passes, shares)
        checks = _check_parity(job, config, passes)
        reference = _reference(job, config, passes, shares)
        old, entropies = _old(config, passes, shares)
        objective = Objective(config.loss, job["conversation"]["max_tokens"], reference, old, entropies)
        prepared_s, steps = clock.lap(), []
        for step in _steps(config, passes, objective, batches, shares, layers):
            steps.append(step | {"seconds": clock.lap()})
            progress(steps[-1] | {"steps": len(batches)})
    checkpoint.save(policy, job["output"], learning_rate=steps[-1]["lr"], seed=job["seed"], write=ranks.rank == 0)
    names = dict.fromkeys(name for step in steps for name in step if name != "step")
    means = {name: float(np.mean([step[name] for step in steps if name in step])) for name in names}
    means |= checks | packing | memory_metrics
    means |= {"peak_memory_mb": peak_memory_mb(policy.device), "prepare_seconds": prepared_s}
    return {"metrics": means | {"write_seconds": clock.lap()}, "steps": steps, "updates": policy.updates}


def _read(job: dict, policy: PolicyModel, advantages: dict[str, float]) -> tuple[list[Row], Patches]:
    if not advantages:
        raise UserError("No row is left to train on: every group is silent or excluded.", hint="See train.min_std.")
    rows = read_rows(Rollouts.open(Path(job["rollouts"])), ImageToken.of(unwrap(policy.model).config), advantages)
    return rows, read_patches(job, policy)


def _passes(
    job: dict, config: TrainConfig, policy: PolicyModel, ranks: Ranks, rows: Sequence[Row], pixels: Patches
) -> tuple[Passes, dict[str, float]]:
    """Return the passes, packed if config and every process's machine allow it, and metrics of the packing."""
    scorer, reason = build_scorer(job, policy, pixels, train_vision=policy.config.train_vision), None
    if config.shared_prompts:
        trial = packing_check.Trial(scorer, pixels, config.token_budget, bool(config.gradient_checkpointing))
        reason = packing_check.find_obstacle(policy, ranks, rows, trial)
        if reason and ranks.rank == 0:
            log.warning("Prompts are not shared: %s.", reason)
    packed = config.shared_prompts and reason is None
    metrics = packing_check.measure_savings(rows, scorer.image_token) if packed else {}
    if metrics.get("packing/unshared_rows"):
        log.warning("%d rows begin otherwise than their group: computed alone.", metrics["packing/unshared_rows"])
    passes = Passes(policy, ranks, scorer, pixels, rows, config.token_budget, packed)
    return passes, metrics | {"packing/fallback": float(reason is not None)}


def _check_memory(config: TrainConfig, passes: Passes, shares: Sequence[Sequence[int]]) -> tuple[int, dict[str, float]]:
    """Check the largest micro-batch; return how many layers recompute, and metrics.

    Raises UserError if it needs more memory than is free.
    """
    options = memory.StepOptions(
        config.gradient_checkpointing,
        images_again=config.scores_again,
        entropy_grad=config.loss.entropy_coef != 0,
    )
    return memory.check_job(passes, shares, options)


def _check_parity(job: dict, config: TrainConfig, passes: Passes) -> dict[str, float]:
    """Return metrics of the parity gate. Raises UserError if the trainer computes other numbers than the engine.

    The numbers are those of the policy that played, whose weights are held meanwhile if another one is trained.
    """
    policy, player = passes.policy, job.get("player") or job["policy"]
    chosen = parity.choose(passes.rows, config.parity.trajectories, job["seed"])

    def check() -> None:
        parity.check_weights(passes.rows, player["digest"])
        parity.check_tokens(passes.rows, passes.scorer.image_token)
        parity.check_positions([passes.rows[i] for i in chosen], get_base_model(policy.model))

    passes.ranks.together(check)
    other = player["digest"] != job["policy"]["digest"]
    with weight_files.hold(policy, Path(player["directory"])) if other else contextlib.nullcontext():
        return _compare_numbers(job, config.parity, passes, chosen)


def _compare_numbers(job: dict, gate: ParityConfig, passes: Passes, chosen: Sequence[int]) -> dict[str, float]:
    """Return metrics of the parity of some rows. Raises UserError beyond the gate's limits."""
    policy, scorer, rows = passes.policy, passes.scorer, [passes.rows[i] for i in chosen]
    logps = passes.score_together(chosen)
    trainer = [logps[i] for i in chosen]
    engine = np.concatenate([row.engine for row in rows])
    metrics, exact = parity.compare(engine, np.concatenate(trainer)), True
    if policy.config.adaptation == "lora":
        slope, exact = _measure_slope(passes, chosen, trainer, gate.min_slope)
        metrics |= slope

    def explain(worst: Sequence[int]) -> str:
        rows_of_worst, logps_of_worst = [rows[i] for i in worst], [trainer[i] for i in worst]
        banned = job["conversation"]["banned"]
        return parity_diagnosis.explain(policy, scorer, banned, rows_of_worst, logps_of_worst)

    parity.check_numbers(metrics, rows, trainer, limit=gate.max_kl, files=policy.files, explain=explain)
    parity.check_slope(metrics, gate.min_slope, exact=exact)
    return metrics


def _measure_slope(
    passes: Passes, chosen: Sequence[int], trainer: Sequence[np.ndarray], limit: float
) -> tuple[dict[str, float], bool]:
    """Return parity.measure_slope of some rows, and whether the trainer's numbers in it are of float32.

    trainer: as trained. In bfloat16 its noise hides the effect of a young adapter: where the slope is not above the
    limit for sure, the passes are made in float32, if the memory has room for a layer in it.
    """
    policy, engine = passes.policy, [passes.rows[i].engine for i in chosen]

    def score(*, adapter: bool, autocast: bool = True) -> list[np.ndarray]:
        with contextlib.nullcontext() if adapter else policy.model.disable_adapter():
            scores = passes.score_together(chosen, autocast=autocast)
        return [scores[i] for i in chosen]

    slope, exact = parity.measure_slope(engine, trainer, score(adapter=False)), policy.config.precision == "float32"
    if exact or slope.get("parity/slope_low", limit) > limit:
        return slope, exact
    if not all(passes.ranks.gather(parity_diagnosis.has_room_for_float32(policy))):
        return slope, False
    with parity_diagnosis.use_float32(policy):
        both = [score(adapter=adapter, autocast=False) for adapter in (True, False)]
    return parity.measure_slope(engine, *both), True


def _reference(
    job: dict, config: TrainConfig, passes: Passes, shares: Sequence[Sequence[int]]
) -> dict[int, np.ndarray]:
    """Return the log-probabilities of this process's rows under the reference policy, if the loss has a KL term."""
    if config.loss.beta == 0:
        return {}
    own, policy, ranks = sorted({i for share in shares for i in share}), passes.policy, passes.ranks
    if policy.config.adaptation == "lora":
        with policy.model.disable_adapter():
            return passes.score(own)[0]
    directory = job["reference"]
    if directory is None:
        raise UserError("train.loss.beta > 0 needs a reference policy.", hint="Set train.loss.beta=0.")
    model = ModelConfig.model_validate(job["model"])
    state = torch.get_rng_state()  # loading a policy sets it
    reference = load_together(
        lambda device: checkpoint.load(directory, model, device), ranks, policy.device, sharded=policy.sharded
    )
    torch.set_rng_state(state)
    scorer = build_scorer(job, reference, passes.pixels, train_vision=False)
    return replace(passes, policy=reference, scorer=scorer).score(own)[0]


def _old(
    config: TrainConfig, passes: Passes, shares: Sequence[Sequence[int]]
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Return log-probabilities and entropies before the first update, of the rows that are trained on after it.

    TRL does the same; otherwise their ratio would be 1. With top_entropy_quantile every row is scored: a step's
    threshold needs the entropies of all its tokens first.
    """
    quantile = config.loss.top_entropy_quantile < 1
    first = () if quantile else shares[0]  # its own forward pass gives them
    later = sorted({i for share in (shares if quantile else shares[1:]) for i in share} - set(first))
    if not later and not passes.policy.sharded:  # sharded, a process without rows makes the passes of the others
        return {}, {}
    return passes.score(later, entropy=quantile) if quantile or len(shares) > 1 else ({}, {})


def _steps(
    config: TrainConfig,
    passes: Passes,
    objective: Objective,
    batches: Sequence[Sequence[int]],
    shares: Sequence[Sequence[int]],
    layers: int,
) -> Iterator[dict]:
    """Train step by step, and yield the metrics of each. layers: of those that recompute their activations."""
    policy = passes.policy
    parameters = train_only(policy.model, policy.config, vision=policy.config.train_vision)
    optimizer = policy.resume_optimizer(parameters, config.weight_decay)
    stepper = Stepper(policy, parameters, optimizer, passes.ranks, config.max_grad_norm)
    with checkpoint_activations(policy.model, layers):
        for number, (batch, share) in enumerate(zip(batches, shares, strict=True)):
            rate = compute_learning_rate(config, policy.updates)
            totals = objective.accumulate(passes, batch, share)
            if (effective := estimate_effective_sample(totals)) is not None:
                totals["sampling/effective_sample"] = effective
            norm = stepper.step(rate)
            policy.updates += 1
            tokens = sum(len(row.tokens) for row in passes.conversations(batch))
            yield {"step": number + 1} | totals | {"grad_norm": norm, "lr": rate, "rows": len(batch), "tokens": tokens}
    stepper.release()


def add(totals: dict[str, float], values: Mapping[str, float]) -> None:
    """Add values to totals of the same name."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value


def build_row_mask(rows: Sequence[Row], device: torch.device) -> Tensor:
    """Return (B, T) bool, True for the scored tokens of each row, which stand one after the other."""
    counts = torch.tensor([len(row.engine) for row in rows], device=device)
    return torch.arange(int(counts.max()), device=device) < counts[:, None]
