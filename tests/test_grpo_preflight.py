"""The memory preflight against a process of its own, and what it says where memory is short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from preflight_child import group

from thinkimg.config import ModelConfig
from thinkimg.errors import UserError
from thinkimg.grpo import preflight
from thinkimg.grpo.checkpoint import Base, from_base
from thinkimg.grpo.sharing import plan


@pytest.fixture(scope="module")
def policy(tiny_models):
    base = Base("tiny", directory=str(tiny_models[0]))
    made = from_base(base, ModelConfig(dtype="float32", adaptation="full"), "cpu", seed=0)
    made.train_only(vision=False)
    return made


def conversations(policy, **shape):
    rows = group(policy.model.config.image_token_id, **shape)
    return rows, plan(rows, [0] * len(rows), 10**6, policy.model.config.image_token_id)


@pytest.mark.parametrize(
    "case",
    [
        ["--adaptation", "lora", "--images", "1", "--turns", "2", "--size", "8"],
        ["--adaptation", "full", "--images", "2", "--turns", "2", "--size", "8"],
    ],
    ids=["lora", "full"],
)
def test_the_peak_is_predicted_within_15_percent(case, tmp_path):
    argv = [sys.executable, str(Path(__file__).with_name("preflight_child.py")), "--model", str(tmp_path), *case]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=600)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), found


def test_a_refusal_says_what_to_lower(policy):
    rows, plans = conversations(policy, images=1, turns=1, size=8)
    options = {"token_budget": 4096, "checkpointing": False}
    need = preflight.check(policy, rows, plans, **options, free=10**12)
    with pytest.raises(UserError, match="activations of .* tokens") as caught:
        preflight.check(policy, rows, plans, **options, free=int(need.total * 0.7))
    assert "train.token_budget from 4096 to" in caught.value.hint and "gradient_checkpointing=true" in caught.value.hint
    with pytest.raises(UserError) as caught:  # not even a row fits
        preflight.check(policy, rows, plans, **options | {"checkpointing": True}, free=need.trained + 1000)
    assert "images.max_pixels" in caught.value.hint and "token_budget" not in caught.value.hint
    assert "model.adaptation=lora" in caught.value.hint


def test_more_rows_turns_and_images_need_more_and_checkpointing_less(policy):
    def need(checkpointing=False, **shape) -> preflight.Need:
        rows, plans = conversations(policy, **shape)
        return preflight.check(policy, rows, plans, token_budget=10**6, checkpointing=checkpointing, free=10**12)

    small = need(images=1, turns=1, size=2)
    for more in ({"images": 2}, {"turns": 2}, {"size": 4}):
        assert need(**{"images": 1, "turns": 1, "size": 2} | more).activations > small.activations
    assert need(checkpointing=True, images=1, turns=1, size=2).activations < small.activations


def test_going_through_it_changes_nothing(policy):
    before = {name: (p.clone(), p.requires_grad) for name, p in policy.model.named_parameters()}
    rows, plans = conversations(policy, images=1, turns=1, size=2)
    preflight.check(policy, rows, plans, token_budget=10**6, checkpointing=True, free=10**12)
    assert not policy.model.training
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None
