"""Warm start: supervised learning of demonstrations, with the same forward pass as GRPO; makes the first policy."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.store.kinds import Demonstrations
from thinkimg.trainer import checkpoint, memory
from thinkimg.trainer.forward.modules import unwrap
from thinkimg.trainer.forward.packing import ImageToken
from thinkimg.trainer.gradient_pool import GradientPool
from thinkimg.trainer.passes import Passes, build_scorer
from thinkimg.trainer.policy import PolicyModel, build_optimizer, train_only
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import Row, read_patches, read_rows
from thinkimg.trainer.settings import WarmstartConfig
from thinkimg.trainer.stepper import Clock, Progress, Stepper, checkpoint_activations, peak_memory_mb

MAX_GRAD_NORM = 1.0
# Comparisons of images in a step, and their weight in its loss, as a share of the conversations'. At 0.25 a tiny policy
# compared no better, and could no longer read one family of puzzles.
COMPARISONS = 0.1
FLOOR = 0.1  # share of the learning rate at the end


def compute_learning_rate(config: WarmstartConfig, step: int) -> float:
    """Return the rate of step 0, 1, …: linear warm-up, then linear decay to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - 1 - config.warmup_steps, 1)
    return config.learning_rate * (1 - (1 - FLOOR) * progress)


def draw(count: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield `steps` batches of row indices, each row once before any comes again."""
    rng = np.random.default_rng([seed, 2])
    pool: list[int] = []
    for _ in range(steps):
        while len(pool) < batch:
            pool += rng.permutation(count).tolist()
        yield pool[:batch]
        pool = pool[batch:]


def run(job: dict, policy: PolicyModel, ranks: Ranks, progress: Progress) -> dict:
    """Train all weights or the adapter in place, and return the result; rank 0 writes `output`.

    The loss is the mean negative log-likelihood per sampled token. COMPARISONS times the mean over the comparisons'
    tokens is added, if the demonstrations hold any. With 0 steps the base becomes a policy as it is. The policy's
    optimizer starts afresh afterwards.
    """
    config = WarmstartConfig.model_validate(job["warmstart"])
    clock, steps = Clock(policy.device), []
    checks: dict[str, float] = {}
    if config.steps:
        rows, comparisons = ranks.together(lambda: _read(job, policy))
        with contextlib.closing(read_patches(job, policy)) as pixels:
            scorer = build_scorer(job, policy, pixels, train_vision=policy.config.adaptation == "full")
            passes = Passes(policy, ranks, scorer, pixels, rows + comparisons, job["token_budget"], packed=False)
            extra = round(COMPARISONS * config.batch) if comparisons else 0
            layers, checks = _check_memory(job, passes, config.batch + extra)
            for step in _steps(job, config, passes, len(rows), extra, layers):
                steps.append(step | {"seconds": clock.lap()})
                progress(steps[-1] | {"steps": config.steps})
    rate = steps[-1]["lr"] if steps else 0.0
    checkpoint.save(policy, job["output"], learning_rate=rate, seed=job["seed"], write=ranks.rank == 0)
    metrics = {"peak_memory_mb": peak_memory_mb(policy.device)}
    if steps:
        metrics |= {"loss": steps[-1]["loss"], "seconds": sum(step["seconds"] for step in steps)}
    return {"metrics": metrics | checks, "steps": steps, "updates": policy.updates}


def _read(job: dict, policy: PolicyModel) -> tuple[list[Row], list[Row]]:
    """Return (conversations, comparisons)."""
    artifact, image_token = Demonstrations.open(Path(job["rollouts"])), ImageToken.of(unwrap(policy.model).config)
    rows = read_rows(artifact, image_token)
    if not rows:
        raise UserError("There are no demonstrations to start from.")
    has_comparisons = "comparisons.parquet" in artifact.files
    return rows, read_rows(artifact, image_token, table="comparisons") if has_comparisons else []


def _check_memory(job: dict, passes: Passes, batch: int) -> tuple[int, dict[str, float]]:
    """Check the longest rows of a batch; return how many layers recompute, and metrics.

    Raises UserError if they need more memory than is free.
    """
    rows = sorted(range(len(passes.rows)), key=lambda i: len(passes.rows[i].conversation.tokens))
    longest = rows[-max(batch // passes.ranks.count, 1) :]
    options = memory.StepOptions(job.get("gradient_checkpointing", False))
    layers, metrics = memory.check_job(passes, [longest], options)
    passes.policy.checked_tokens = 0  # the steps that follow a warm start train other parameters
    return layers, metrics


def _steps(job: dict, config: WarmstartConfig, passes: Passes, count: int, extra: int, layers: int) -> Iterator[dict]:
    """Train step by step, and yield the metrics of each.

    count: of the conversations, which precede the comparisons. extra: comparisons of a step. layers: of those that
    recompute their activations.
    """
    policy, ranks, rows = passes.policy, passes.ranks, passes.rows
    parameters = train_only(policy.model, policy.config, vision=True)
    stepper = Stepper(policy, parameters, build_optimizer(parameters.values()), ranks, MAX_GRAD_NORM)
    batches = draw(count, config.batch, config.steps, job["seed"])
    comparisons = draw(len(rows) - count, extra, config.steps, job["seed"]) if extra else repeat([])
    pool = GradientPool(policy, parameters.values(), shared_features=passes.scorer.features is not None)
    with checkpoint_activations(policy.model, layers), pool:
        passes = replace(passes, token_budget=pool.limit(passes.token_budget))
        for number, (batch, compared) in enumerate(zip(batches, comparisons, strict=False)):
            tokens = sum(len(rows[i].engine) for i in batch)
            weights = dict.fromkeys(batch, 1 / tokens)
            weights |= {count + i: COMPARISONS / len(compared) for i in compared}
            own = passes.share([*batch, *(count + i for i in compared)])
            micro_batches = ([own[k] for k in micro.rows] for micro in passes.micro_batches(own))
            own_loss = sum(pool.accumulate(partial(_compute_loss, passes, weights), micro_batches))
            rate = compute_learning_rate(config, number)
            norm = stepper.step(rate)
            yield {"step": number + 1, "loss": sum(ranks.gather(own_loss)), "grad_norm": norm, "lr": rate}
    stepper.release()


def _compute_loss(passes: Passes, weights: Mapping[int, float], indices: Sequence[int]) -> Tensor:
    """Return the loss of a micro-batch. weights: of each token of a row."""
    with passes.policy.autocast():
        logps, _ = passes.scorer(passes.conversations(indices))
    per_token = np.concatenate([np.full(len(passes.rows[i].engine), weights[i]) for i in indices])
    return -(logps * torch.from_numpy(per_token).to(logps)).sum()
