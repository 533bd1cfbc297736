"""Parts of a model below a head and peft's wrappers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unwrap(model: "PreTrainedModel"):
    """Return the Qwen2_5_VLForConditionalGeneration below peft's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def get_base_model(model: "PreTrainedModel"):
    """Return the Qwen2_5_VLModel (visual + language_model) below a head and, with LoRA, below peft's wrappers."""
    return unwrap(model).model
