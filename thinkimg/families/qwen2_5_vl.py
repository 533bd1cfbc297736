"""Qwen2.5-VL: windowed vision tower, positions in pixels, no tools in its own chat template."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from thinkimg.images.patches import TEMPORAL, ImageProcessor
from thinkimg.importing import importing
from thinkimg.models.family import Family
from thinkimg.models.settings import TinyModel
from thinkimg.models.tiny_config import text_shape, token_ids
from thinkimg.records import Coordinates

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen2_5_VL(Family):
    """Qwen2.5-VL 3B to 72B (arXiv 2502.13923)."""

    model_types = ("qwen2_5_vl",)
    hub_names = r"qwen2\.5-vl-"
    processor = ImageProcessor(
        patch=14,
        merge=2,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    processor_class = "Qwen2_5_VLProcessor"
    coordinates = Coordinates.PIXELS
    attention_layer = 22  # of the 7B's 28, by `thinkimg calibrate attention`
    protocols = ("think", "qwen")

    def tower_inputs(self, visual: Any, patches: int) -> dict[str, Any]:
        import torch

        inputs = super().tower_inputs(visual, patches)
        windows = {"cu_window_seqlens": inputs["cu_seqlens"], "max_window_seqlen": 1}
        return inputs | windows | {"window_index": torch.arange(patches // self.processor.merge**2)}

    def make_config(self, tiny: TinyModel, ids: Mapping[str, int]) -> "PretrainedConfig":
        with importing:
            from transformers import Qwen2_5_VLConfig

        head_dim = tiny.hidden_size // tiny.heads
        temporal = head_dim // 8  # as in Qwen2.5-VL's [16, 24, 24] of 64
        height = (head_dim // 2 - temporal) // 2
        return Qwen2_5_VLConfig(
            text_config=text_shape(tiny, ids, key_heads=tiny.heads)
            | {
                # Qwen's theta of 1e6 gives the width axis frequencies below 2e-4: with four tokens per row a tiny model
                # cannot distinguish columns. With a small theta it can read an absolute position.
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": tiny.rope_theta,
                    "mrope_section": [temporal, height, head_dim // 2 - temporal - height],
                },
            },
            vision_config={
                "depth": tiny.vision_layers,
                "hidden_size": tiny.vision_hidden_size,
                "intermediate_size": 2 * tiny.vision_hidden_size,
                "num_heads": tiny.vision_heads,
                "out_hidden_size": tiny.hidden_size,
                "patch_size": self.processor.patch,
                "spatial_merge_size": self.processor.merge,
                "temporal_patch_size": TEMPORAL,
                "window_size": 112,
                "fullatt_block_indexes": [tiny.vision_layers - 1],
            },
            tie_word_embeddings=True,
            **token_ids(ids),
        )


FAMILY = Qwen2_5_VL()
