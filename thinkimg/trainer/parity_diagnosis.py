"""Diagnosis of a difference between engine and trainer: the trainer's pass again, with one thing changed at a time.

The change that brings the trainer close to the engine names the cause. It runs on a refusal only, on a few rows.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch

from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.packing import ImageToken
from thinkimg.trainer.forward.shared_prompts import find_image_spans
from thinkimg.trainer.memory import measure_free_bytes
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.rows import Row

ROWS = 4


def compute_text_positions(tokens: np.ndarray, image_token: ImageToken, grids: np.ndarray) -> np.ndarray:
    """Return (3, T) positions of a text of as many tokens."""
    return np.tile(np.arange(len(tokens)), (3, 1))


@contextmanager
def use_float32(policy: PolicyModel) -> Iterator[None]:
    """Hold the base weights in float32 within this context; there and back loses nothing."""
    narrow = [p for p in policy.model.parameters() if p.dtype == torch.bfloat16]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter in narrow:
            parameter.data = parameter.data.to(torch.bfloat16)


def has_room_for_float32(policy: PolicyModel) -> bool:
    """Tell whether the base weights can be held in float32 for a while."""
    if policy.config.precision == "float32" or policy.sharded or policy.config.load_in_4bit:
        return False
    more = sum(p.nbytes for p in policy.model.parameters() if p.dtype == torch.bfloat16)
    return 1.5 * more < measure_free_bytes(policy)  # beside activations of one micro-batch


def explain(
    policy: PolicyModel, scorer: Scorer, banned: Sequence[int], rows: Sequence[Row], trainer: Sequence[np.ndarray]
) -> str:
    """Return a sentence with the mean |difference| to the engine under each change, and by the number of images seen.

    trainer: log-probabilities as the gate has them. If weights are sharded every process must call.
    """
    chosen = np.random.default_rng(0).permutation(len(rows))[:ROWS]  # they come in the order of the data
    rows, trainer = [rows[i] for i in chosen], [trainer[i] for i in chosen]
    scorer.pixels.prepare([row.conversation for row in rows])

    def score(context: AbstractContextManager, **changes: object) -> list[np.ndarray]:
        changed = copy.copy(scorer)
        vars(changed).update({"features": {}} | changes)  # an empty cache: the tower runs again
        with torch.no_grad(), context:
            return [changed([row.conversation])[0].float().cpu().numpy() for row in rows]

    changes: dict[str, dict] = {"batch shape and cached pixels (one row at a time)": {}}
    if policy.config.precision != "float32" and not (policy.sharded or policy.config.load_in_4bit):
        changes["precision (float32)"] = {"context": use_float32(policy)}
    if banned:
        changes["sampling mask (not renormalised)"] = {"banned": None}
    if scorer.temperature != 1.0:
        changes["temperature (1)"] = {"temperature": 1.0}
    changes["positions (as of text)"] = {"positioner": compute_text_positions}
    differences = {"as trained": measure_distance(rows, trainer)}
    for name, change in changes.items():
        try:
            differences[name] = measure_distance(rows, score(**{"context": policy.autocast()} | change))
        except torch.OutOfMemoryError:
            differences[name] = float("nan")
    listed = ", ".join(f"{name} {value:.4f}" for name, value in differences.items())
    best = min(changes, key=lambda name: np.nan_to_num(differences[name], nan=np.inf))
    explained = differences[best] < differences["as trained"] / 2
    verdict = f"Most of it goes with: {best}" if explained else "None of these explains it"
    groups = group_by_images(rows, trainer, scorer.image_token)
    images = ", ".join(f"{count} {value:.4f}" for count, value in groups.items())
    return (
        f"The mean difference over the {len(rows)} worst trajectories is {listed}. {verdict}. "
        f"By the number of images before a token it is {images}."
    )


def measure_distance(rows: Sequence[Row], logps: Sequence[np.ndarray]) -> float:
    """Return the mean |difference| to the engine."""
    return float(np.abs(np.concatenate([logp - row.engine for row, logp in zip(rows, logps, strict=True)])).mean())


def group_by_images(rows: Sequence[Row], logps: Sequence[np.ndarray], image_token: ImageToken) -> dict[int, float]:
    """Return the mean |difference| of the tokens after 0, 1, … images: a jump points at an image."""
    values: dict[int, list[np.ndarray]] = {}
    for row, logp in zip(rows, logps, strict=True):
        ends = [end for _, end in find_image_spans(row.conversation, image_token)]
        seen = np.searchsorted(ends, np.flatnonzero(row.conversation.scored), side="right")
        for count in np.unique(seen):
            values.setdefault(int(count), []).append(np.abs(logp - row.engine)[seen == count])
    return {count: float(np.concatenate(parts).mean()) for count, parts in sorted(values.items())}
