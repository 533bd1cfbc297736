"""The warm start: supervised learning of demonstrations, with the same reading code as GRPO; makes the first policy."""

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from thinkimg.errors import UserError
from thinkimg.store.kinds import Demonstrations
from thinkimg.trainer import checkpoint, memory
from thinkimg.trainer.checkpoint import Policy
from thinkimg.trainer.forward.logprobs import Scorer, unwrap
from thinkimg.trainer.optimise import (
    Clock,
    MicroBatches,
    Progress,
    Ranks,
    Stepper,
    checkpointing,
    peak_memory_mb,
    split,
)
from thinkimg.trainer.rows import Patches, Row, read_rows
from thinkimg.trainer.settings import WarmstartConfig

MAX_GRAD_NORM = 1.0
# Of the rows of a step, as many as this share of the conversations are comparisons of images; each is one token, and
# together they weigh as much as this share of the conversations' loss. At 0.25 a tiny policy compared no better, and could
# read one family of puzzles no more.
COMPARED = 0.1
FLOOR = 0.1  # share of the learning rate at the end


def learning_rate(config: WarmstartConfig, step: int) -> float:
    """Of step 0, 1, …: linear warm-up, then linear decay to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - 1 - config.warmup_steps, 1)
    return config.learning_rate * (1 - (1 - FLOOR) * done)


def draw(count: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` batches of row indices, each row once before any comes again."""
    rng = np.random.default_rng([seed, 2])
    pool: list[int] = []
    for _ in range(steps):
        while len(pool) < batch:
            pool += rng.permutation(count).tolist()
        yield pool[:batch]
        pool = pool[batch:]


def run(job: dict, policy: Policy, ranks: Ranks, progress: Progress) -> dict:
    """Minimise the mean negative log-likelihood per sampled token; all weights, or the adapter. Rank 0 writes `output`.

    Where the demonstrations hold comparisons, COMPARED times the mean over their tokens is added.

    With 0 steps the base becomes a policy as it is. The policy's optimizer starts afresh afterwards.
    """
    config = WarmstartConfig.model_validate(job["warmstart"])
    clock = Clock(policy.device)
    steps: list[dict] = []
    if config.steps:
        steps = _learn(job, config, policy, ranks, clock, progress)
    rate = steps[-1]["lr"] if steps else 0.0
    checkpoint.save(policy, job["output"], learning_rate=rate, seed=job["seed"], write=ranks.rank == 0)
    metrics = {"peak_memory_mb": peak_memory_mb(policy.device)}
    if steps:
        metrics |= {"loss": steps[-1]["loss"], "seconds": sum(step["seconds"] for step in steps)}
    return {"metrics": metrics, "steps": steps, "updates": policy.updates}


def _learn(
    job: dict, config: WarmstartConfig, policy: Policy, ranks: Ranks, clock: Clock, progress: Progress
) -> list[dict]:
    rows, compared = ranks.together(lambda: _read(job, policy))
    count, extra = len(rows), round(COMPARED * config.batch) if compared else 0
    rows = rows + compared
    lengths = [len(row.conversation.tokens) for row in rows]
    parameters = policy.train_only(vision=True)
    optimizer = checkpoint.new_optimizer(parameters.values())
    stepper = Stepper(policy, parameters, optimizer, ranks, MAX_GRAD_NORM)
    images, talk = job["images"], job["conversation"]
    pixels = Patches(images["tables"], min_pixels=images["min_pixels"], max_pixels=images["max_pixels"])
    features = {} if policy.config.adaptation == "lora" else None
    scorer = Scorer(policy.model, pixels, temperature=talk["temperature"], banned=talk["banned"], features=features)
    steps = []
    longest = sorted((row.conversation for row in rows), key=lambda row: len(row.tokens))
    longest = longest[-max((config.batch + extra) // ranks.count, 1) :]
    batches = split(longest, None, job["token_budget"], scorer.image_token)
    ranks.together(
        lambda: memory.check_job(
            policy, scorer, longest, [([longest[k] for k in batch.rows], None) for batch in batches], ranks,
            token_budget=job["token_budget"], checkpointing=job.get("gradient_checkpointing", False),
        )
    )  # fmt: skip
    policy.fits = 0  # what follows trains other parameters
    if job.get("gradient_checkpointing"):
        checkpointing(policy, True)
    drawn = draw(count, config.batch, config.steps, job["seed"])
    also = draw(len(compared), extra, config.steps, job["seed"]) if extra else repeat([])
    for number, (batch, comparisons) in enumerate(zip(drawn, also, strict=False)):
        tokens = sum(len(rows[i].engine) for i in batch)
        weights = dict.fromkeys(batch, 1 / tokens)
        weights |= {count + i: COMPARED / len(comparisons) for i in comparisons}
        mine = ranks.share([*batch, *(count + i for i in comparisons)], lengths)
        conversations = [rows[i].conversation for i in mine]
        share = 0.0
        together = ranks.together_with(policy, rows[0].conversation)
        for micro in MicroBatches(conversations, job["token_budget"], scorer, pixels, **together):
            with policy.autocast():
                logps, _ = scorer([conversations[k] for k in micro.rows])
            each = np.concatenate([np.full(len(rows[mine[k]].engine), weights[mine[k]]) for k in micro.rows])
            loss = -(logps * torch.from_numpy(each).to(logps)).sum()
            loss.backward()
            share += float(loss.detach())
        rate = learning_rate(config, number)
        norm = stepper.step(rate)
        loss = sum(ranks.gather(share))
        steps.append({"step": number + 1, "loss": loss, "grad_norm": norm, "lr": rate, "seconds": clock.lap()})
        progress(steps[-1] | {"steps": config.steps})
    if job.get("gradient_checkpointing"):
        checkpointing(policy, False)
    stepper.release()
    pixels.close()
    return steps


def _read(job: dict, policy: Policy) -> tuple[list[Row], list[Row]]:
    """(conversations, comparisons)"""
    artifact, image_token = Demonstrations.open(Path(job["rollouts"])), unwrap(policy.model).config.image_token_id
    rows = read_rows(artifact, image_token)
    if not rows:
        raise UserError("There are no demonstrations to start from.")
    compared = "comparisons.parquet" in artifact.files
    return rows, read_rows(artifact, image_token, table="comparisons") if compared else []
