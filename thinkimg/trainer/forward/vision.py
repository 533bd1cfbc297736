"""Vision attention over all chunks of one length in one call; transformers makes a call per window and image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from thinkimg.trainer.forward.attention import use_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers hands cu_seqlens to an attention function with "flash" in its name; others it calls chunk by chunk.
NAME = "thinkimg_flash_equal_chunks"


def batch_equal_chunks(model: "PreTrainedModel") -> None:
    """Let a vision tower attend by `attend_chunks`."""
    use_attention(model.model.visual.config, NAME, attend_chunks)


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
    """Attend fully within each chunk [cu[i], cu[i + 1]).

    query, key, value: (1, heads, S, d); returns (1, S, heads, d). The remaining arguments are those that transformers
    gives to flash attention: no dropout, not causal.
    """
    assert attention_mask is None
    lengths = cu_seq_lens_q.diff()
    distinct = lengths.unique().tolist()
    stacked = torch.stack([query[0], key[0], value[0]]).transpose(1, 2)  # (3, S, heads, d)
    if len(distinct) == 1:
        return attend_equal(stacked, distinct[0], scaling)[None], None
    per_token = lengths.repeat_interleave(lengths)
    indices = [torch.nonzero(per_token == length).squeeze(1) for length in distinct]
    return attend_lengths(stacked, indices, distinct, scaling)[None], None


def attend_lengths(qkv: Tensor, indices: Sequence[Tensor], lengths: Sequence[int], scaling: float) -> Tensor:
    """Attend within chunks of several lengths: qkv (3, S, heads, d) -> (S, heads, d).

    indices: for each length, those of its chunks' tokens.
    """
    parts = [attend_equal(qkv[:, index], length, scaling) for index, length in zip(indices, lengths, strict=True)]
    return torch.cat(parts)[torch.argsort(torch.cat(list(indices)))]


def attend_equal(qkv: Tensor, length: int, scaling: float) -> Tensor:
    """Attend within chunks of one length: qkv (3, n * length, heads, d) -> (n * length, heads, d)."""
    query, key, value = qkv.unflatten(1, (-1, length)).transpose(2, 3)  # each (n, heads, length, d)
    out = scaled_dot_product_attention(query, key, value, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)
