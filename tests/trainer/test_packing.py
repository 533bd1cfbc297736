"""Packing and the forward pass against transformers' own code."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from stock_forward import stock_logits

from thinkimg.errors import UserError
from thinkimg.models.family import list_families
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer import parity
from thinkimg.trainer.checkpoint import start_from_base
from thinkimg.trainer.forward import packing
from thinkimg.trainer.forward.logprobs import Scorer, compute_logps
from thinkimg.trainer.forward.modules import get_base_model
from thinkimg.trainer.forward.packing import Conversation, ImageToken, batch_by_length, compute_mrope_positions
from thinkimg.trainer.forward.vision import attend_chunks
from thinkimg.trainer.rows import Row

SIDES = st.tuples(st.integers(1, 4), st.integers(1, 4))


FULL = ModelConfig(dtype="float32", adaptation="full", train_vision=True)
FAMILIES = list_families()


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, base_of):
    return start_from_base(base_of(request.param), FULL, "cpu", seed=0)


@pytest.fixture(scope="module")
def image_token(policy):
    return ImageToken.of(policy.model.config)


def make_conversation(rng: np.random.Generator, sides: list[tuple[int, int]], image_token: ImageToken) -> Conversation:
    """Random text around one image for each (rows, columns) of tokens, some of it scored."""
    grids = np.array([(1, 2 * rows, 2 * columns) for rows, columns in sides], dtype=np.int64).reshape(-1, 3)
    pieces, scored = [], []
    for number in range(len(sides) + 1):
        text = rng.integers(1, 200, rng.integers(2 if number == 0 else 0, 6))
        pieces.append(text)
        scored.append(rng.random(len(text)) < 0.5)
        if number < len(sides):
            pieces.append(np.full(image_token.count(grids[number]), image_token.id))
            scored.append(np.zeros(len(pieces[-1]), dtype=bool))
    tokens, scored = np.concatenate([*pieces, [7]]), np.concatenate([*scored, [True]])
    scored[0] = False
    return Conversation(tokens, scored, tuple(f"{rows}x{columns}" for rows, columns in sides), grids)


def pixels_of(policy):
    def pixels(key: str) -> np.ndarray:
        rows, columns = map(int, key.split("x"))
        size = (4 * rows * columns, policy.family.processor.patch_values)
        return np.random.default_rng(rows * 10 + columns).standard_normal(size).astype(np.float32)

    return pixels


def as_row(talk: Conversation) -> Row:
    return Row("t", "g", "v0", talk, np.zeros(int(talk.scored.sum()), dtype=np.float32))


@settings(max_examples=25, deadline=None)
@given(st.lists(SIDES, max_size=4), st.integers(0, 2**32 - 1))
def test_positions_are_those_of_get_rope_index(policy, image_token, sides, seed):
    talk = make_conversation(np.random.default_rng(seed), sides, image_token)
    kinds = torch.from_numpy((talk.tokens == image_token.id).astype(np.int64))[None]
    # transformers takes a run of image tokens for one image: two that stand side by side are told apart by ours only
    assume((np.diff(np.concatenate([[0], kinds[0].numpy()])) == 1).sum() == len(sides))
    expected, _ = get_base_model(policy.model).get_rope_index(
        torch.from_numpy(talk.tokens)[None],
        mm_token_type_ids=kinds,
        image_grid_thw=torch.from_numpy(talk.grids) if sides else None,
    )
    assert np.array_equal(compute_mrope_positions(talk.tokens, image_token, talk.grids), expected[:, 0].numpy())
    parity.check_positions([as_row(talk)], get_base_model(policy.model))


def test_the_gate_sees_a_position_that_is_off(policy, image_token, monkeypatch):
    """Also where nothing but the two tokens around an image parts it from the next, as in a judge's prompt."""
    tokens = np.array([5, *2 * [8, *[image_token.id] * 6, 9], 7])
    talk = Conversation(tokens, tokens == 7, ("2x3", "3x2"), np.array([[1, 4, 6], [1, 6, 4]]))
    parity.check_positions([as_row(talk)], get_base_model(policy.model))

    def off(*arguments) -> np.ndarray:
        positions = compute_mrope_positions(*arguments)
        positions[2, 11] += 1
        return positions

    monkeypatch.setattr(packing, "compute_mrope_positions", off)
    with pytest.raises(UserError, match="position of token 11"):
        parity.check_positions([as_row(talk)], get_base_model(policy.model))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(SIDES, st.integers(0, 2**32 - 1))
