"""Choice of a model's attention function, and a reader of its attention."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHUNK = 64  # query rows whose attention exists at once: 28 heads x 64 x 2,800 tokens are 20 MB


def use_attention(config, name: str, attend: Callable[..., tuple[Tensor, None]]) -> None:
    """Let the layers of a text or vision config attend by a function; nothing of it is saved with the model.

    transformers looks functions up by name.
    Masks are those of "sdpa": none for a causal model with padding on the right.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    config._attn_implementation = name


class StopForward(Exception):
    """Signal that the last of the requested layers has been read."""


class Reader:
    """Reader of one batch's attention at N query rows, mean over heads; packed_attention.attend_packed calls it."""

    def __init__(self, layers: Sequence[int], row: Tensor, column: Tensor, *, stop: bool = True):
        """row, column: (N,) each, the query rows, by row. stop: leave the forward pass after the last of the layers."""
        self.layers, self.row, self.column, self.stop = set(layers), row, column, stop
        self.attention: dict[int, Tensor] = {}
        """(N, T) float32 by layer."""

    def read(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Read a layer if it is requested. query (B, H, T, d), key (B, H_kv, T, d), rotary positions applied."""
        if layer not in self.layers:
            return
        groups = query.shape[1] // key.shape[1]
        parts = []
        positions = torch.arange(key.shape[2], device=key.device)
        for rows, columns in zip(self.row.split(CHUNK), self.column.split(CHUNK), strict=True):
            for b in rows.unique().tolist():  # ascending, as the rows are
                own = columns[rows == b]
                q = query[b, :, own].float()  # (H, n, d)
                k = key[b].float().repeat_interleave(groups, dim=0)  # (H, T, d)
                with torch.autocast(query.device.type, enabled=False):  # within it the product would be rounded
                    scores = (q @ k.transpose(1, 2)) * scaling
                    scores = scores.masked_fill(positions > own[:, None], float("-inf"))
                    parts.append(scores.softmax(-1).mean(0))
        self.attention[layer] = torch.cat(parts)
        if self.stop and self.layers <= self.attention.keys():
            raise StopForward
