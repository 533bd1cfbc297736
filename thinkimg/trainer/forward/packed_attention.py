"""Attention over packed rows: each span looks at itself, causally, and at its parent.

On a CPU a span's attention to itself and to its parent are two calls of PyTorch's flash attention. They are merged by
their log-sum-exps, as in ring attention (arXiv 2310.01889). The backward pass of each piece is the kernel's own, given
the merged output and log-sum-exp. No key or value is copied for a row, and nothing is computed to be masked out.
On a GPU it is one FlexAttention call over a block mask (flex.py).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from thinkimg.trainer.forward import flex
from thinkimg.trainer.forward.attention import Reader, use_attention
from thinkimg.trainer.forward.shared_prompts import Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "thinkimg_packed"
SHORT, STEP = 128, 16  # spans up to SHORT tokens are stacked, padded to a multiple of STEP: else calls outweigh work
attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Stack(NamedTuple):
    """Short spans that are computed as one batch, padded."""

    index: Tensor
    """(n, L) int64: packed indices of their tokens."""
    real: Tensor | None
    """(n, L) bool: False at padding; None: there is none."""
    real_index: Tensor | None
    """Positions of `real` in the flattened index; None: there is no padding."""


class Layout:
    """Spans of a packed batch, as the attention function takes them; one for all layers and both passes."""

    def __init__(self, spans: Sequence[Span], device: torch.device, *, grouped: bool = False):
        """grouped: several query heads share a key head without a copy, as on a GPU; for memory.py."""
        self.spans, self.device, self.grouped = spans, device, grouped

    @cached_property
    def families(self) -> list[tuple[slice, slice]]:
        """Slices (prefix, all its branches) of each prefix that has branches."""
        families = []
        for number, (start, length, parent) in enumerate(self.spans):
            children = [span for span in self.spans[number + 1 :] if span.parent == number] if parent == number else []
            if children and length:
                families.append((slice(start, start + length), slice(children[0].start, sum(children[-1][:2]))))
        return families

    @cached_property
    def stacks(self) -> list[Stack]:
        """Spans of up to SHORT tokens, by padded length."""
        by_length: dict[int, list[Span]] = {}
        for span in self.spans:
            if 0 < span.length <= SHORT:
                by_length.setdefault(-(-span.length // STEP) * STEP, []).append(span)
        return [self._stack(spans) for spans in by_length.values()]

    @cached_property
    def long(self) -> list[slice]:
        """Spans of more than SHORT tokens."""
        return [slice(span.start, span.start + span.length) for span in self.spans if span.length > SHORT]

    def _stack(self, spans: list[Span]) -> Stack:
        lengths = np.array([span.length for span in spans])
        columns = np.arange(lengths.max())
        index = np.array([span.start for span in spans])[:, None] + np.minimum(columns, lengths[:, None] - 1)
        real = columns < lengths[:, None]
        if real.all():
            return Stack(torch.from_numpy(index), None, None)
        return Stack(torch.from_numpy(index), torch.from_numpy(real), torch.from_numpy(np.flatnonzero(real)))

    @cached_property
    def block_mask(self):
        return flex.build_block_mask(self.spans, self.device)


def use_packed_attention(model: "PreTrainedModel") -> None:
    """Let a language model attend by `attend_packed`."""
    use_attention(model.model.language_model.config, NAME, attend_packed)


def attend_packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    reader: Reader | None = None,
    **rest: object,
) -> tuple[Tensor, None]:
    """Attend within a packed batch, or without a layout as "sdpa" does.

    query (B, heads, T, d), key and value (B, kv heads, T, d) -> (B, T, heads, d).
    layout, reader: from the language model's caller, by way of transformers. The reader reads query and key first.
    """
    if reader is not None:
        reader.read(module.layer_idx, query, key, scaling)
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    assert len(query) == 1 and not rest.get("dropout"), "a packed batch is one sequence, without dropout"
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary positions make float32 of them
    if flex.is_used(value.device):
        return flex.attend_blocks(query, key, value, layout.block_mask, scaling).transpose(1, 2), None
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and not layout.grouped:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return PackedAttention.apply(query, key, value, scaling, layout).transpose(1, 2), None


class PackedAttention(torch.autograd.Function):
    """Attention of packed spans on a CPU: query, key, value (1, heads, T, d) -> (1, heads, T, d)."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Layout) -> Tensor:
        # (T, heads, d) in memory, so that the caller's transpose back costs nothing.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        if query.dtype == torch.float64:
            lse = lse.double()
        for span in layout.long:
            part = [x[:, :, span] for x in (query, key, value)]
            out[:, :, span], lse[:, :, span] = attend(*part, 0.0, True, scale=scaling)
        for short in layout.stacks:
            short_out, short_lse = attend(*(stack(x, short) for x in (query, key, value)), 0.0, True, scale=scaling)
            unstack(out, short, short_out)
            unstack(lse, short, short_lse)
        for prefix, branches in layout.families:
            parent = attend(query[:, :, branches], key[:, :, prefix], value[:, :, prefix], scale=scaling)
            own_out, own_lse = out[:, :, branches], lse[:, :, branches]
            total = torch.logaddexp(own_lse, parent[1])
            share = (parent[1] - total).exp().unsqueeze(-1)
            own_out.copy_(own_out * (own_lse - total).exp().unsqueeze(-1) + parent[0] * share)
            own_lse.copy_(total)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scaling, ctx.layout = scaling, layout
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        scaling, layout = ctx.scaling, ctx.layout
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for span in layout.long:
            part = [x[:, :, span] for x in (grad, query, key, value, out, lse)]
            for target, values in zip(grads, attend_backward(*part, 0.0, True, scale=scaling), strict=True):
                target[:, :, span] = values
        for short in layout.stacks:
            part = [stack(x, short) for x in (grad, query, key, value, out, lse)]
            for target, values in zip(grads, attend_backward(*part, 0.0, True, scale=scaling), strict=True):
                unstack(target, short, values)
        for prefix, branches in layout.families:
            part = [grad[:, :, branches], query[:, :, branches], key[:, :, prefix], value[:, :, prefix]]
            part += [out[:, :, branches], lse[:, :, branches]]
            parents = attend_backward(*part, 0.0, False, scale=scaling)
            for target, span, values in zip(grads, (branches, prefix, prefix), parents, strict=True):
                target[:, :, span] += values
        return *grads, None, None


def stack(x: Tensor, short: Stack) -> Tensor:
    """Return the spans of a stack: (1, heads, T, …) -> (n, heads, L, …), 0 at padding."""
    parts = x[0].index_select(1, short.index.flatten()).unflatten(1, short.index.shape).transpose(0, 1)
    if short.real is None:
        return parts
    return parts * short.real.to(x.dtype).view(len(short.index), 1, -1, *[1] * (x.dim() - 3))


def unstack(target: Tensor, short: Stack, parts: Tensor) -> None:
    """Write the spans of a stack back: (n, heads, L, …) into (1, heads, T, …)."""
    flat, index = parts.transpose(0, 1).flatten(1, 2), short.index.flatten()
    if short.real_index is not None:
        index, flat = index[short.real_index], flat.index_select(1, short.real_index)
    target[0].index_copy_(1, index, flat.to(target.dtype))
