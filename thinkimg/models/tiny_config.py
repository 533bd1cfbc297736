"""Parts of a tiny model's config that families share."""

from collections.abc import Mapping
from typing import Any

from thinkimg.models.settings import TinyModel


def text_shape(tiny: TinyModel, ids: Mapping[str, int], key_heads: int) -> dict[str, Any]:
    """Return the settings of a tiny language model but its positions. ids: as Family.make_config."""
    return {
        "vocab_size": max(ids.values()) + 1,
        "hidden_size": tiny.hidden_size,
        "intermediate_size": 2 * tiny.hidden_size,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }


def token_ids(ids: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of the tokens around and within images."""
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
