"""Reading attention: against transformers' own maps, and on planted attention whose answer is known."""

import numpy as np
import pytest
import torch
from PIL import Image
from stock_forward import stock

from thinkimg.conversation.codec import Codec
from thinkimg.errors import UserError
from thinkimg.models.family import Family, list_families
from thinkimg.models.settings import ModelConfig
from thinkimg.rewards.judges.attention import GENERIC, encode_prompt
from thinkimg.trainer.attention_job import (
    build_conversations,
    choose_layers,
    compute_coverage,
    measure,
    read_attention,
    split,
)
from thinkimg.trainer.checkpoint import start_from_base
from thinkimg.trainer.forward.attention import Reader, StopForward
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.packing import ImageToken

SIZES = ((3, 2), (2, 2))
"""Columns and rows of tokens."""


@pytest.fixture(scope="module", params=list_families())
def policy(request, base_of):
    return start_from_base(base_of(request.param), ModelConfig(dtype="float32", adaptation="full"), "cpu", seed=0)


@pytest.fixture(scope="module")
def model(policy):
    return policy.model


@pytest.fixture(scope="module")
def readable(policy) -> tuple[int, ...]:
    return policy.family.attention_layers(policy.model.config.text_config)


@pytest.fixture(scope="module")
def codec(policy) -> Codec:
    return Codec.load(policy.weights_directory)


@pytest.fixture(scope="module")
def pictures(policy) -> dict[str, np.ndarray]:
    rng, processor = np.random.default_rng(0), policy.family.processor
    shapes = [(rows * processor.token_side, columns * processor.token_side, 3) for columns, rows in SIZES]
    images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    return {name: processor.extract_patches(image) for name, image in zip(("a", "b"), images, strict=True)}


def pair(codec: Codec, question: str) -> dict:
    grids = [(1, 2 * rows, 2 * columns) for columns, rows in SIZES]
    prompts = [encode_prompt(codec, question), encode_prompt(codec, GENERIC)]
    return {"images": ["a", "b"], "grids": grids, "region": None, "prompts": prompts}


def test_the_text_is_what_the_query_rows_say(codec):
    for words in ("Which way do the stripes run?", "x", GENERIC):
        found = encode_prompt(codec, words)
        assert codec.decode(found["tokens"][slice(*found["text"])]) == words


def test_it_reads_what_transformers_eager_attention_shows(model, codec, pictures, readable):
    image_token = ImageToken.of(model.config)
    rows = [
        row
        for q in ("Which way?", "It is dark. What is the letter?")
        for row in build_conversations(pair(codec, q), image_token)
    ]
    scorer = Scorer(model, pictures.__getitem__, temperature=1.0, banned=(), features={})
    with torch.no_grad():
        read = read_attention(scorer, rows, readable)
    maps = split(read, rows, image_token)
    with stock(model):
        model.config.text_config._attn_implementation = "eager"
        for row, found in zip(rows, maps, strict=True):
            pixels = torch.from_numpy(np.concatenate([pictures[key] for key in row.images]))
            tokens = torch.from_numpy(row.tokens)[None]
            kinds = (tokens == codec.image).int()
            with torch.no_grad():
                output = model(
                    input_ids=tokens, pixel_values=pixels, image_grid_thw=torch.from_numpy(row.grids),
                    mm_token_type_ids=kinds, output_attentions=True,
                )  # fmt: skip
            assert len(output.attentions) == len(readable)
            for layer, attention in zip(readable, output.attentions, strict=True):
                full = attention[0].mean(0).numpy()  # (T, T), mean over heads
                seen = full[row.scored][:, row.tokens == codec.image]
                np.testing.assert_allclose(found[layer, "text"], seen[:-1].mean(0), atol=2e-6)
                np.testing.assert_allclose(found[layer, "last"], seen[-1], atol=2e-6)


def test_a_layer_that_can_not_be_read_is_refused_with_those_that_can(policy, readable):
    layers = range(policy.model.config.text_config.num_hidden_layers)
    assert choose_layers(policy, readable) == readable
    for layer in {*layers, len(layers)} - {*readable}:
        with pytest.raises(UserError, match=f"in layer {layer}, .* layers {', '.join(map(str, readable))} \\(of "):
            choose_layers(policy, [*readable, layer])


@pytest.mark.parametrize(("depth", "chosen"), [(32, 23), (64, 43), (24, 15), (4, 3)])
def test_the_layer_of_a_family_attends_and_is_the_nearest_to_two_thirds_of_the_depth(depth, chosen):
    from transformers import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(num_hidden_layers=depth)
    families = list_families()
    assert families["qwen3_5"].pick_attention_layer(config) == chosen
    assert config.layer_types[chosen] == "full_attention"
    assert families["qwen2_5_vl"].pick_attention_layer(config) == 22  # whatever the depth, as it has always been
    assert abs(Family.pick_attention_layer(families["qwen3_vl"], config) - 2 / 3 * depth) <= 0.5


def test_it_stops_after_the_last_layer(model, codec, pictures, readable):
    ran = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(model.model.language_model.layers)
    ]
    scorer = Scorer(model, pictures.__getitem__, temperature=1.0, banned=(), features={})
    with torch.no_grad():
        read_attention(
            scorer, build_conversations(pair(codec, "Which way?"), ImageToken.of(model.config)), readable[:1]
        )
    assert ran == list(range(readable[0]))
    for hook in hooks:
        hook.remove()


def test_planted_attention_is_found():
    """Keys that answer to one query direction only: all attention lies on them, causally and for every head alike."""
    heads, kv, length, width = 4, 2, 12, 8
    query, key = torch.zeros(2, heads, length, width), torch.zeros(2, kv, length, width)
    query[..., 0] = 50.0
    key[0, :, 3, 0] = key[1, :, 5, 0] = 50.0
    row, column = torch.tensor([0, 0, 1]), torch.tensor([2, 7, 11])
    reader = Reader([7], row, column)
    with pytest.raises(StopForward):
        reader.read(7, query, key, 1.0)
    found = reader.attention[7]
    assert found[0, :3].tolist() == pytest.approx([1 / 3] * 3) and found[0, 3:].sum() == 0  # token 3 is still to come
    assert found[1, 3] == pytest.approx(1.0) and found[2, 5] == pytest.approx(1.0)


def test_the_share_of_the_region_is_that_of_the_relative_attention_in_it():
    one = {"grids": [(1, 16, 16), (1, 4, 4)], "region": (0.0, 0.0, 0.5, 0.25)}
    general = np.full(64 + 4, 0.01)
    asked = general.copy()
    asked[:16] = 0.0
    asked[[0, 1, 2, 3, 8, 9, 10, 11]] = 0.05  # the region: 4 x 2 of 8 x 8 tokens
    found = measure(one, ImageToken(0, 2), {(1, "text"): asked}, {(1, "text"): general})["1/text"]
    assert found["area"] == pytest.approx(8 / 64)
    assert found["region"] == pytest.approx(8 * 5 / (8 * 5 + 48 * 1))
    assert found["question"] == pytest.approx(0.04) and found["generic"] == pytest.approx(0.04)


def test_small_grids_and_whole_images_have_no_region():
    assert compute_coverage((7, 8), (0.0, 0.0, 0.5, 0.5)) is None
    assert compute_coverage((8, 8), None) is None and compute_coverage((8, 8), (0.0, 0.0, 1.0, 1.0)) is None
    cover = compute_coverage((8, 8), (0.0, 0.0, 0.5 / 8, 1.0))
    assert cover.reshape(8, 8)[:, 0].tolist() == pytest.approx([0.5] * 8) and cover.sum() == pytest.approx(4)
