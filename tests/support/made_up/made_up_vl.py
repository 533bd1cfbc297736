"""Model family of nobody: a package as a user installs it, with an architecture that transformers has not.

Its grid, colours, unit of positions, protocols and token ids are no shipped family's. The architecture is DeepStack and
interleaved positions, with positions in pixels.
"""

import json
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextModel,
    Qwen3VLVisionModel,
)

from thinkimg.families.qwen3_vl import Qwen3_VL
from thinkimg.images.patches import ImageProcessor
from thinkimg.records import Coordinates

NAME = "made_up_vl"
TOKENS = (
    "<|image_pad|>", "<|im_end|>", "<|vision_end|>", "<|endoftext|>", "<|im_start|>", "<|made_up|>",
    "<|vision_start|>", "<|video_pad|>", "<|vision_pad|>", "<|box_start|>", "<|box_end|>",
)  # fmt: skip
"""Its special tokens, from id 0 on; of the shipped families they have the highest ids."""
SPLIT = r"\p{N}|<[^<>]*>|\n|[^\p{N}<>\n]+|[<>]"
"""As a tiny tokenizer's own (models/tiny.py), but for line breaks, which stand alone as in Qwen's."""
OPENING = "<think>\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


class MadeUpVisionConfig(Qwen3VLVisionConfig):
    model_type = f"{NAME}_vision"


class MadeUpTextConfig(Qwen3VLTextConfig):
    model_type = f"{NAME}_text"


class MadeUpConfig(Qwen3VLConfig):
    model_type = NAME
    sub_configs = {"vision_config": MadeUpVisionConfig, "text_config": MadeUpTextConfig}


class MadeUpVision(Qwen3VLVisionModel):
    config: MadeUpVisionConfig


class MadeUpText(Qwen3VLTextModel):
    config: MadeUpTextConfig


class MadeUpForConditionalGeneration(Qwen3VLForConditionalGeneration):
    config: MadeUpConfig


for config in (MadeUpConfig, MadeUpVisionConfig, MadeUpTextConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)
AutoModel.register(MadeUpVisionConfig, MadeUpVision, exist_ok=True)
AutoModel.register(MadeUpTextConfig, MadeUpText, exist_ok=True)
AutoModelForImageTextToText.register(MadeUpConfig, MadeUpForConditionalGeneration, exist_ok=True)


class MadeUp(Qwen3_VL):
    """Nobody's models."""

    model_types = (NAME,)
    hub_names = r"made-up-"
    processor = ImageProcessor(patch=10, merge=3, mean=(0.1, 0.5, 0.7), std=(0.9, 0.3, 0.2))
    coordinates = Coordinates.PIXELS
    protocols = ("qwen", "qwen_xml", "think")

    def make_config(self, tiny, ids):
        model = super().make_config(tiny, ids).to_dict()
        for part in (model, model["text_config"], model["vision_config"]):
            del part["model_type"]  # each class has its own
        return MadeUpConfig(**model)


FAMILY = MadeUp()


def give_own_vocabulary(directory: Path) -> None:
    """Change a tiny model's files: special tokens have the lowest ids, and the chat template opens a thought."""
    tokenizer = read(directory / "tokenizer.json")
    offset, old = len(TOKENS), {token["content"] for token in tokenizer["added_tokens"]}
    words = {token: number for token, number in tokenizer["model"]["vocab"].items() if token not in old}
    ids = {token: number for number, token in enumerate(TOKENS)}
    tokenizer["model"]["vocab"] = ids | {
        token: offset + rank for rank, token in enumerate(sorted(words, key=words.__getitem__))
    }
    kinds = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": SPLIT}
    tokenizer["added_tokens"] = [kinds | {"id": number, "content": token} for token, number in ids.items()]
    write(directory / "tokenizer.json", tokenizer)
    settings = {"chat_template": CHAT_TEMPLATE, "additional_special_tokens": TOKENS}
    write(directory / "tokenizer_config.json", read(directory / "tokenizer_config.json") | settings)
    write(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    config = read(directory / "config.json")
    for name in ("image", "video", "vision_start", "vision_end"):
        config[f"{name}_token_id"] = ids[f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"]
    special = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    config["text_config"] |= special
    write(directory / "config.json", config)
    write(directory / "generation_config.json", read(directory / "generation_config.json") | special)


def read(path: Path) -> dict:
    return json.loads(path.read_bytes())


def write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False))
