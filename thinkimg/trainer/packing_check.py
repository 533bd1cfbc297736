"""Trial of packing for a policy on this machine, and the tokens that packing saves."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thinkimg.errors import shorten
from thinkimg.trainer.forward import flex, shared_prompts
from thinkimg.trainer.forward.fsdp import get_local
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.modules import get_base_model, get_head_dim
from thinkimg.trainer.forward.packed_attention import Layout, attend_packed
from thinkimg.trainer.forward.packing import Conversation, ImageToken
from thinkimg.trainer.forward.shared_prompts import Span, Unit
from thinkimg.trainer.micro_batches import count_tokens
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import Patches, Row
from thinkimg.trainer.stepper import checkpoint_activations

TRIED = 2  # rows of one group
# Mean |difference| of log-probabilities, of which a wrong mask is off by more than 1; and of the gradients' norms,
# relative to these.
LIMITS = {"float32": 1e-3, "bfloat16": 0.1}


@dataclass(frozen=True)
class Trial:
    """Parts of a job that a trial of packing uses."""

    scorer: Scorer
    pixels: Patches
    token_budget: int
    """Tokens of a micro-batch."""
    checkpointing: bool
    """True if activations are computed again in the backward pass."""


def find_obstacle(policy: PolicyModel, ranks: Ranks, rows: Sequence[Row], trial: Trial) -> str | None:
    """Return the reason why rows can't be packed on some process's machine, or None. All processes call it.

    Two rows are tried once for each policy that is loaded. So a kernel that does not compile on this machine, or is
    wrong, forward or backward, costs speed and not the run.
    """
    if policy.packing_obstacle is None:
        config = get_base_model(policy.model).language_model.config
        obstacle = shared_prompts.find_obstacle(config) or policy.family.packing_obstacle(config)
        if policy.sharded:
            # A backward pass that fails leaves FSDP2 in a state of which nobody knows. The kernel is tried without it.
            obstacle = agree(ranks, obstacle or try_kernel(policy))
            obstacle = obstacle or agree(ranks, try_packing(policy, rows, trial, backward=False))
        else:
            with checkpoint_activations(policy.model, trial.checkpointing):
                obstacle = agree(
                    ranks, ranks.together(lambda: obstacle or try_packing(policy, rows, trial, backward=True))
                )
        policy.packing_obstacle = obstacle or ""
    return policy.packing_obstacle or None


def agree(ranks: Ranks, obstacle: str | None) -> str | None:
    """Return the first process's obstacle, in every process."""
    return next((reason for reason in ranks.gather(obstacle) if reason), None)


def try_kernel(policy: PolicyModel) -> str | None:
    """Return what the packed attention raises on plain tensors of the model's shape, forward or backward."""
    config = get_base_model(policy.model).language_model.config
    size = get_head_dim(config)
    layout = Layout([Span(0, flex.SMALLEST, 0)], policy.device, grouped=flex.is_used(policy.device))
    dtype = getattr(torch, policy.config.precision)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    inputs = [
        torch.zeros(1, count, flex.SMALLEST, size, dtype=dtype, device=policy.device, requires_grad=True)
        for count in heads
    ]
    try:
        attend_packed(None, *inputs, None, scaling=size**-0.5, layout=layout)[0].sum().backward()
    except Exception as error:  # whatever a compiler raises
        return f"{type(error).__name__}: {shorten(str(error), 300)}"
    return None


def try_packing(policy: PolicyModel, rows: Sequence[Row], trial: Trial, *, backward: bool) -> str | None:
    """Return what packing changes in log-probabilities and gradients of two rows if it is too much, else None.

    Without a backward pass where the two together are more than a micro-batch: they may not fit.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group_id, []).append(row)
    pairs = [sorted(group, key=lambda row: len(row.conversation.tokens))[:TRIED] for group in groups.values()]
    pair = min(pairs, key=lambda pair: (-len(pair), sum(len(row.conversation.tokens) for row in pair)))
    conversations = [row.conversation for row in pair]
    units = shared_prompts.share_groups(conversations, [0] * len(pair), trial.scorer.image_token)
    trial.pixels.prepare(conversations)
    # A cache of its own: on some processors the last bits of an image's features depend on the rest of the batch, and a
    # policy that was loaded has to train as one that stayed in memory, which is not tried again.
    scorer = copy.copy(trial.scorer)
    scorer.features = None if scorer.features is None else {}
    backward = backward and count_tokens(conversations, units) <= trial.token_budget
    alone = [([conversation], None) for conversation in conversations]  # as little memory as a row takes
    expected, norms = run_passes(policy, scorer, alone, backward=backward)

    def compare() -> str | None:
        packed = run_passes(policy, scorer, [(conversations, units)], backward=backward)
        return find_difference("packed", policy.config.precision, (expected, norms), packed)

    return find_failure(policy, compare)


def find_failure(policy: PolicyModel, trial: Callable[[], str | None]) -> str | None:
    """Return what a trial finds, or what it raises, as a compiler may raise anything; it leaves no gradients.

    Raises OutOfMemoryError.
    """
    try:
        return trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {shorten(str(error), 300)}"
    finally:
        policy.model.zero_grad(set_to_none=True)


def find_difference(
    kind: str, precision: str, expected: tuple[Tensor, Tensor], actual: tuple[Tensor, Tensor]
) -> str | None:
    """Return the difference between two results of `run_passes` if it is too much for a precision, else None.

    kind: adjective for the actual result.
    """
    limit = LIMITS[precision]
    difference = float((actual[0] - expected[0]).abs().mean())
    if not difference <= limit:  # NaN is not
        return f"{kind} log-probabilities differ by {difference:.2g} on average, allowed are {limit}"
    computed = bool(expected[1].any() or actual[1].any())  # there are no gradients without a backward pass
    difference = float((actual[1] - expected[1]).norm() / expected[1].norm()) if computed else 0.0
    if not difference <= limit:
        return f"gradients of {kind} rows differ by {difference:.2g} of their norm, allowed are {limit}"
    return None


def run_passes(
    policy: PolicyModel,
    scorer: Scorer,
    batches: Sequence[tuple[Sequence[Conversation], Sequence[Unit] | None]],
    *,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (N,), row by row, and the norms of their sum's gradients, one for each parameter."""
    policy.model.zero_grad(set_to_none=True)
    parts = []
    for rows, units in batches:
        with policy.autocast(), torch.set_grad_enabled(backward):
            logps, _ = scorer(rows, units)
        if backward:
            logps.sum().backward()
        parts.append(logps.detach())
    grads = [parameter.grad for parameter in policy.model.parameters() if parameter.grad is not None]
    norms = torch.stack([get_local(grad).float().norm() for grad in grads]) if grads else torch.zeros(1)
    return torch.cat(parts), norms


def measure_savings(rows: Sequence[Row], image_token: ImageToken) -> dict[str, float]:
    """Return metrics of packed rows.

    packing/computed: tokens computed / tokens. packing/unshared_rows: rows that begin otherwise than their group.
    """
    conversations = [row.conversation for row in rows]
    groups = [row.group_id for row in rows]
    units = shared_prompts.share_groups(conversations, groups, image_token)
    sizes = dict(zip(*np.unique(groups, return_counts=True), strict=True))
    alone = sum(len(unit.rows) == 1 and sizes[groups[unit.rows[0]]] > 1 for unit in units)
    computed = sum(shared_prompts.count_unit_tokens(unit, conversations) for unit in units)
    total = sum(len(conversation.tokens) for conversation in conversations)
    return {"packing/computed": computed / total, "packing/unshared_rows": float(alone)}
