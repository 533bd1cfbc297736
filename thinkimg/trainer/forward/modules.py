"""Parts of a model below a head and peft's wrappers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def unwrap(model: "PreTrainedModel"):
    """Return the model with its head below peft's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def get_head_dim(text_config: "PretrainedConfig") -> int:
    """Return the width of an attention head, which some configs state and others leave to a division."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def get_base_model(model: "PreTrainedModel"):
    """Return the model (visual + language_model) below a head and, with LoRA, below peft's wrappers."""
    return unwrap(model).model
