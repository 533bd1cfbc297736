"""Vision attention over all chunks of one length in one call, instead of transformers' call per window and image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers hands cu_seqlens to an attention function if its name has "flash" in it, else it calls it chunk by chunk.
NAME = "thinkimg_flash_equal_chunks"


def batch_equal_chunks(model: "PreTrainedModel") -> None:
    """Let the vision tower of a Qwen2.5-VL attend by `attend_chunks`; nothing of it is saved with the model."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend_chunks)
    model.model.visual.config._attn_implementation = NAME


def attend_chunks(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_: object,
) -> tuple[Tensor, None]:
    """Full attention within each chunk [cu[i], cu[i + 1]). query, key, value: (1, heads, S, d); returns (1, S, heads, d).

    The remaining arguments are those that transformers gives to flash attention: no dropout, not causal.
    """
    assert attention_mask is None
    lengths = cu_seq_lens_q.diff()
    distinct = lengths.unique().tolist()
    stacked = torch.stack([query[0], key[0], value[0]]).transpose(1, 2)  # (3, S, heads, d)
    if len(distinct) == 1:
        return attend_equal(stacked, distinct[0], scaling)[None], None
    per_token = lengths.repeat_interleave(lengths)
    where = [torch.nonzero(per_token == length).squeeze(1) for length in distinct]
    return attend_several(stacked, where, distinct, scaling)[None], None


def attend_several(qkv: Tensor, where: Sequence[Tensor], lengths: Sequence[int], scaling: float) -> Tensor:
    """qkv (3, S, heads, d); where: for each of the lengths the indices of its chunks' tokens. Returns (S, heads, d)."""
    parts = [attend_equal(qkv[:, index], length, scaling) for index, length in zip(where, lengths, strict=True)]
    back = torch.argsort(torch.cat(list(where)))
    return torch.cat(parts)[back]


def attend_equal(qkv: Tensor, length: int, scaling: float) -> Tensor:
    """qkv (3, n * length, heads, d) -> (n * length, heads, d)."""
    query, key, value = qkv.unflatten(1, (-1, length)).transpose(2, 3)  # each (n, heads, length, d)
    out = scaled_dot_product_attention(query, key, value, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)
