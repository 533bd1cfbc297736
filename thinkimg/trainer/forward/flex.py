"""Packed attention on a GPU: FlexAttention over a block mask that is worked out from the spans, 128 x 128 tokens at a time.

A packed batch is padded to one of few lengths (`bucket`), so that compilation happens a few times per job at most; which
row a token belongs to is data (two index tensors), not code, so that no mask compiles anything.
"""

import functools
import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from thinkimg.trainer.forward.shared_prompts import Span

log = logging.getLogger(__name__)

BLOCK = 128
SMALLEST = 1024
COMPILATIONS = 64  # torch's own limit is 8, after which it would compute all T x T scores without a word


def bucket(tokens: int) -> int:
    """The smallest of 1024 x (4, 5, 6, 7) / 4 x 2^k that holds so many tokens: at most 20 % of it is padding."""
    size = SMALLEST
    while size < tokens:
        size *= 2
    return min(s for s in (size // 8 * 5, size // 8 * 6, size // 8 * 7, size) if s >= max(tokens, SMALLEST))


def numbers(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """(T,) each: the number of a token's span, and of that span's parent."""
    lengths = [span.length for span in spans]
    return np.repeat(np.arange(len(spans)), lengths), np.repeat([span.parent for span in spans], lengths)


def blocks(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """(T / 128, T / 128) bool each, [query block, key block]: those with something to see, those without anything hidden."""
    own, parent = numbers(spans)
    count = len(own) // BLOCK
    assert count * BLOCK == len(own), "a packed batch is padded to whole blocks"
    own, parent = own.reshape(count, BLOCK), parent.reshape(count, BLOCK)
    keys = np.zeros((count, len(spans)), dtype=np.int32)  # tokens of each span in each block
    looks = np.zeros((count, len(spans)), dtype=np.int32)  # tokens of each block that look at each span
    rows = np.broadcast_to(np.arange(count)[:, None], own.shape)
    np.add.at(keys, (rows, own), 1)
    np.add.at(looks, (rows, own), 1)
    np.add.at(looks, (rows, parent), (parent != own).astype(np.int32))
    pairs = looks.astype(np.float32) @ keys.T.astype(np.float32)  # at most 128 x 128 of a block: exact
    before = np.tri(count, dtype=bool)
    return (pairs > 0) & before, (pairs == BLOCK * BLOCK) & before & ~np.eye(count, dtype=bool)


def block_mask(spans: Sequence[Span], device: torch.device):
    """BlockMask of a packed batch whose length is a multiple of 128: a token sees its span up to itself, and its parent."""
    from torch.nn.attention.flex_attention import BlockMask

    some, whole = blocks(spans)
    own, parent = (torch.from_numpy(x.astype(np.int32)).to(device) for x in numbers(spans))

    def mask_mod(b, h, q, kv):
        return (kv <= q) & ((own[q] == own[kv]) | (parent[q] == own[kv]))

    def indices(wanted: np.ndarray) -> tuple[Tensor, Tensor]:
        order = np.argsort(~wanted, axis=1, kind="stable").astype(np.int32)
        count = wanted.sum(1).astype(np.int32)
        return torch.from_numpy(count)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)

    return BlockMask.from_kv_blocks(*indices(some & ~whole), *indices(whole), BLOCK_SIZE=BLOCK, mask_mod=mask_mod)


@functools.cache
def compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@functools.cache
def groups_heads(repeats: int, dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether the kernel takes `repeats` query heads to a key head, forward and backward (7 in Qwen2.5-VL-7B).

    torch's documentation doesn't say which numbers it does; where it fails, keys and values are repeated instead.
    """
    if repeats == 1:
        return False
    mask = block_mask([Span(0, SMALLEST, 0)], device)
    make = functools.partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
    query, key, value = (make(1, heads, SMALLEST, head_dim) for heads in (repeats, 1, 1))
    try:
        with torch.enable_grad():
            call(query, key, value, mask, head_dim**-0.5, True).sum().backward()
    except Exception as error:  # whatever a compiler raises
        log.warning(
            "FlexAttention does not take %d heads to one (%s): they are repeated", repeats, type(error).__name__
        )
        return False
    return True


def flex(query: Tensor, key: Tensor, value: Tensor, mask, scaling: float) -> Tensor:
    """query (1, heads, T, d), key and value (1, kv heads, T, d) -> (1, heads, T, d)."""
    repeats = query.shape[1] // key.shape[1]
    grouped = groups_heads(repeats, value.dtype, query.shape[-1], query.device)
    if repeats > 1 and not grouped:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return call(query, key, value, mask, scaling, grouped)


def call(query: Tensor, key: Tensor, value: Tensor, mask, scaling: float, grouped: bool) -> Tensor:
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
        return compiled()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
