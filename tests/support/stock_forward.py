"""A model's forward pass by transformers alone, one row at a time: it finds the positions itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from thinkimg.trainer.forward.modules import get_base_model, unwrap
from thinkimg.trainer.forward.packed_attention import use_packed_attention
from thinkimg.trainer.forward.packing import Conversation
from thinkimg.trainer.forward.vision import batch_equal_chunks

REPLACED = "_deepstack_process"  # families/qwen3_vl.py


@contextmanager
def stock(model) -> Iterator[None]:
    """Take back what the trainer replaces in a model: attention of text and images, and a family's own."""
    inner = get_base_model(model)
    configs = (inner.visual.config, inner.language_model.config)
    own = vars(inner.language_model).pop(REPLACED, None)
    for config in configs:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        batch_equal_chunks(unwrap(model))
        use_packed_attention(unwrap(model))
        if own is not None:
            setattr(inner.language_model, REPLACED, own)


def stock_logits(model, row: Conversation, pixels: Callable[[str], np.ndarray]) -> torch.Tensor:
    """Logits (T, vocabulary) of a row."""
    tokens = torch.from_numpy(row.tokens)[None]
    images = {}
    if row.images:
        flat = torch.from_numpy(np.concatenate([pixels(key) for key in row.images]))
        images = {"pixel_values": flat, "image_grid_thw": torch.from_numpy(row.grids)}
    kinds = (tokens == unwrap(model).config.image_token_id).int()
    with stock(model):
        return model(input_ids=tokens, mm_token_type_ids=kinds, **images).logits[0]


def stock_logps(model, row: Conversation, pixels: Callable[[str], np.ndarray]) -> torch.Tensor:
    """Log-probabilities of the scored tokens of a row."""
    column = torch.from_numpy(np.flatnonzero(row.scored))
    logps = stock_logits(model, row, pixels)[:-1].log_softmax(-1)
    return logps[column - 1].gather(1, torch.from_numpy(row.tokens)[column, None]).squeeze(1)
