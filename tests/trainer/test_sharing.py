"""Packed rows that share their prompt, against transformers' own forward pass: one row at a time, its own positions."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stock_forward import stock_logps

from thinkimg.models.settings import ModelConfig
from thinkimg.trainer.checkpoint import start_from_base
from thinkimg.trainer.forward.flex import BLOCK, build_block_mask, find_blocks, round_up_to_bucket
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.modules import unwrap
from thinkimg.trainer.forward.packed_attention import Layout, attend_packed
from thinkimg.trainer.forward.packing import Conversation, ImageToken, compute_mrope_positions
from thinkimg.trainer.forward.shared_prompts import (
    Span,
    Unit,
    count_common_prefix,
    count_unit_tokens,
    find_image_spans,
    find_obstacle,
    plan,
)
from thinkimg.trainer.policy import train_only

FULL = ModelConfig(dtype="float32", adaptation="full", train_vision=True)
LORA = ModelConfig(dtype="float32", adaptation="lora", lora_rank=4, lora_alpha=8)
SIDES = [(1, 1), (2, 3), (3, 2), (4, 4)]


class Policies(dict):
    def __repr__(self) -> str:  # hypothesis would print the tokenizer
        return "policies"


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def policies(request, base_of):
    """Policies of the families whose rows can share a prompt."""
    base = base_of(request.param)
    policies = Policies()
    for name, config in (("full", FULL), ("lora", LORA)):
        policy = start_from_base(base, config, "cpu", seed=0)
        train_only(policy.model, config, vision=name == "full")
        policies[name] = policy
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in policies["lora"].model.named_parameters():
            if "lora_B" in parameter_name:  # else the gradient of A is zero
                parameter.normal_(0, 0.2, generator=generator)
    return policies


@pytest.fixture(scope="module")
def image_token():
    return ImageToken(999, 2)


def pixels_of(policy):
    """Keys are "rows x columns / number": other numbers are other pictures of the same size."""

    def pixels(key: str) -> np.ndarray:
        shape, number = key.split("/")
        rows, columns = map(int, shape.split("x"))
        size = (4 * rows * columns, policy.family.processor.patch_values)
        return np.random.default_rng([rows, columns, int(number)]).standard_normal(size).astype("f4")

    return pixels


class Writer:
    """Makes conversations piece by piece."""

    def __init__(self, image_token: ImageToken):
        self.image_token = image_token
        self.tokens, self.scored, self.images, self.grids = [], [], [], []

    def text(self, tokens, scored: bool = False) -> "Writer":
        self.tokens += list(tokens)
        self.scored += [scored] * len(tokens)
        return self

    def image(self, side: tuple[int, int], number: int) -> "Writer":
        grid = (1, 2 * side[0], 2 * side[1])
        self.text([5] + [self.image_token.id] * self.image_token.count(grid) + [6])
        self.images.append(f"{side[0]}x{side[1]}/{number}")
        self.grids.append(grid)
        return self

    def row(self) -> Conversation:
        grids = np.array(self.grids, dtype=np.int64).reshape(-1, 3)
        return Conversation(np.array(self.tokens, dtype=np.int64), np.array(self.scored), tuple(self.images), grids)


@st.composite
def groups(draw, most: int = 4):
    """A group's description: its prompt's images, and for each row turns of (sampled tokens, tool image or None)."""
    side, number = st.sampled_from(SIDES), st.integers(0, 1)
    prompt = draw(st.lists(st.tuples(side, number), max_size=2))
    turn = st.tuples(st.integers(1, 9), st.none() | st.tuples(side, number))
    rows = draw(st.lists(st.lists(turn, min_size=1, max_size=3), min_size=1, max_size=most))
    return prompt, rows, draw(st.booleans())


def write(group, image_token: ImageToken, seed: int) -> list[Conversation]:
    prompt, rows, twins = group
    rng = np.random.default_rng(seed)
    text = rng.integers(20, 200, 4 + seed % 7)
    made = []
    for turns in [*rows, rows[0]] if twins else rows:
        writer = Writer(image_token).text(text)
        for side, number in prompt:
            writer.image(side, number)
        tokens = np.random.default_rng(len(made) if not twins or len(made) < len(rows) else 0)
        for length, picture in turns:
            writer.text([7]).text(tokens.integers(20, 200, length), scored=True)
            if picture:
                writer.image(*picture)
        made.append(writer.row())
    return made


def gradients(policy, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def assert_same_gradients(mine: dict, reference: dict) -> None:
    largest = max(float(g.norm()) for g in reference.values())
    for name, expected in reference.items():
        # Key biases have no gradient in exact arithmetic: a softmax doesn't feel what all its keys have in common.
        if float(expected.norm()) > 1e-5 * largest:
            error = float((mine[name] - expected).norm() / expected.norm())
            assert error <= 1e-4, f"{name}: {error}"


@settings(max_examples=30, deadline=None)
@given(st.lists(groups(), min_size=1, max_size=3), st.sampled_from(["full", "lora"]), st.integers(0, 99))
def test_packed_groups_are_single_rows(policies, described, name, seed):
    policy = policies[name]
    image_token, pixels = ImageToken.of(unwrap(policy.model).config), pixels_of(policy)
    rows, names = [], []
    for number, group in enumerate(described):
        made = write(group, image_token, seed + number)
        rows += made
        names += [number] * len(made)
    scorer = Scorer(policy.model, pixels, temperature=1.0, banned=(), features=None if name == "full" else {})
    weights = torch.linspace(-1, 1, sum(int(row.scored.sum()) for row in rows)) + 0.1
    weights = weights.split([int(row.scored.sum()) for row in rows])
    expected = [stock_logps(policy.model, row, pixels) for row in rows]
    reference = gradients(policy, sum((w * e).sum() for w, e in zip(weights, expected, strict=True)))
    accumulated: dict[str, torch.Tensor] = {}
    budget = 40 + 30 * (seed % 9)
    for units in plan(rows, names, budget, image_token):
        indices = [i for unit in units for i in unit.rows]
        place = {i: k for k, i in enumerate(indices)}
        local = [Unit(tuple(place[i] for i in unit.rows), unit.prefix) for unit in units]
        found, _ = scorer([rows[i] for i in indices], local)
        torch.testing.assert_close(found, torch.cat([expected[i] for i in indices]), atol=2e-5, rtol=1e-5)
        for key, value in gradients(policy, (torch.cat([weights[i] for i in indices]) * found).sum()).items():
            accumulated[key] = accumulated.get(key, 0) + value
    assert_same_gradients(accumulated, reference)


def attended(spans):
    """Yield for each token the packed indices that it attends to."""
    for start, length, parent in spans:
        prefix = np.arange(spans[parent].start, spans[parent].start + spans[parent].length)
        for i in range(start, start + length):
            own = np.arange(start, i + 1)
            yield own if spans[parent].start == start else np.concatenate([prefix, own])


@pytest.mark.parametrize("length", [5, 16, 130, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_sees_its_own_row_and_the_prompt_only(length, dtype):
    """Long and short spans, with key heads that are shared, forward and backward against a mask."""
    spans = [Span(0, length, 0), Span(length, 7, 0), Span(length + 7, length, 0), Span(2 * length + 7, 3, 3)]
    total = 2 * length + 10
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, total, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (4, 2, 2)
    )
    mask = torch.zeros(total, total, dtype=torch.bool)
    for i, seen in enumerate(attended(spans)):
        mask[i, seen] = True
    found, _ = attend_packed(
        None, query, key, value, None, scaling=0.3, layout=Layout(spans, query.device), dropout=0.0
    )
    wide = [x.double() for x in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))]
    scores = (wide[0] @ wide[1].mT * 0.3).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ wide[2]).transpose(1, 2)
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    mine = torch.autograd.grad((found.double() * weights).sum(), (query, key, value))
    for a, b in zip(mine, theirs, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


@settings(max_examples=40, deadline=None)
@given(st.lists(groups(), min_size=1, max_size=4), st.integers(1, 400), st.integers(0, 9))
def test_plans_hold_each_row_once_and_keep_to_the_budget(image_token, described, budget, seed):
    rows, names = [], []
    for number, group in enumerate(described):
        made = write(group, image_token, seed)
        rows += made
        names += [number] * len(made)
    batches = plan(rows, names, budget, image_token)
    assert sorted(i for units in batches for unit in units for i in unit.rows) == list(range(len(rows)))
    for units in batches:
        group = names[units[0].rows[0]]
        longest = max(len(row.tokens) for row, name in zip(rows, names, strict=True) if name == group)
        assert sum(count_unit_tokens(unit, rows) for unit in units) <= (
            budget if len(units) > 1 else max(budget, longest)
        )
        for unit in units:
            assert len({names[i] for i in unit.rows}) == 1
            first = rows[unit.rows[0]]
            assert all(count_common_prefix(first, rows[i], image_token) >= unit.prefix for i in unit.rows)
            positions = [compute_mrope_positions(rows[i].tokens, image_token, rows[i].grids) for i in unit.rows]
            assert all(np.array_equal(p[:, : unit.prefix], positions[0][:, : unit.prefix]) for p in positions)


def test_a_prefix_tells_images_by_content_and_splits_none(image_token):
    def row(number, side=(2, 2), tail=(30,)):
        return Writer(image_token).text([10, 11]).image((2, 3), 0).text([12]).image(side, number).text(tail, True).row()

    a = row(0)
    whole = len(a.tokens)
    assert count_common_prefix(a, row(0), image_token) == whole
    assert count_common_prefix(a, row(0, tail=(31,)), image_token) == whole - 1
    second = find_image_spans(a, image_token)[1][0]
    assert count_common_prefix(a, row(1), image_token) == second  # the same pads, another picture
    assert count_common_prefix(a, row(0, side=(2, 3)), image_token) == second  # begins alike, goes on longer
    other = dataclasses.replace(a, grids=np.array([[1, 4, 6], [1, 2, 8]]))  # as many pads, another shape
    assert count_common_prefix(a, other, image_token) == second


def test_rows_that_begin_otherwise_are_not_shared_with(image_token):
    rows = [Writer(image_token).text([9] * 20).text([30 + i], True).row() for i in range(3)]
    stranger = Writer(image_token).text([8] * 20).text([40], True).row()
    (units,) = plan([*rows, stranger], ["g"] * 4, 1000, image_token)
    assert units == [Unit((0, 1, 2), 20), Unit((3,), 21)]


def test_the_vision_tower_sees_each_unique_image_once_per_pass(policies, monkeypatch):
    policy, seen = policies["lora"], []
    image_token, pixels = ImageToken.of(unwrap(policy.model).config), pixels_of(policy)
    rows = [
        Writer(image_token).text([9]).image((2, 3), 0).text([30 + i] * 3, True).image((1, 1), 0).row() for i in range(3)
    ]
    visual = policy.model.get_base_model().model.visual
    forward = visual.forward
    monkeypatch.setattr(visual, "forward", lambda flat, **k: seen.append(len(flat)) or forward(flat, **k))
    scorer = Scorer(policy.model, pixels, temperature=1.0, banned=(), features={})
    for _ in range(2):
        scorer(rows, [Unit((0, 1, 2), count_common_prefix(rows[0], rows[1], image_token))])
    assert seen == [24 + 4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.lists(st.integers(1, 300), max_size=4)), min_size=1, max_size=3))
def test_block_masks_hide_nothing_that_is_seen(lengths):
    spans: list[Span] = []
    for prefix, branches in lengths:
        parent = len(spans)
        for length in (prefix, *branches):
            spans.append(Span(sum(span.length for span in spans), length, parent))
    total = sum(span.length for span in spans)
    if more := -total % BLOCK:
        spans.append(Span(total, more, len(spans)))
    expected = np.zeros((total + more, total + more), dtype=bool)
    for i, seen in enumerate(attended(spans)):
        expected[i, seen] = True
    mask = build_block_mask(spans, torch.device("cpu"))
    q = torch.arange(total + more)
    assert np.array_equal(mask.mask_mod(0, 0, q[:, None], q[None]).numpy(), expected)
    some, whole = find_blocks(spans)
    tiles = expected.reshape(len(some), BLOCK, len(some), BLOCK).transpose(0, 2, 1, 3)
    assert np.array_equal(some, tiles.any((2, 3))) and np.array_equal(whole, tiles.all((2, 3)))


def test_buckets_are_few_and_close():
    sizes = {round_up_to_bucket(n) for n in range(1, 16385)}
    assert len(sizes) == 17 and all(size % BLOCK == 0 for size in sizes)
    assert all(n <= round_up_to_bucket(n) <= max(1024, 1.25 * n) for n in range(1, 16385))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "window"),
        ({"attention_dropout": 0.1}, "at random"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({}, None),
    ],
)
def test_models_that_can_not_be_packed_are_told(policies, change, reason):
    import copy

    config = copy.deepcopy(policies["full"].model.config.text_config)
    for key, value in change.items():
        setattr(config, key, value)
    assert (find_obstacle(config) is None) if reason is None else (reason in find_obstacle(config))
