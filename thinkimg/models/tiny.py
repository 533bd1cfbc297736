"""Tiny model of a few million random parameters for CPUs: architecture and file formats of its family."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from thinkimg.images.patches import TEMPORAL
from thinkimg.importing import importing
from thinkimg.models.family import Family, load_family
from thinkimg.models.seeding import seeded
from thinkimg.models.settings import TinyModel

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
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPENING{% endif %}"
)
OPENING = "{% if enable_thinking is defined and not enable_thinking %}WITHOUT{% else %}WITH{% endif %}"


def create_tiny(directory: Path, tiny: TinyModel, corpus: Iterable[str], *, seed: int) -> None:
    """Write config, weights (float32 safetensors), tokenizer, processor and chat template of a tiny model.

    corpus: the texts on which the byte-level BPE vocabulary (tiny.vocab_size entries) is trained.
    The files are a pure function of the arguments and of the versions of torch, transformers and tokenizers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    family = load_family(tiny.family)
    write_tokenizer(directory, corpus, tiny.vocab_size, family)
    write_processor(directory, family)
    write_model(directory, tiny, seed)


def write_tokenizer(directory: Path, corpus: Iterable[str], vocab_size: int, family: Family) -> None:
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
    template = write_chat_template(family)
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
        "chat_template": template,
    }
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(directory / "chat_template.json", {"chat_template": template})


def write_chat_template(family: Family) -> str:
    """Return the chat template, in Jinja; its replies begin as those of the family."""
    if family.openings is None:
        return CHAT_TEMPLATE.replace("OPENING", "")
    thought, none = family.openings
    return CHAT_TEMPLATE.replace("OPENING", OPENING.replace("WITHOUT", none).replace("WITH", thought))


def write_processor(directory: Path, family: Family) -> None:
    """Write the configuration of the image processor."""
    processor = family.processor
    token = processor.token_side**2
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": family.processor_class,
        "do_convert_rgb": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_resize": True,
        "patch_size": processor.patch,
        "temporal_patch_size": TEMPORAL,
        "merge_size": processor.merge,
        # A picture arrives at its final size: these limits admit every size that view.py makes.
        "min_pixels": token,
        "max_pixels": 1280 * token,
        "image_mean": processor.mean,
        "image_std": processor.std,
        "rescale_factor": 1 / 255,
    }
    _write_json(directory / "preprocessor_config.json", settings)


def write_model(directory: Path, tiny: TinyModel, seed: int) -> None:
    """Write the config and random weights of a model for the tokenizer in the directory."""
    with importing:
        from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
        from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would show a single shard
    ids = PreTrainedTokenizerFast.from_pretrained(directory).get_vocab()
    family = load_family(tiny.family)
    with seeded(seed):
        model = AutoModelForImageTextToText.from_config(family.make_config(tiny, ids)).float()
        init_fan_in(model)
        family.init_tiny(model)
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
