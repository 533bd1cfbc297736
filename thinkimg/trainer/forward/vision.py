"""Vision attention over all chunks of one length in one call; transformers makes a call per window and image.

What follows from the grids alone is computed on the host, so that no block waits for a GPU's queue:

    grids ─► positions, windows, interpolation, bounds of chunks    once per call of the tower
    bounds ─► Chunks                                                by the first block that has these bounds
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from thinkimg.trainer.forward.attention import use_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers hands cu_seqlens to an attention function with "flash" in its name; others it calls chunk by chunk.
NAME = "thinkimg_flash_equal_chunks"


class Chunks(NamedTuple):
    """Chunks of a sequence that attend to themselves, by their distinct lengths."""

    bounds: Tensor
    """Cumulative lengths as transformers has them, (chunks + 1,); held so that no other tensor gets its id."""
    lengths: Sequence[int]
    indices: Sequence[Tensor]
    """For each length those of its chunks' tokens; none if there is one length."""
    order: Tensor | None
    """(S,) that puts tokens by length back in sequence; None if there is one length."""

    @classmethod
    def of(cls, bounds: Tensor, device: torch.device) -> "Chunks":
        """Return the chunks of their bounds, with indices on a device. Waits for the device of `bounds`."""
        per_chunk = bounds.cpu().diff().long()
        lengths = per_chunk.unique().tolist()
        if len(lengths) == 1:
            return cls(bounds, lengths, (), None)
        per_token = per_chunk.repeat_interleave(per_chunk)
        indices = [torch.nonzero(per_token == length).squeeze(1) for length in lengths]
        order = torch.argsort(torch.cat(indices))
        on_device = [index.to(device, non_blocking=True) for index in (*indices, order)]
        return cls(bounds, lengths, on_device[:-1], on_device[-1])


def batch_equal_chunks(model: "PreTrainedModel") -> None:
    """Let a vision tower attend by `attend_chunks`, and take what it needs for it from `prepare_inputs`."""
    visual = model.model.visual
    use_attention(visual.config, NAME, attend_chunks)
    visual.forward = partial(run_tower, visual)


def run_tower(visual: "PreTrainedModel", patches: Tensor, grid_thw: Tensor, **options: object):
    """Run a tower's own forward pass, with prepared inputs if it attends by `attend_chunks`."""
    if visual.config._attn_implementation == NAME:
        grid_thw = grid_thw.cpu()
        options = prepare_inputs(visual, grid_thw, patches.device) | {"chunks": {}} | options
    return type(visual).forward(visual, patches, grid_thw, **options)


def prepare_inputs(visual: "PreTrainedModel", grids: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Return what a tower would compute of the grids: on the device, and bounds of chunks on the host.

    grids: (images, 3) int64, on the host. Bounds that the tower makes of these itself are on the host, too.
    """
    from transformers import vision_utils

    bounds: dict[str, Tensor] = {}
    inputs = {"position_ids": vision_utils.get_vision_position_ids(grids, visual.spatial_merge_size)}
    if hasattr(visual, "window_size"):
        sizes = {name: getattr(visual, name) for name in ("spatial_merge_size", "window_size", "patch_size")}
        inputs["window_index"], bounds["cu_window_seqlens"] = vision_utils.get_vision_window_index(grids, **sizes)
    if hasattr(visual, "interpolation_mode"):  # learned positions
        taps = vision_utils.get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.spatial_merge_size,
        )
        inputs |= zip(("interp_indices", "interp_weights"), taps, strict=True)
    return bounds | {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def attend_chunks(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    chunks: dict[int, Chunks],
    **_: object,
) -> tuple[Tensor, None]:
    """Attend fully within each chunk [cu[i], cu[i + 1]).

    query, key, value: (1, heads, S, d); returns (1, S, heads, d).
    chunks: those that earlier blocks have found, by the id of cu_seq_lens_q. The remaining arguments are those that
    transformers gives to flash attention: no dropout, not causal.
    """
    assert attention_mask is None
    own = chunks.get(id(cu_seq_lens_q))
    if own is None:
        own = chunks[id(cu_seq_lens_q)] = Chunks.of(cu_seq_lens_q, query.device)
    stacked = torch.stack([query[0], key[0], value[0]]).transpose(1, 2)  # (3, S, heads, d)
    if own.order is None:
        return attend_equal(stacked, own.lengths[0], scaling)[None], None
    return attend_lengths(stacked, own.indices, own.lengths, own.order, scaling)[None], None


def attend_lengths(
    qkv: Tensor, indices: Sequence[Tensor], lengths: Sequence[int], order: Tensor, scaling: float
) -> Tensor:
    """Attend within chunks of several lengths: qkv (3, S, heads, d) -> (S, heads, d).

    indices: for each length, those of its chunks' tokens. order: (S,) that puts these back in sequence.
    """
    parts = [attend_equal(qkv[:, index], length, scaling) for index, length in zip(indices, lengths, strict=True)]
    return torch.cat(parts)[order]


def attend_equal(qkv: Tensor, length: int, scaling: float) -> Tensor:
    """Attend within chunks of one length: qkv (3, n * length, heads, d) -> (n * length, heads, d)."""
    query, key, value = qkv.unflatten(1, (-1, length)).transpose(2, 3)  # each (n, heads, length, d)
    out = scaled_dot_product_attention(query, key, value, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)
