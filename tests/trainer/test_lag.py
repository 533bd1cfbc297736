"""Training from rollouts that an earlier policy played: the gate checks that one, the step starts from the other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from grpo_world import FULL, LORA, TRAIN
from safetensors.torch import load_file

from thinkimg.errors import UserError
from thinkimg.trainer import checkpoint, parity, weight_files

FAST = TRAIN.model_copy(update={"learning_rate": 0.1})
KINDS = pytest.mark.parametrize("model", [FULL, LORA], ids=["full", "lora"])


def step_behind(world, name: str, model, **options) -> tuple[dict, dict]:
    """Return a job from the policy after a large step, and the policy that played, as jobs name them."""
    first = world.job(f"{name}-first", model=model, train=FAST)
    world.train(first)
    newer = {"directory": first["output"], "digest": "v1"}
    return world.job(name, model=model, policy=newer, **options), first["policy"]


def read(directory: str) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(directory)}/{name}": value
        for path in sorted(Path(directory).rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


@KINDS
def test_the_gate_compares_with_the_policy_that_played(world, model):
    """Its numbers are those of the step before, whose policy played itself; with the weights left alone it refuses."""
    job, player = step_behind(world, f"gate-{model.adaptation}", model)
    before = world.train(world.job(f"before-{model.adaptation}", model=model, train=FAST))["metrics"]
    after = world.train(job | {"player": player})["metrics"]
    names = ["parity/mean_abs", "parity/kl", "parity/ratio_max"]
    assert [after[name] for name in names] == [before[name] for name in names]
    claimed = job | {"player": player | {"directory": job["policy"]["directory"]}, "output": job["output"] + "-claimed"}
    with pytest.raises(UserError, match="Engine and trainer disagree"):
        world.train(claimed)
    with pytest.raises(UserError, match="sampled with the weights v0"):
        world.train(job | {"output": job["output"] + "-silent"})


@KINDS
def test_the_step_starts_from_the_policy_that_is_trained(world, model, monkeypatch):
    """Bit by bit the step that is taken where the gate looks at nothing: what it held is gone."""
    job, player = step_behind(world, f"step-{model.adaptation}", model)
    world.train(job | {"player": player})
    for check in ("check_weights", "check_numbers", "check_slope"):
        monkeypatch.setattr(parity, check, lambda *_, **__: None)
    unchecked = job | {"output": job["output"] + "-unchecked"}
    world.train(unchecked)
    ours, expected, start = read(job["output"]), read(unchecked["output"]), read(job["policy"]["directory"])
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert any(not torch.equal(ours[name], start[name]) for name in ours), "a step was taken"
    states = [json.loads((Path(path["output"]) / "state.json").read_text()) for path in (job, unchecked)]
    assert states[0] == states[1]


def test_the_loss_is_corrected_by_the_ratio_to_the_policy_that_played(world):
    """Beside the noise of the engine, the ratio shows the step that lies between the two policies."""
    job, player = step_behind(world, "ratio", FULL)
    behind = world.train(job | {"player": player})["metrics"]
    level = world.train(world.job("level", model=FULL, train=FAST))["metrics"]
    assert level["sampling/effective_sample"] > 0.999
    assert behind["sampling/effective_sample"] < 0.9


@KINDS
def test_held_weights_are_given_back_whatever_happens(world, model):
    first = world.job(f"held-{model.adaptation}", model=model, train=FAST)
    world.train(first)
    policy = checkpoint.load(first["output"], model, "cpu", world.base if model is LORA else None)
    own = {name: value.clone() for name, value in policy.model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), weight_files.hold(policy, Path(first["policy"]["directory"])):
        inside = {name: value.clone() for name, value in policy.model.state_dict().items()}
        1 / 0  # noqa: B018
    assert all(torch.equal(value, own[name]) for name, value in policy.model.state_dict().items())
    original = checkpoint.load(first["policy"]["directory"], model, "cpu", world.base if model is LORA else None)
    for name, value in original.model.state_dict().items():
        assert np.array_equal(inside[name].numpy(), value.numpy()), name