def test_patches_are_those_of_the_image_processor(name, sides, seed):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    own, (rows, columns) = FAMILIES[name].processor, sides
    side = own.token_side
    array = np.random.default_rng(seed).integers(0, 256, (side * rows, side * columns, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        min_pixels=side**2, max_pixels=side**2 * 1280, patch_size=own.patch, merge_size=own.merge, image_mean=own.mean,
        image_std=own.std,
    )  # fmt: skip
    expected = processor(Image.fromarray(array), return_tensors="np")
    assert expected["image_grid_thw"].tolist() == [[1, own.merge * rows, own.merge * columns]]
    np.testing.assert_allclose(own.extract_patches(Image.fromarray(array)), expected["pixel_values"], atol=2e-6)


def measure_gradients(policy, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(policy.model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: value for name, value in zip(named, gradients, strict=True) if value is not None}


def test_batched_logps_and_gradients_are_those_of_single_forward_passes_of_transformers(policy, image_token):
    rng, pixels = np.random.default_rng(0), pixels_of(policy)
    layouts = [[(2, 3), (2, 3)], [], [(4, 4), (1, 2), (5, 3)], [(1, 1)]]
    rows = [make_conversation(rng, sides, image_token) for sides in layouts]
    # A row of more than one chunk of 64 tokens, in which recurrent layers compute.
    rows.append(make_conversation(rng, [(5, 5), (4, 5), (5, 4), (5, 5)], image_token))
    scorer = Scorer(policy.model, pixels, temperature=1.0, banned=(), features=None)
    logps, entropies = scorer(rows, entropy=True)
    weights = torch.linspace(-1, 1, len(logps)) + 0.1
    with torch.no_grad():
        cached = Scorer(policy.model, pixels, temperature=1.0, banned=(), features={})
        for _ in range(2):
            assert torch.equal(cached(rows)[0], logps)
        alone = torch.cat([scorer([row])[0] for row in rows])
    expected, spread = [], []
    for row in rows:
        logp = stock_logits(policy.model, row, pixels)[:-1].log_softmax(-1)
        column = np.flatnonzero(row.scored)
        expected.append(logp[column - 1, row.tokens[column]])
        spread.append(-(logp.exp() * logp).sum(-1)[column - 1])
    torch.testing.assert_close(logps, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, torch.cat(spread), atol=1e-5, rtol=1e-5)
    own = measure_gradients(policy, (weights * logps).sum())
    reference = measure_gradients(policy, (weights * torch.cat(expected)).sum())
    assert own.keys() == reference.keys()
    largest = max(float(value.norm()) for value in reference.values())
    for name, value in reference.items():
        assert float((own[name] - value).norm()) <= 1e-4 * max(float(value.norm()), 1e-3 * largest), name


@pytest.mark.parametrize("count", [3, 5000])
def test_token_logps_process_logits_as_the_engine_does(count):
    torch.manual_seed(0)
    head, banned = torch.nn.Linear(8, 50, bias=False), torch.tensor([3, 40])
    states, targets = torch.randn(count, 8, requires_grad=True), torch.randint(4, 40, (count,))
    logps, entropies = compute_logps(
        head, states, targets, temperature=0.7, banned=banned, entropy=True, entropy_grad=True
    )
    logits = head(states)
    logits = torch.where(torch.isin(torch.arange(50), banned), -torch.inf, logits) / 0.7
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(logps, expected.gather(1, targets[:, None]).squeeze(1))
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(entropies, distribution.entropy(), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad((logps - 0.1 * entropies).sum(), states)
    assert torch.isfinite(gradient).all()
    with torch.no_grad():
        assert torch.equal(compute_logps(head, states, targets, temperature=0.7, banned=banned)[0], logps)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_chunks_attend_to_themselves_only(lengths):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 4, generator=generator).unbind(0)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    found, _ = attend_chunks(None, query, key, value, None, scaling=0.5, cu_seq_lens_q=bounds, chunks={})
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        weights = (query[0, :, start:end] @ key[0, :, start:end].mT * 0.5).softmax(-1)
        torch.testing.assert_close(found[0, start:end], (weights @ value[0, :, start:end]).transpose(0, 1))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200))
def test_micro_batches_hold_each_row_once_and_keep_to_the_budget(lengths, budget):
    rows = [Conversation(np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool), (), np.zeros((0, 3))) for n in lengths]
    batches = list(batch_by_length(rows, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
