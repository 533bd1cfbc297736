"""Trial of packing for a policy on this machine, and the tokens that packing saves."""

import copy
from collections.abc import Sequence

import numpy as np
import torch

from thinkimg.trainer.forward import shared_prompts
from thinkimg.trainer.forward.logprobs import Scorer, base_model
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.rows import Patches, Row

TRIED = 2  # rows of one group
# Mean |difference| of log-probabilities; a wrong mask is off by more than 1.
LIMITS = {"float32": 1e-3, "bfloat16": 0.1}


def find_obstacle(policy: PolicyModel, scorer: Scorer, pixels: Patches, rows: Sequence[Row]) -> str | None:
    """Return the reason why rows can't be packed, or None; two rows are tried once for each policy that is loaded.

    So a kernel that does not compile on this machine, or is wrong, costs speed and not the run.
    """
    if policy.packing_obstacle is None:
        obstacle = shared_prompts.find_obstacle(base_model(policy.model).language_model.config)
        policy.packing_obstacle = obstacle or try_packing(policy, scorer, pixels, rows) or ""
    return policy.packing_obstacle or None


def try_packing(policy: PolicyModel, scorer: Scorer, pixels: Patches, rows: Sequence[Row]) -> str | None:
    """Return the difference that packing makes to the log-probabilities of two rows if it is too large, else None."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group_id, []).append(row)
    pairs = [sorted(group, key=lambda row: len(row.conversation.tokens))[:TRIED] for group in groups.values()]
    pair = min(pairs, key=lambda pair: (-len(pair), sum(len(row.conversation.tokens) for row in pair)))
    conversations = [row.conversation for row in pair]
    units = shared_prompts.share_groups(conversations, [0] * len(pair), scorer.image_token)
    pixels.prepare(conversations)
    # A cache of its own: on some processors the last bits of an image's features depend on the rest of the batch, and a
    # policy that was loaded has to train as one that stayed in memory, which is not tried again.
    scorer = copy.copy(scorer)
    scorer.features = None if scorer.features is None else {}
    with torch.no_grad(), policy.autocast():
        expected, _ = scorer(conversations)
        try:
            packed, _ = scorer(conversations, units)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    difference = float((packed - expected).abs().mean())
    limit = LIMITS[policy.config.dtype]
    if difference <= limit:  # NaN is not
        return None
    return f"packed log-probabilities differ by {difference:.2g} on average, allowed are {limit}"


def measure_savings(rows: Sequence[Row], image_token: int) -> dict[str, float]:
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
