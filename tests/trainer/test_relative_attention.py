"""Reading attention: against transformers' own maps, and on planted attention whose answer is known."""

import numpy as np
import pytest
import torch
from PIL import Image

from thinkimg.conversation.codec import Codec
from thinkimg.images.patches import extract_patches
from thinkimg.images.view import count_patches
from thinkimg.rewards.judges.attention import GENERIC, encode_prompt
from thinkimg.trainer.attention_job import build_conversations, compute_coverage, measure, read_attention, split
from thinkimg.trainer.forward.attention import Reader, StopForward
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.packed_attention import use_packed_attention

SIZES = ((84, 56), (56, 56))


@pytest.fixture(scope="module")
def model(tiny_models):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_models[0], dtype=torch.float32).eval()
    use_packed_attention(model)
    return model


@pytest.fixture(scope="module")
def codec(tiny_models) -> Codec:
    return Codec.load(tiny_models[0])


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]
    return {name: extract_patches(image) for name, image in zip(("a", "b"), images, strict=True)}


def pair(codec: Codec, question: str) -> dict:
    grids = [count_patches(*size) for size in SIZES]
    prompts = [encode_prompt(codec, question), encode_prompt(codec, GENERIC)]
    return {"images": ["a", "b"], "grids": grids, "region": None, "prompts": prompts}


def test_the_text_is_what_the_query_rows_say(codec):
    for words in ("Which way do the stripes run?", "x", GENERIC):
        found = encode_prompt(codec, words)
        assert codec.decode(found["tokens"][slice(*found["text"])]) == words


def test_it_reads_what_transformers_eager_attention_shows(model, codec, pictures):
    rows = [
        row
        for q in ("Which way?", "It is dark. What is the letter?")
        for row in build_conversations(pair(codec, q), codec.image)
    ]
    scorer = Scorer(model, pictures.__getitem__, temperature=1.0, banned=(), features={})
    with torch.no_grad():
        read = read_attention(scorer, rows, [0, 1])
    maps = split(read, rows, codec.image)
    model.set_attn_implementation({"text_config": "eager"})
    try:
        for row, found in zip(rows, maps, strict=True):
            pixels = torch.from_numpy(np.concatenate([pictures[key] for key in row.images]))
            tokens = torch.from_numpy(row.tokens)[None]
            kinds = (tokens == codec.image).int()
            with torch.no_grad():
                output = model(
                    input_ids=tokens, pixel_values=pixels, image_grid_thw=torch.from_numpy(row.grids),
                    mm_token_type_ids=kinds, output_attentions=True,
                )  # fmt: skip
            for layer in (0, 1):
                full = output.attentions[layer][0].mean(0).numpy()  # (T, T), mean over heads
                seen = full[row.scored][:, row.tokens == codec.image]
                np.testing.assert_allclose(found[layer, "text"], seen[:-1].mean(0), atol=2e-6)
                np.testing.assert_allclose(found[layer, "last"], seen[-1], atol=2e-6)
    finally:
        use_packed_attention(model)


def test_it_stops_after_the_last_layer(model, codec, pictures):
    ran = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(model.model.language_model.layers)
    ]
    scorer = Scorer(model, pictures.__getitem__, temperature=1.0, banned=(), features={})
    with torch.no_grad():
        read_attention(scorer, build_conversations(pair(codec, "Which way?"), codec.image), [0])
    assert ran == []
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
    found = measure(one, {(1, "text"): asked}, {(1, "text"): general})["1/text"]
    assert found["area"] == pytest.approx(8 / 64)
    assert found["region"] == pytest.approx(8 * 5 / (8 * 5 + 48 * 1))
    assert found["question"] == pytest.approx(0.04) and found["generic"] == pytest.approx(0.04)


def test_small_grids_and_whole_images_have_no_region():
    assert compute_coverage((1, 14, 16), (0.0, 0.0, 0.5, 0.5)) is None  # 7 x 8 tokens
    assert compute_coverage((1, 16, 16), None) is None and compute_coverage((1, 16, 16), (0.0, 0.0, 1.0, 1.0)) is None
    cover = compute_coverage((1, 16, 16), (0.0, 0.0, 0.5 / 8, 1.0))
    assert cover.reshape(8, 8)[:, 0].tolist() == pytest.approx([0.5] * 8) and cover.sum() == pytest.approx(4)
