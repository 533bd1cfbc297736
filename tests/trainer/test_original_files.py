"""Files in the formats of Qwen/Qwen2.5-VL-7B-Instruct itself, and its grouped heads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from grpo_world import FULL, LORA
from original_base import GROUPS, HEADS, write_original
from safetensors.torch import load_file

from thinkimg.models.base import Base
from thinkimg.trainer import checkpoint, checksums, weight_files
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.modules import unwrap
from thinkimg.trainer.forward.packing import Conversation, ImageToken
from thinkimg.trainer.forward.shared_prompts import Unit, count_common_prefix
from thinkimg.trainer.ranks import Ranks

IMAGE = 255
IDS = {
    "bos_token_id": 243, "eos_token_id": 245, "vision_start_token_id": 252, "vision_end_token_id": 253,
    "vision_token_id": 254, "image_token_id": IMAGE, "video_token_id": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original")
    write_original(path, 8, 300, IDS)
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
