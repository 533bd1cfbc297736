"""Every family of models on a real vLLM server: what it plays is what the trainer computes."""

import random

import numpy as np
import pytest
import torch
from left_out import CHANGES
from served_families import FAMILIES, Served, Talk

from thinkimg.models.base import Base
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer import checkpoint
from thinkimg.trainer.parity import measure_slope
from thinkimg.trainer.policy import load_model


@pytest.fixture(scope="module", params=["qwen2_5_vl", *FAMILIES])
def served(request) -> Served:
    """A family's server, as its tiny models start it; who loads other weights loads the first model's again."""
    if request.param in FAMILIES:
        return request.getfixturevalue("family_engines")[request.param]
    models, media = request.getfixturevalue("tiny_models"), request.getfixturevalue("media_dir")
    return Served(request.param, models, request.getfixturevalue("engine").url, media)


@pytest.fixture(scope="module")
def first(served):
    return load_model(served.models[0], served.config, "cpu")


@pytest.fixture(scope="module")
def talks(served) -> dict[int, Talk]:
    """More conversations than the server takes at once, so that those under way change their places in its batch."""
    return served.play(range(20))


def agrees(served: Served, talks: dict[int, Talk], model) -> bool:
    """Tell whether engine and trainer give the sampled tokens the same log-probabilities.

    In bfloat16 both round, each in its own order. So they may differ by what the trainer's own rounding does, in the
    mean by the square root of two of it; a wrong state or image moves log-probabilities by ones.
    """
    engine = np.concatenate([talk.logps for talk in talks.values()])
    ours = served.score(talks.values(), model)
    difference = np.abs(engine - ours)
    if served.config.precision == "float32":
        return bool(difference.max() < 1e-4)
    rounding = np.abs(ours - served.score(talks.values(), model, "float32"))
    return bool(difference.mean() < 2 * rounding.mean() < 0.1 and difference.max() < 3 * rounding.max())


def test_log_probabilities_are_the_trainers(served, first, talks):
    """Of several turns, with several images of many sizes, in a crowd; Talk.check compared the ids of every prompt."""
    assert agrees(served, talks, first)
    assert len({tuple(talk.sampled) for talk in talks.values()}) == len(talks)


def test_the_server_has_every_part_of_its_family(served, first, talks):
    """Of what leaving a part out does to log-probabilities, the server's show none, though they are rounded.

    The slope is 1 where the server plays the model, and 0 where it plays one without the part (trainer/parity.py).
    """
    some = [talks[seed] for seed in list(talks)[:8]]
    engine, ours = np.concatenate([talk.logps for talk in some]), served.score(some, first)
    for name, part, change in CHANGES:
        if name == served.family.name:
            model = load_model(served.models[0], served.config, "cpu")
            with torch.no_grad(), change(model):
                metrics = measure_slope([engine], [ours], [served.score(some, model)])
            assert metrics["parity/slope"] > 0.5, part


def test_seeds_reproduce(served, talks):
    """In another order, as data, and one by one.

    A CPU sums a bfloat16 product in another order where the batch has another size: most conversations are the same.
    """
    order = random.Random(0).sample(sorted(talks), len(talks))
    again, alone = served.play(order, media="data"), served.play(order[:6], concurrency=1)
    same = [talk.sampled == talks[seed].sampled for played in (again, alone) for seed, talk in played.items()]
    assert all(same) or served.config.precision == "bfloat16" and sum(same) > 0.8 * len(same)
    for played in (again, alone):
        pairs = [
            (talk.logps, talks[seed].logps) for seed, talk in played.items() if talk.sampled == talks[seed].sampled
        ]
        largest = max(np.abs(one - other).max() for one, other in pairs)
        assert largest < (1e-5 if served.config.precision == "float32" else 0.1)


def test_weights_are_replaced_in_place(served, first, talks, tmp_path):
    """By those of another full policy, by a base with an adapter merged into it, and by the first again."""
    seeds = range(6)
    try:
        served.load(served.models[1], "v1")
        others = served.play(seeds)
        assert agrees(served, others, load_model(served.models[1], served.config, "cpu"))
        assert not agrees(served, others, first)

        base = Base("tiny", directory=str(served.models[0]))
        lora = ModelConfig(dtype="float32", adaptation="lora", lora_rank=4, lora_alpha=8)
        policy = checkpoint.start_from_base(base, lora, "cpu", seed=0)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
        checkpoint.save(policy, tmp_path / "lora", learning_rate=0.0, seed=0)
        checkpoint.export_merged(tmp_path / "lora", tmp_path / "merged", base=base)
        served.load(tmp_path / "merged", "v2")
        others = served.play(seeds)
        assert agrees(served, others, policy.model)
        assert not agrees(served, others, first)
    finally:
        served.load(served.models[0], "v0")
    assert agrees(served, served.play(seeds), first)
