"""Qwen3-VL: DeepStack features in the first decoder layers, interleaved positions, positions in thousandths."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from thinkimg.images.patches import TEMPORAL, ImageProcessor
from thinkimg.importing import importing
from thinkimg.models.family import Family
from thinkimg.models.settings import TinyModel
from thinkimg.models.tiny_config import text_shape, token_ids
from thinkimg.records import Coordinates

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

SPREAD = 0.25  # standard deviation of a tiny model's norms and biases


class Qwen3_VL(Family):
    """Qwen3-VL 2B to 32B, Instruct and Thinking (arXiv 2511.21631)."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    hub_names = r"qwen3-vl-"
    processor = ImageProcessor(patch=16, merge=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    processor_class = "Qwen3VLProcessor"
    coordinates = Coordinates.THOUSANDTHS
    protocols = ("qwen", "think")

    def compute_features(self, visual: Any, patches: "Tensor", grids: "Tensor") -> "Tensor":
        import torch

        out = visual(patches, grid_thw=grids)
        return torch.cat([out.pooler_output, *out.deepstack_features], dim=-1)  # as vLLM lays them out

    def prepare(self, model: Any) -> None:
        model.model.language_model._deepstack_process = add_level

    def language_inputs(self, features: "Tensor", index: "Tensor", hidden_size: int) -> tuple["Tensor", dict[str, Any]]:
        embedded, *levels = features.split(hidden_size, dim=-1)
        return embedded, {"visual_pos_masks": index, "deepstack_visual_embeds": levels}

    def feature_width(self, config: "PretrainedConfig") -> int:
        vision = config.vision_config
        return vision.out_hidden_size * (1 + len(vision.deepstack_visual_indexes))

    def tower_inputs(self, visual: Any, patches: int) -> dict[str, Any]:
        return super().tower_inputs(visual, patches) | interpolation_inputs(patches)

    def make_config(self, tiny: TinyModel, ids: Mapping[str, int]) -> "PretrainedConfig":
        with importing:
            from transformers import Qwen3VLConfig

        head_dim, depth = tiny.hidden_size // tiny.heads, tiny.vision_layers
        levels = range(max(0, depth - 3), max(depth - 1, min(depth, 2)))  # two, before the last layer if it has three
        return Qwen3VLConfig(
            text_config=text_config(tiny, ids, rotary_dim=head_dim) | {"head_dim": head_dim},
            vision_config=vision_config(tiny, self.processor) | {"deepstack_visual_indexes": [*levels]},
            tie_word_embeddings=True,
            **token_ids(ids),
        )

    def init_tiny(self, model: "PreTrainedModel") -> None:
        spread_vectors(model)


def add_level(states: "Tensor", images: "Tensor", features: "Tensor") -> "Tensor":
    """Return hidden states (B, T, hidden) with a DeepStack level added to those of image tokens.

    images: (tokens,) int64, indices in the flattened batch; or a mask (B, T), as transformers calls it. It adds by
    mask: a GPU is waited for to count it, and tensors without data have no count (trainer/memory.py).
    """
    index = images if images.dim() == 1 else images.flatten().nonzero().squeeze(1)
    return states.flatten(0, 1).index_add(0, index, features.to(states.dtype)).view_as(states)


def interpolation_inputs(patches: int) -> dict[str, Any]:
    """Return stand-ins for the learned positions that the tower interpolates: four neighbours of each patch."""
    import torch

    return {
        "interp_indices": torch.zeros(patches, 4, dtype=torch.int64),
        "interp_weights": torch.zeros(patches, 4),
    }


def spread_vectors(model: "PreTrainedModel") -> None:
    """Draw norms and biases around their values, in place, so that leaving one out changes the output."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=SPREAD)


def text_config(tiny: TinyModel, ids: Mapping[str, int], rotary_dim: int) -> dict[str, Any]:
    """Return the settings of a tiny language model with grouped key heads and interleaved positions.

    rotary_dim: the part of a head that turns with positions.
    """
    width = rotary_dim // 2 // 3  # as in Qwen3-VL's [24, 20, 20] of 64; vLLM wants their sum to be half of rotary_dim
    return text_shape(tiny, ids, key_heads=max(1, tiny.heads // 2)) | {
        # With Qwen's own theta a tiny model cannot distinguish columns, see qwen2_5_vl.py.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": tiny.rope_theta,
            "mrope_section": [rotary_dim // 2 - 2 * width, width, width],
            "mrope_interleaved": True,
        },
    }


def vision_config(tiny: TinyModel, processor: ImageProcessor) -> dict[str, Any]:
    """Return the settings of a tiny vision tower with full attention and learned positions."""
    return {
        "depth": tiny.vision_layers,
        "hidden_size": tiny.vision_hidden_size,
        "intermediate_size": 2 * tiny.vision_hidden_size,
        "num_heads": tiny.vision_heads,
        "out_hidden_size": tiny.hidden_size,
        "patch_size": processor.patch,
        "spatial_merge_size": processor.merge,
        "temporal_patch_size": TEMPORAL,
        "num_position_embeddings": 64,
    }


FAMILY = Qwen3_VL()
