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
FLOAT32 = 4  # bytes


def compute_text_positions(tokens: np.ndarray, image_token: ImageToken, grids: np.ndarray) -> np.ndarray:
    """Return (3, T) positions of a text of as many tokens."""
    return np.tile(np.arange(len(tokens)), (3, 1))


@contextmanager
def use_float32(policy: PolicyModel) -> Iterator[None]:
    """Compute with the weights in float32 within this context, without autocast; they stay as they are.

    They are widened for a layer at a time, while it computes: those of a whole model in float32 seldom fit beside it.
    """
    narrow: dict[tuple[torch.nn.Module, str], torch.nn.Parameter] = {}

    def widen(block: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if parameter.dtype == torch.bfloat16:
                    narrow[module, name] = parameter
                    module._parameters[name] = torch.nn.Parameter(parameter.float(), requires_grad=False)
        return tuple(map(_widen_tensor, args)), {name: _widen_tensor(value) for name, value in kwargs.items()}

    def restore(block: torch.nn.Module, args: tuple, output: object) -> None:
        for module in block.modules():
            for name in module._parameters:
                if (parameter := narrow.pop((module, name), None)) is not None:
                    module._parameters[name] = parameter

    handles = []
    try:
        for block in _list_blocks(policy.model):
            handles.append(block.register_forward_pre_hook(widen, with_kwargs=True))
            # Before FSDP2's hook, which takes the weights away; and where a pass breaks off, too.
            handles.append(block.register_forward_hook(restore, prepend=True, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen_tensor(value: object) -> object:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def _list_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that are widened one after the other: layers in lists, and what has weights beside them."""
    blocks = []
    for child in model.children():
        if isinstance(child, torch.nn.ModuleList):
            blocks += child
        else:
            blocks += [child] if child._parameters else _list_blocks(child)
    return blocks


def has_room_for_float32(policy: PolicyModel) -> bool:
    """Tell whether float32 is more than what the policy has, and the largest block fits in it."""
    if policy.config.precision == "float32" or policy.config.load_in_4bit:
        return False
    sizes = (sum(p.numel() for p in block.parameters()) for block in _list_blocks(policy.model))
    return 2 * FLOAT32 * max(sizes) < measure_free_bytes(policy)  # beside activations of one micro-batch


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
    if policy.config.precision != "float32" and not policy.config.load_in_4bit:
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
