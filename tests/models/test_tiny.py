"""Tiny models keep what makes their family different: leaving a part of it out changes what they say."""

import numpy as np
import pytest
import torch
from chat_codecs import CORPUS
from left_out import CHANGES
from PIL import Image

from thinkimg.conversation.codec import Codec
from thinkimg.conversation.protocol import IMAGE_PART, text_part
from thinkimg.models.family import load_family
from thinkimg.models.settings import ModelConfig, TinyModel
from thinkimg.models.tiny import create_tiny
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.packing import Conversation, ImageToken
from thinkimg.trainer.policy import load_model

VISIBLE = 0.01  # in log-probabilities, the mean over tokens; engine and trainer differ by 1e-6 in float32
SIDES = [(6, 4), (4, 6)]  # patches of the two images
NAMES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    for name in NAMES:
        create_tiny(root / name, TinyModel(family=name, vocab_size=512), CORPUS, seed=0)
    return root


def speak(directory, change=None) -> np.ndarray:
    """Log-probabilities of a conversation with two images. change: a context manager, entered with the model."""
    name = directory.name
    family, codec = load_family(name), Codec.load(directory)
    model = load_model(directory, ModelConfig(dtype="float32", adaptation="full"), "cpu")
    token = ImageToken(codec.image, family.processor.merge)
    rng = np.random.default_rng(0)
    patches, grids = {}, np.array([(1, *sides) for sides in SIDES])
    for key, (rows, columns) in zip("ab", SIDES, strict=True):
        size = rows * family.processor.patch, columns * family.processor.patch, 3
        patches[key] = family.processor.extract_patches(Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)))
    compact = codec.prompt("Use a tool.", [IMAGE_PART, IMAGE_PART, text_part(CORPUS[2])]) + codec.encode(CORPUS[0])
    counts = np.ones(len(compact), dtype=np.int64)
    counts[np.asarray(compact) == token.id] = [token.count(grid) for grid in grids]
    tokens = np.repeat(compact, counts)
    row = Conversation(tokens, np.arange(len(tokens)) > len(tokens) - 60, ("a", "b"), grids)
    with torch.no_grad(), change(model) if change else torch.no_grad():
        scorer = Scorer(model, patches.__getitem__, temperature=1.0, banned=(), features={})
        return scorer([row])[0].numpy()


@pytest.mark.parametrize("name, part, change", CHANGES, ids=[f"{name}-{part}" for name, part, _ in CHANGES])
def test_a_part_that_is_left_out_is_seen(directories, name, part, change):
    directory = directories / name
    difference = np.abs(speak(directory, change) - speak(directory))
    assert difference.mean() > VISIBLE


@pytest.mark.parametrize("vision_layers", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("layers", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_of_any_size_a_model_has_the_shape_of_its_family(name, layers, vision_layers):
    family, ids = (
        load_family(name),
        {
            f"<|{token}|>": i
            for i, token in enumerate(("endoftext", "im_end", "image_pad", "video_pad", "vision_start", "vision_end"))
        },
    )
    for width, heads in ((32, 2), (128, 4), (256, 8)):
        tiny = TinyModel(family=name, layers=layers, vision_layers=vision_layers, hidden_size=width, heads=heads)
        config = family.make_config(tiny, ids)
        text, rope = config.text_config, config.text_config.rope_parameters
        turning = (width // heads) * rope.get("partial_rotary_factor", 1)
        assert sum(rope["mrope_section"]) == turning / 2 and min(rope["mrope_section"]) > 0
        assert family.attention_layers(text)[-1] == layers - 1
        if name != "qwen2_5_vl":
            assert text.num_key_value_heads < text.num_attention_heads and rope["mrope_interleaved"]
        if name == "qwen3_vl":
            levels = config.vision_config.deepstack_visual_indexes
            assert levels == sorted(set(levels)) and levels[-1] < vision_layers
            assert len(levels) == min(2, vision_layers)
        if name == "qwen3_5" and layers == 8:
            assert family.attention_layers(text) == (3, 7)
