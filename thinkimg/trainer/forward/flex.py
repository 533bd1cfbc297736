"""Packed attention on a GPU: FlexAttention over a block mask that is computed from the spans, 128 x 128 tokens a block.

A packed batch is padded to one of few lengths (`round_up_to_bucket`), so that a job compiles a few times at most. A
token's row is data (two index tensors) and not code, so that no mask compiles anything.
"""

import functools
import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from thinkimg.trainer.forward.shared_prompts import Span

log = logging.getLogger(__name__)

BLOCK = 128
SMALLEST = 1024
COMPILATIONS = 64  # torch's own limit is 8; beyond it it would compute all T x T scores and not say so


def round_up_to_bucket(tokens: int) -> int:
    """Return the smallest of 1024 x (4, 5, 6, 7) / 4 x 2^k that holds so many tokens: at most 20 % is padding."""
    size = SMALLEST
    while size < tokens:
        size *= 2
    return min(s for s in (size // 8 * 5, size // 8 * 6, size // 8 * 7, size) if s >= max(tokens, SMALLEST))


def number_spans(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Return (T,) each: the number of a token's span, and of that span's parent."""
    lengths = [span.length for span in spans]
    return np.repeat(np.arange(len(spans)), lengths), np.repeat([span.parent for span in spans], lengths)


def find_blocks(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Return the blocks with any pair of tokens that may attend, and those where all pairs may.

    Returns (T / 128, T / 128) bool each, [query block, key block].
    """
    own, parent = number_spans(spans)
    count = len(own) // BLOCK
    assert count * BLOCK == len(own), "a packed batch is padded to whole blocks"
    own, parent = own.reshape(count, BLOCK), parent.reshape(count, BLOCK)
    keys = np.zeros((count, len(spans)), dtype=np.int32)  # tokens of each span in each block
    queries = np.zeros((count, len(spans)), dtype=np.int32)  # tokens of each block that attend to each span
    rows = np.broadcast_to(np.arange(count)[:, None], own.shape)
    np.add.at(keys, (rows, own), 1)
    np.add.at(queries, (rows, own), 1)
    np.add.at(queries, (rows, parent), (parent != own).astype(np.int32))
    pairs = queries.astype(np.float32) @ keys.T.astype(np.float32)  # at most 128 x 128 of a block: exact
    causal = np.tri(count, dtype=bool)
    return (pairs > 0) & causal, (pairs == BLOCK * BLOCK) & causal & ~np.eye(count, dtype=bool)


def build_block_mask(spans: Sequence[Span], device: torch.device):
    """Return the BlockMask of a packed batch: a token sees its span up to itself, and its parent.

    The batch's length must be a multiple of 128.
    """
    from torch.nn.attention.flex_attention import BlockMask

    some, full = find_blocks(spans)
    own, parent = (torch.from_numpy(x.astype(np.int32)).to(device) for x in number_spans(spans))

    def mask_mod(b, h, q, kv):
        return (kv <= q) & ((own[q] == own[kv]) | (parent[q] == own[kv]))

    def indices(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
        count = blocks.sum(1).astype(np.int32)
        return torch.from_numpy(count)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)

    return BlockMask.from_kv_blocks(*indices(some & ~full), *indices(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod)


def is_used(device: torch.device) -> bool:
    """Return True for a device on which packed rows attend by FlexAttention."""
    return device.type == "cuda"


@functools.cache
def compile_flex():
    """Return torch's FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.cache
def can_group_heads(repeats: int, dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Try if the kernel takes `repeats` query heads to a key head, forward and backward (7 in Qwen2.5-VL-7B).

    torch's documentation doesn't name the numbers it takes. If it fails, keys and values are repeated instead.
    """
    if repeats == 1:
        return False
    mask = build_block_mask([Span(0, SMALLEST, 0)], device)
    randn = functools.partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
    query, key, value = (randn(1, heads, SMALLEST, head_dim) for heads in (repeats, 1, 1))
    try:
        # A checkpoint counts the tensors that are saved within it, and at the recomputation nothing is tried again.
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            call_flex(query, key, value, mask, head_dim**-0.5, True).sum().backward()
    except Exception as error:  # whatever a compiler raises
        log.warning(
            "FlexAttention does not take %d heads to one (%s): they are repeated", repeats, type(error).__name__
        )
        return False
    return True


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, mask, scaling: float) -> Tensor:
    """Attend under a block mask: query (1, heads, T, d), key and value (1, kv heads, T, d) -> (1, heads, T, d)."""
    repeats = query.shape[1] // key.shape[1]
    grouped = can_group_heads(repeats, value.dtype, query.shape[-1], query.device)
    if repeats > 1 and not grouped:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return call_flex(query, key, value, mask, scaling, grouped)


def call_flex(query: Tensor, key: Tensor, value: Tensor, mask, scaling: float, grouped: bool) -> Tensor:
    """Call FlexAttention, compiled. grouped: key and value have fewer heads than query."""
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
        return compile_flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
