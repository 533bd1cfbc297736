"""What a difference between engine and trainer is made of: the trainer's pass again, with one thing changed at a time.

Whichever change brings the trainer close to the engine names the cause. It runs on a refusal only, on a few rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from thinkimg.trainer.checkpoint import Policy
from thinkimg.trainer.forward.logprobs import Scorer, unwrap
from thinkimg.trainer.forward.shared_prompts import image_spans
from thinkimg.trainer.rows import Patches, Row

LOOKED_AT = 4  # rows


def text_positions(tokens: np.ndarray, image_token: int, grids: np.ndarray) -> np.ndarray:
    """(3, T): those of a text of as many tokens."""
    return np.tile(np.arange(len(tokens)), (3, 1))


@contextmanager
def in_float32(policy: Policy) -> Iterator[None]:
    """Base weights in float32 meanwhile; there and back loses nothing."""
    narrow = [p for p in policy.model.parameters() if p.dtype == torch.bfloat16]
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter in narrow:
            parameter.data = parameter.data.to(torch.bfloat16)


def split(
    policy: Policy,
    pixels: Patches,
    rows: Sequence[Row],
    trainer: Sequence[np.ndarray],
    *,
    temperature: float,
    banned: Sequence[int],
) -> str:
    """A sentence with the mean |difference| to the engine under each change, and by the number of images seen.

    trainer: log-probabilities as the gate found them. Every process has to call it where weights are sharded.
    """
    rows, trainer = rows[:LOOKED_AT], trainer[:LOOKED_AT]
    pixels.prepare([row.conversation for row in rows])

    def alone(**changes) -> list[np.ndarray]:
        options = {"temperature": temperature, "banned": banned} | changes
        scorer = Scorer(policy.model, pixels, features={}, **options)  # an empty cache: pictures are looked at again
        with torch.no_grad():
            return [scorer([row.conversation])[0].float().cpu().numpy() for row in rows]

    def exact() -> list[np.ndarray]:
        with in_float32(policy):
            return alone()

    def usual(**changes) -> Callable[[], list[np.ndarray]]:
        def run() -> list[np.ndarray]:
            with policy.autocast():
                return alone(**changes)

        return run

    found = {"as trained": distance(rows, trainer)}
    changes: dict[str, Callable[[], list[np.ndarray]]] = {"batch shape and cached pixels (one row at a time)": usual()}
    if policy.config.dtype != "float32" and not (policy.sharded or policy.config.load_in_4bit):
        changes["precision (float32)"] = exact
    if banned:
        changes["sampling mask (not renormalised)"] = usual(banned=())
    if temperature != 1.0:
        changes["temperature (1)"] = usual(temperature=1.0)
    changes["positions (as of text)"] = usual(positions=text_positions)
    for name, run in changes.items():
        try:
            found[name] = distance(rows, run())
        except torch.OutOfMemoryError:
            found[name] = float("nan")
    listed = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    best = min((name for name in changes), key=lambda name: np.nan_to_num(found[name], nan=np.inf))
    verdict = f"most of it goes with: {best}" if found[best] < found["as trained"] / 2 else "none of these explains it"
    seen = ", ".join(
        f"{count} {value:.4f}"
        for count, value in by_images(rows, trainer, unwrap(policy.model).config.image_token_id).items()
    )
    return (
        f"The mean difference over the {len(rows)} worst trajectories is {listed}; {verdict}. "
        f"Pixels: by the number of images that a token has seen it is {seen}."
    )


def distance(rows: Sequence[Row], logps: Sequence[np.ndarray]) -> float:
    return float(np.abs(np.concatenate([logp - row.engine for row, logp in zip(rows, logps, strict=True)])).mean())


def by_images(rows: Sequence[Row], logps: Sequence[np.ndarray], image_token: int) -> dict[int, float]:
    """Mean |difference| of the tokens that stand after 0, 1, … images: a jump points at the picture."""
    values: dict[int, list[np.ndarray]] = {}
    for row, logp in zip(rows, logps, strict=True):
        ends = [end for _, end in image_spans(row.conversation, image_token)]
        seen = np.searchsorted(ends, np.flatnonzero(row.conversation.scored), side="right")
        for count in np.unique(seen):
            values.setdefault(int(count), []).append(np.abs(logp - row.engine)[seen == count])
    return {count: float(np.concatenate(parts).mean()) for count, parts in sorted(values.items())}
