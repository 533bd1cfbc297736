"""A miniature in the formats of Qwen/Qwen2.5-VL-7B-Instruct itself: flat config.json, old names, bfloat16, own head.

Its heads are grouped, seven to one, as no tiny model's are.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HEADS, GROUPS = 14, 2


def original_config(head_dim: int, vocabulary: int, ids: dict[str, int]) -> dict:
    """Return the content of config.json. ids: of the special tokens, as `image_token_id`."""
    temporal, hidden = head_dim // 8, HEADS * head_dim  # as in the original's [16, 24, 24] of 64
    height = (head_dim // 2 - temporal) // 2
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": 2 * hidden,
        "max_position_embeddings": 128000, "max_window_layers": 28, "model_type": "qwen2_5_vl",
        "num_attention_heads": HEADS, "num_hidden_layers": 2, "num_key_value_heads": GROUPS, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [temporal, height, head_dim // 2 - temporal - height]},
        "vision_config": {
            "depth": 2, "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
            "in_chans": 3, "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "vocab_size": vocabulary,
    } | ids  # fmt: skip


def write_original(path: Path, head_dim: int, vocabulary: int, ids: dict[str, int]) -> None:
    """Write config.json and model.safetensors of random weights."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    (path / "config.json").write_text(json.dumps(original_config(head_dim, vocabulary, ids)))
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(path))
    weights = {}
    for name, value in model.state_dict().items():
        old = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        scale = value[0].numel() ** -0.5 if value.dim() > 1 else 0.1
        weights[old] = (1 + scale * torch.randn_like(value) if "norm" in name else scale * torch.randn_like(value)).to(
            torch.bfloat16
        )
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
