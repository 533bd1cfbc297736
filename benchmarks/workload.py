"""Model and groups that train_step.py and trl_step.py measure: random weights, lengths that vary as rollouts' do."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from thinkimg.models.base import Base
from thinkimg.models.family import load_family
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer.forward.packed_attention import use_packed_attention
from thinkimg.trainer.forward.packing import Conversation, ImageToken
from thinkimg.trainer.forward.vision import batch_equal_chunks
from thinkimg.trainer.policy import PolicyModel, lighten_adapter, match_language_linears, train_only

IMAGE, BEGIN, END, PAD = 3, 4, 5, 0  # ids of the pad of an image, what stands around it, and padding
PROCESSOR = load_family("qwen2_5_vl").processor
IMAGE_TOKEN = ImageToken(IMAGE, PROCESSOR.merge)


@dataclass(frozen=True)
class Geometry:
    """Model and lengths: the prompt's image and the tools' in tokens (rows, columns), texts and answers in tokens."""

    text: dict
    vision: dict
    lora_rank: int
    prompt_image: tuple[int, int]
    prompt_text: int
    tool_image: tuple[int, int]
    sampled: int
    groups: int
    budget: int
    dtype: str


TINY = Geometry(  # thinkimg's preset `tiny`, and lengths a quarter of the 7B's
    text={
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
    },
    vision={
        "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
        "fullatt_block_indexes": [3],
    },
    lora_rank=8, prompt_image=(10, 25), prompt_text=50, tool_image=(10, 15), sampled=100, groups=4, dtype="float32",
    budget=2048,  # 4,096 is no faster on two cores, and takes 0.6 of the stock step's memory instead of 0.35
)  # fmt: skip
SEVEN_B = Geometry(  # Qwen2.5-VL-7B's config.json, and the workload of its GRPO: 1,000 + 200, two of 600, 400 sampled
    text={
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    vision={
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    lora_rank=64, prompt_image=(25, 40), prompt_text=200, tool_image=(20, 30), sampled=400, groups=4, budget=16384,
    dtype="bfloat16",
)  # fmt: skip
GEOMETRIES = {"tiny": TINY, "7b": SEVEN_B}


def config_of(geometry: Geometry):
    """Qwen2_5_VLConfig."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config=geometry.text | {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": 1},
        vision_config=geometry.vision
        | {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112},
        image_token_id=IMAGE, video_token_id=2, vision_start_token_id=BEGIN, vision_end_token_id=END,
        tie_word_embeddings=geometry.text["tie_word_embeddings"],
    )  # fmt: skip


def make_policy(
    geometry: Geometry, device: torch.device, *, dtype: torch.dtype | None = None, seed: int = 0
) -> PolicyModel:
    """LoRA over random weights, the same for a seed; dtype: that of the base (its values are the geometry's)."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2_5_VLForConditionalGeneration

    own = getattr(torch, geometry.dtype)
    config = config_of(geometry)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(own)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                width = parameter.shape[1] if "embed_tokens" in name else parameter[0].numel()
                parameter.normal_(0, 1 / math.sqrt(width), generator=generator)
    lora = LoraConfig(r=geometry.lora_rank, lora_alpha=geometry.lora_rank, target_modules=match_language_linears(model))
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
                # peft draws A from torch's own generator, and begins with B = 0, where the gradient of A is 0.
                deviation = 0.02 if "lora_B" in name else 1 / math.sqrt(parameter.shape[1])
                parameter.normal_(0, deviation, generator=generator)
    if dtype is not None:
        model.to(dtype)
    settings = ModelConfig(dtype=geometry.dtype, adaptation="lora", lora_rank=geometry.lora_rank)
    policy = PolicyModel(model.eval(), settings, Base("random"), {})
    train_only(policy.model, settings, vision=False)
    return policy


def enable_fast_attention(policy: PolicyModel) -> None:
    """What loading a checkpoint does."""
    inner = policy.model.get_base_model()
    batch_equal_chunks(inner)
    use_packed_attention(inner)
    lighten_adapter(policy.model, policy.config)


def make_groups(
    geometry: Geometry, *, size: int = 8, groups: int | None = None, seed: int = 0
) -> list[list[Conversation]]:
    """Groups of conversations: 0 to 3 tool images (2 on average), sampled lengths log-normal about the geometry's."""
    rng = np.random.default_rng(seed)
    vocabulary = geometry.text["vocab_size"]
    made = []
    for number in range(geometry.groups if groups is None else groups):
        prompt = Writer().text(rng.integers(6, vocabulary, geometry.prompt_text))
        prompt.image(f"prompt {number}", geometry.prompt_image)
        group = []
        for row in range(size):
            images = int(rng.choice([0, 1, 2, 3], p=[0.05, 0.2, 0.45, 0.3]))
            sampled = geometry.sampled * rng.lognormal(-0.08, 0.4)
            writer = prompt.copy()
            for turn in range(images + 1):
                writer.text(rng.integers(6, vocabulary, max(2, int(sampled / (images + 1)))), scored=True)
                if turn < images:
                    rows, columns = geometry.tool_image
                    shape = (rows, max(2, int(columns * rng.uniform(0.7, 1.3))))
                    writer.text([1, 7]).image(f"tool {number}.{row}.{turn}", shape).text([8])
            group.append(writer.row())
        made.append(group)
    return made


class Writer:
    def __init__(self):
        self.tokens, self.scored, self.images, self.grids = [], [], [], []

    def copy(self) -> "Writer":
        other = Writer()
        for name in ("tokens", "scored", "images", "grids"):
            setattr(other, name, list(getattr(self, name)))
        return other

    def text(self, tokens, scored: bool = False) -> "Writer":
        self.tokens += [int(t) for t in tokens]
        self.scored += [scored] * len(tokens)
        return self

    def image(self, key: str, shape: tuple[int, int]) -> "Writer":
        grid = (1, 2 * shape[0], 2 * shape[1])
        self.text([BEGIN] + [IMAGE] * IMAGE_TOKEN.count(grid) + [END])
        self.images.append(key)
        self.grids.append(grid)
        return self

    def row(self) -> Conversation:
        grids = np.array(self.grids, dtype=np.int64).reshape(-1, 3)
        return Conversation(np.array(self.tokens), np.array(self.scored), tuple(self.images), grids)


class Pixels:
    """Image key -> patches (n, values) float32, made from the key; a stand-in for rows.Patches."""

    def __init__(self, rows):
        self.grids = {key: grid for row in rows for key, grid in zip(row.images, row.grids, strict=True)}
        self.made: dict[str, np.ndarray] = {}

    def __call__(self, key: str) -> np.ndarray:
        if key not in self.made:
            rng = np.random.default_rng([ord(c) for c in key])
            self.made[key] = rng.standard_normal(
                (int(np.prod(self.grids[key])), PROCESSOR.patch_values), dtype=np.float32
            )
        return self.made[key]

    def prepare(self, conversations, known=()) -> None: ...

    def trim(self) -> None: ...
