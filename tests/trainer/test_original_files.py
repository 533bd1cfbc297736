"""Files in the formats of Qwen/Qwen2.5-VL-7B-Instruct itself: flat config.json, old names, bfloat16, own head.

Its heads are grouped, seven to one, as no tiny model's are.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from grpo_world import FULL, LORA
from safetensors.torch import load_file, save_file

from thinkimg.models.base import Base
from thinkimg.trainer import checkpoint, checksums, weight_files
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.modules import unwrap
from thinkimg.trainer.forward.packing import Conversation, ImageToken
from thinkimg.trainer.forward.shared_prompts import Unit, count_common_prefix
from thinkimg.trainer.ranks import Ranks

HEADS, GROUPS, HEAD_DIM, VOCABULARY = 14, 2, 8, 300
HIDDEN = HEADS * HEAD_DIM
IMAGE = 255
CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 243,
    "eos_token_id": 245, "vision_start_token_id": 252, "vision_end_token_id": 253, "vision_token_id": 254,
    "image_token_id": IMAGE, "video_token_id": 256, "hidden_act": "silu", "hidden_size": HIDDEN,
    "initializer_range": 0.02, "intermediate_size": 2 * HIDDEN, "max_position_embeddings": 128000,
    "max_window_layers": 28, "model_type": "qwen2_5_vl", "num_attention_heads": HEADS, "num_hidden_layers": 2,
    "num_key_value_heads": GROUPS, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True,
    "use_sliding_window": False, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "vision_config": {
        "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_chans": 3,
        "out_hidden_size": HIDDEN, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
    "vocab_size": VOCABULARY,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    path = tmp_path_factory.mktemp("original")
    (path / "config.json").write_text(json.dumps(CONFIG))
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
    return path


MODELS = {"full": FULL, "lora": LORA, "bf16": LORA.model_copy(update={"dtype": "bfloat16"})}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_weight_is_loaded_and_of_a_grouped_head_packing_is_padding(directory, model):
    policy = checkpoint.start_from_base(Base("original", directory=str(directory)), model, "cpu", seed=0)
    checksums.verify(policy, checksums.compute_expected(policy, Ranks()), Ranks())
    files = load_file(directory / "model.safetensors")
    sources = weight_files.locate(policy)
    assert {source.key for source in sources.values()} == files.keys() and "lm_head.weight" in files
    config = unwrap(policy.model).config
    assert (config.text_config.num_attention_heads, config.text_config.num_key_value_heads) == (HEADS, GROUPS)
    assert not config.tie_word_embeddings
    rng = np.random.default_rng(0)
    grid = np.array([[1, 4, 6]])
    prompt = [1, 252, *[IMAGE] * 6, 253, *rng.integers(1, 240, 20)]
    rows = []
    for length in (5, 9):
        tokens = np.array([*prompt, *rng.integers(1, 240, length)])
        rows.append(Conversation(tokens, np.arange(len(tokens)) >= len(prompt), ("a",), grid))
    patches = rng.normal(size=(24, 1176)).astype(np.float32)
    scorer = Scorer(policy.model, lambda key: patches, temperature=1.0, banned=(), features={})
    units = [Unit((0, 1), count_common_prefix(*rows, ImageToken(IMAGE, 2)))]
    assert units[0].prefix == len(prompt)
    with torch.no_grad(), policy.autocast():
        padded, packed = scorer(rows)[0], scorer(rows, units)[0]
    bound = 0.05 if model.dtype == "bfloat16" else 1e-5
    torch.testing.assert_close(packed, padded, atol=bound, rtol=bound)
    assert len(padded) == 14 and padded.std() > 0.1
