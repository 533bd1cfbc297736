"""The parity gate: each way in which engine and trainer can differ trips it, by identity or by number."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from grpo_world import BANNED, FULL, LORA, TRAIN, World

from thinkimg.errors import UserError
from thinkimg.models.family import list_families
from thinkimg.trainer import checkpoint, parity, parity_diagnosis
from thinkimg.trainer.forward import logprobs, packing, shared_prompts
from thinkimg.trainer.forward.packing import compute_mrope_positions
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.rows import Row, read_rows


def shifted(tokens: np.ndarray, image_token: packing.ImageToken, grids: np.ndarray) -> np.ndarray:
    """Everything after the first image one further on."""
    positions = compute_mrope_positions(tokens, image_token, grids)
    if len(grids):
        positions[:, int(np.flatnonzero(tokens == image_token.id)[0]) + image_token.count(grids[0]) :] += 1
    return positions


def refused(world, job, message: str) -> str:
    with pytest.raises(UserError, match=message) as caught:
        world.train(job)
    assert not Path(job["output"]).exists()
    return str(caught.value)


def test_a_shifted_position_trips_it_by_identity_and_shows_in_the_numbers(world, monkeypatch):
    for module in (packing, logprobs, shared_prompts):
        monkeypatch.setattr(module, "compute_mrope_positions", shifted)
    refused(world, world.job("shift"), "position of token .* get_rope_index")
    monkeypatch.setattr(parity, "check_positions", lambda *_: None)
    strict = TRAIN.model_copy(update={"parity": TRAIN.parity.model_copy(update={"max_kl": 1e-3})})
    refused(world, world.job("shift", train=strict), "disagree")


def test_an_image_swapped_for_one_of_the_same_size_trips_it(world):
    """Its hash is right, and its grid: the numbers tell."""
    shape = {key: grid for t in world.trajectories for key, grid in zip(t.images, t.grids, strict=True)}
    rng = np.random.default_rng(5)
    from PIL import Image

    from thinkimg.images.decode import pixel_hash

    others = {}
    for key, (_, h, w) in shape.items():
        picture = Image.fromarray(
            rng.integers(0, 256, (world.processor.patch * h, world.processor.patch * w, 3), dtype=np.uint8)
        )
        others[key] = (pixel_hash(picture), picture)
    table = world.image_table("others", dict(others.values()))
    rows = [dataclasses.replace(t, images=tuple(others[key][0] for key in t.images)) for t in world.trajectories]
    job = world.job("swap", rollouts=str(world.rollouts("swap", rows).directory))
    job["images"] = job["images"] | {"tables": [str(world.images), str(table)]}
    message = refused(world, job, "Engine and trainer disagree")
    assert "None of these explains it" in message and "By the number of images" in message


def test_a_changed_pad_trips_it(world):
    """In the compact tokens and in the expanded ones."""
    image_token = world.image_token
    first = world.trajectories[0]
    tokens = tuple(50 if token == image_token.id else token for token in first.tokens)
    rollouts = world.rollouts("pad", [dataclasses.replace(first, tokens=tokens), *world.trajectories[1:]])
    refused(world, world.job("pad", rollouts=str(rollouts.directory)), "placeholders")
    (row, *_) = read_rows(world.artifact, image_token)
    parity.check_tokens([row], image_token)
    for change, message in (
        (with_a_word_for_a_pad, "has 5 image tokens, and its grids 6"),
        (with_a_pad_moved, "interrupted"),
    ):
        talk = dataclasses.replace(row.conversation, tokens=change(row.conversation.tokens, image_token.id))
        with pytest.raises(UserError, match=message):
            parity.check_tokens([dataclasses.replace(row, conversation=talk)], image_token)


def with_a_word_for_a_pad(tokens: np.ndarray, image_token: int) -> np.ndarray:
    changed = tokens.copy()
    changed[np.flatnonzero(tokens == image_token)[1]] = 50
    return changed


def with_a_pad_moved(tokens: np.ndarray, image_token: int) -> np.ndarray:
    changed = with_a_word_for_a_pad(tokens, image_token)
    changed[-1] = image_token
    return changed


def test_a_stale_adapter_trips_it_by_name_and_by_number(world):
    fast = TRAIN.model_copy(update={"learning_rate": 0.1})
    world.train(world.job("newer", model=LORA, train=fast))
    newer = {"directory": str(world.root / "newer"), "digest": "v1"}
    refused(world, world.job("stale", model=LORA, policy=newer), "sampled with the weights v0")
    claimed = world.job("stale", model=LORA, policy=newer | {"digest": "v0"})
    assert "None of these explains it" in refused(world, claimed, "Engine and trainer disagree")


@pytest.mark.parametrize(
    ("change", "cause"),
    [({"banned": []}, "sampling mask"), ({"temperature": 1.0}, "temperature")],
)
def test_the_refusal_names_the_cause(world, change, cause):
    """The engine sampled without what the trainer believes: the pass without it is the one that agrees."""
    held = checkpoint.load(world.policies["full"], FULL, "cpu")
    rows = read_rows(world.artifact, world.image_token)
    pixels = world.patches()
    options = {"temperature": 0.5, "banned": list(range(200, 270))}
    pixels.prepare([row.conversation for row in rows])

    def engine(**settings) -> list[np.ndarray]:
        scorer = logprobs.Scorer(held.model, pixels, features={}, **settings)
        with torch.no_grad():
            return [scorer([row.conversation])[0].numpy() for row in rows]

    seen = [dataclasses.replace(row, engine=e) for row, e in zip(rows, engine(**options | change), strict=True)]
    scorer = logprobs.Scorer(held.model, pixels, features={}, **options)
    said = parity_diagnosis.explain(held, scorer, options["banned"], seen, engine(**options))
    pixels.close()
    assert f"Most of it goes with: {cause}" in said


@pytest.mark.parametrize("family", list_families())
def test_a_pass_in_float32_is_that_of_the_widened_weights_and_changes_no_bit(family, tmp_path):
    world = World(tmp_path, family=family)
    config = LORA.model_copy(update={"dtype": "bfloat16"})
    rows, pixels = read_rows(world.artifact, world.image_token)[:3], world.patches()
    pixels.prepare([row.conversation for row in rows])

    def score(policy: PolicyModel, features: dict) -> torch.Tensor:
        with torch.no_grad():
            scorer = logprobs.Scorer(policy.model, pixels, temperature=0.9, banned=BANNED, features=features)
            adapted = scorer([row.conversation for row in rows])[0]
            with policy.model.disable_adapter():
                return torch.stack([adapted, scorer([row.conversation for row in rows])[0]])

    held, wide = (checkpoint.load(world.policies["lora"], config, "cpu", world.base) for _ in range(2))
    for parameter in wide.model.parameters():
        parameter.data = parameter.data.float()
    before = {name: parameter.clone() for name, parameter in held.model.named_parameters()}
    kept: dict[str, torch.Tensor] = {}  # features of images, as the gate finds them
    with held.autocast():
        rough = score(held, kept)
    with parity_diagnosis.use_float32(held):
        widened, with_tower = score(held, kept), score(held, {})
    exact = score(wide, kept)
    noise = (rough - exact).abs().max()
    assert (widened - exact).abs().max() < 1e-5 < noise / 100
    assert (with_tower - score(wide, {})).abs().max() < noise  # patches are rounded on their way into the tower
    pixels.close()
    for name, parameter in held.model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name]), name


def test_the_sample_has_several_rows_of_a_group():
    rows = [Row(str(i), f"g{i // 8}", "", None, np.empty(0)) for i in range(64)]
    chosen = parity.choose(rows, 16, 0)
    assert len(set(chosen)) == 16 and chosen == sorted(chosen) == parity.choose(rows, 16, 0)
    assert len({rows[i].group_id for i in chosen}) == 4
    assert len(parity.choose(rows, 40, 0)) == 40 and len(parity.choose(rows, 100, 0)) == 64


def test_banned_ids_are_those_of_the_world(world):
    assert BANNED and all(not set(t.tokens) & set(BANNED) for t in world.trajectories)
