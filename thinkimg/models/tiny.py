"""Tiny Qwen2.5-VL of a few million random parameters for CPUs: same architecture and file formats as the 7B."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from thinkimg.images.patches import MEAN, MERGE, PATCH, STD, TEMPORAL
from thinkimg.models.importing import importing
from thinkimg.models.seeding import seeded
from thinkimg.models.settings import TinyModel

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig


SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# Digits one by one, as in Qwen2, so that coordinates are spelled and not memorised; each tag in one piece. The text
# between them may become one token: a tool call takes a third of the tokens of Qwen2's own splitting by words.
SPLIT = r"\p{N}|<[^<>]*>|[^\p{N}<>]+|[<>]"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def create_tiny(directory: Path, tiny: TinyModel, corpus: Iterable[str], *, seed: int) -> None:
    """Write config, weights (float32 safetensors), tokenizer, processor and chat template of a tiny Qwen2.5-VL.

    corpus: the texts on which the byte-level BPE vocabulary (tiny.vocab_size entries) is trained.
    The files are a pure function of the arguments and of the versions of torch, transformers and tokenizers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, corpus, tiny.vocab_size)
    write_processor(directory)
    write_model(directory, tiny, seed)


def write_tokenizer(directory: Path, corpus: Iterable[str], vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer on the corpus and write it with its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # Qwen2Tokenizer would replace SPLIT by its own
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": SPECIAL_TOKENS,
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def write_processor(directory: Path) -> None:
    """Write the configuration of the image processor."""
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "do_convert_rgb": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_resize": True,
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
        # A picture arrives at its final size: these limits admit every size that view.py makes.
        "min_pixels": 28 * 28,
        "max_pixels": 1280 * 28 * 28,
        "image_mean": MEAN,
        "image_std": STD,
        "rescale_factor": 1 / 255,
    }
    _write_json(directory / "preprocessor_config.json", settings)


def make_config(tiny: TinyModel, ids: Mapping[str, int]) -> "Qwen2_5_VLConfig":
    """Return the config. ids: token ids of the vocabulary, or of the special tokens, whose ids are the highest."""
    with importing:
        from transformers import Qwen2_5_VLConfig

    head_dim = tiny.hidden_size // tiny.heads
    temporal = head_dim // 8  # as in Qwen2.5-VL's [16, 24, 24] of 64
    height = (head_dim // 2 - temporal) // 2
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": max(ids.values()) + 1,
            "hidden_size": tiny.hidden_size,
            "intermediate_size": 2 * tiny.hidden_size,
            "num_hidden_layers": tiny.layers,
            "num_attention_heads": tiny.heads,
            "num_key_value_heads": tiny.heads,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
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
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "window_size": 112,
            "fullatt_block_indexes": [tiny.vision_layers - 1],
        },
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def write_model(directory: Path, tiny: TinyModel, seed: int) -> None:
    """Write the config and random weights of a model for the tokenizer in the directory."""
    with importing:
        from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
        from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would show a single shard
    ids = PreTrainedTokenizerFast.from_pretrained(directory).get_vocab()
    with seeded(seed):
        model = Qwen2_5_VLForConditionalGeneration(make_config(tiny, ids)).float()
        init_fan_in(model)
    model.generation_config.eos_token_id = [ids["<|im_end|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(directory)


def init_fan_in(model) -> None:
    """Draw every matrix with std 1 / sqrt(fan_in): with transformers' 0.02 so small a model does not learn to see."""
    import torch

    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
