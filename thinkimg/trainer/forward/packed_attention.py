"""Attention over packed rows: each span looks at itself, causally, and at its parent; registered with transformers.

On a CPU a span's attention to itself and to its parent are two calls of PyTorch's flash attention, merged by their
log-sum-exps, as in ring attention (arXiv 2310.01889): the backward pass of each piece is the kernel's own, given the
merged output and log-sum-exp. No key or value is copied for a row, and nothing is computed that a mask would throw away.
On a GPU it is one FlexAttention call over a block mask (flex.py).
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thinkimg.trainer.forward.flex import block_mask, flex
from thinkimg.trainer.forward.shared_prompts import Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "thinkimg_packed"
SHORT, STEP = 128, 16  # spans up to SHORT tokens are stacked, padded to a multiple of STEP: else calls outweigh work
attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Stack(NamedTuple):
    """Short spans that are computed as one batch, padded: index (n, L) of their tokens; real (n, L) bool, what of it is no
    padding, and kept, the numbers of these in the flat index; None: all of it."""

    index: Tensor
    real: Tensor | None
    kept: Tensor | None


class Layout:
    """What the attention function is told of a packed batch; one for all layers and both passes."""

    def __init__(self, spans: Sequence[Span], device: torch.device, *, grouped: bool = False):
        """grouped: the kernel takes several query heads to a key head (preflight.py says so of a GPU's)."""
        self.spans, self.device, self.grouped = spans, device, grouped

    @cached_property
    def families(self) -> list[tuple[slice, slice]]:
        """(prefix, all its branches) as slices, for each prefix that has branches."""
        found = []
        for number, (start, length, parent) in enumerate(self.spans):
            children = [span for span in self.spans[number + 1 :] if span.parent == number] if parent == number else []
            if children and length:
                found.append((slice(start, start + length), slice(children[0].start, sum(children[-1][:2]))))
        return found

    @cached_property
    def stacks(self) -> list["Stack"]:
        by_length: dict[int, list[Span]] = {}
        for span in self.spans:
            if 0 < span.length <= SHORT:
                by_length.setdefault(-(-span.length // STEP) * STEP, []).append(span)
        return [self._stack(spans) for spans in by_length.values()]

    @cached_property
    def long(self) -> list[slice]:
        return [slice(span.start, span.start + span.length) for span in self.spans if span.length > SHORT]

    def _stack(self, spans: list[Span]) -> "Stack":
        lengths = np.array([span.length for span in spans])
        columns = np.arange(lengths.max())
        index = np.array([span.start for span in spans])[:, None] + np.minimum(columns, lengths[:, None] - 1)
        real = columns < lengths[:, None]
        if real.all():
            return Stack(torch.from_numpy(index), None, None)
        return Stack(torch.from_numpy(index), torch.from_numpy(real), torch.from_numpy(np.flatnonzero(real)))

    @cached_property
    def block_mask(self):
        return block_mask(self.spans, self.device)


def use_packed_attention(model: "PreTrainedModel") -> None:
    """Let the language model of a Qwen2.5-VL attend by `packed_attention`; nothing of it is saved with the model."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.model.language_model.config._attn_implementation = NAME


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    **rest: object,
) -> tuple[Tensor, None]:
    """query (B, heads, T, d), key and value (B, kv heads, T, d) -> (B, T, heads, d). Without a layout: as "sdpa"."""
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    assert len(query) == 1 and not rest.get("dropout"), "a packed batch is one sequence, without dropout"
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary positions make float32 of them
    if value.device.type == "cuda":
        return flex(query, key, value, layout.block_mask, scaling).transpose(1, 2), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and not layout.grouped:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return PackedAttention.apply(query, key, value, scaling, layout).transpose(1, 2), None


class PackedAttention(torch.autograd.Function):
    """query, key, value (1, heads, T, d) -> (1, heads, T, d)."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Layout) -> Tensor:
        # (T, heads, d) in memory, so that the caller's transpose back costs nothing.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        if query.dtype == torch.float64:
            lse = lse.double()
        for where in layout.long:
            part = [x[:, :, where] for x in (query, key, value)]
            out[:, :, where], lse[:, :, where] = attend(*part, 0.0, True, scale=scaling)
        for short in layout.stacks:
            found, spread = attend(*(stack(x, short) for x in (query, key, value)), 0.0, True, scale=scaling)
            unstack(out, short, found)
            unstack(lse, short, spread)
        for prefix, branches in layout.families:
            found, spread = attend(query[:, :, branches], key[:, :, prefix], value[:, :, prefix], scale=scaling)
            own = lse[:, :, branches]
            both = torch.logaddexp(own, spread)
            share = (spread - both).exp().unsqueeze(-1)
            mine = out[:, :, branches]
            mine.copy_(mine * (own - both).exp().unsqueeze(-1) + found * share)
            own.copy_(both)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scaling, ctx.layout = scaling, layout
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        scaling, layout = ctx.scaling, ctx.layout
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for where in layout.long:
            part = [x[:, :, where] for x in (grad, query, key, value, out, lse)]
            for target, found in zip(grads, attend_backward(*part, 0.0, True, scale=scaling), strict=True):
                target[:, :, where] = found
        for short in layout.stacks:
            part = [stack(x, short) for x in (grad, query, key, value, out, lse)]
            for target, found in zip(grads, attend_backward(*part, 0.0, True, scale=scaling), strict=True):
                unstack(target, short, found)
        for prefix, branches in layout.families:
            part = [grad[:, :, branches], query[:, :, branches], key[:, :, prefix], value[:, :, prefix]]
            part += [out[:, :, branches], lse[:, :, branches]]
            found = attend_backward(*part, 0.0, False, scale=scaling)
            for target, where, more in zip(grads, (branches, prefix, prefix), found, strict=True):
                target[:, :, where] += more
        return *grads, None, None


def stack(x: Tensor, short: Stack) -> Tensor:
    """(1, heads, T, …) -> (n, heads, L, …), 0 where there is padding."""
    parts = x[0].index_select(1, short.index.flatten()).unflatten(1, short.index.shape).transpose(0, 1)
    if short.real is None:
        return parts
    return parts * short.real.to(x.dtype).view(len(short.index), 1, -1, *[1] * (x.dim() - 3))


def unstack(target: Tensor, short: Stack, parts: Tensor) -> None:
    """Write (n, heads, L, …) to (1, heads, T, …) where they came from."""
    flat, where = parts.transpose(0, 1).flatten(1, 2), short.index.flatten()
    if short.kept is not None:
        where, flat = where[short.kept], flat.index_select(1, short.kept)
    target[0].index_copy_(1, where, flat.to(target.dtype))


def visible(spans: Sequence[Span]) -> Iterator[np.ndarray]:
    """For each token the packed indices that it attends to; slow, for tests."""
    for start, length, parent in spans:
        head = np.arange(spans[parent].start, spans[parent].start + spans[parent].length)
        for i in range(start, start + length):
            own = np.arange(start, i + 1)
            yield own if spans[parent].start == start else np.concatenate([head, own])
