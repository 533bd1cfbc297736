"""An engine that ignores its adapter: too little a difference for the gate's limit, and refused by the slope."""

import dataclasses

import numpy as np
import pytest
from grpo_world import BANNED, LORA, TRAIN

from thinkimg.errors import UserError
from thinkimg.trainer import checkpoint, parity
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.passes import Passes
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import read_rows

NOISE = 0.02  # of a token's log-probability in bfloat16, engine against trainer (docs/results.md)
GATES = [24_000, 4_800]  # tokens of the gate's 16 conversations: three turns of 512 each, or of a hundred
STEPS = 5


@pytest.fixture(scope="module")
def trained(world):
    """The policy after STEPS at the default rate of 1e-5: its directory, and log-probabilities with and without."""
    train = TRAIN.model_copy(
        update={"learning_rate": 1e-5, "parity": TRAIN.parity.model_copy(update={"max_kl": 1.0, "min_slope": -9.0})}
    )
    policy = {"directory": str(world.policies["lora"]), "digest": "v0"}
    for step in range(STEPS):
        job = world.job(f"slope-{step}", model=LORA, train=train, policy=policy)
        world.train(job)
        policy = {"directory": job["output"], "digest": "v0"}
    held = checkpoint.load(policy["directory"], LORA, "cpu", world.base)
    rows = read_rows(world.artifact, world.image_token)
    pixels = world.patches()
    scorer = Scorer(held.model, pixels, temperature=0.9, banned=BANNED, features={})
    passes = Passes(held, Ranks(), scorer, pixels, rows, 400, packed=False)
    adapted, _ = passes.score(range(len(rows)))
    with held.model.disable_adapter():
        plain, _ = passes.score(range(len(rows)))
    pixels.close()
    return policy, rows, [adapted[i] for i in range(len(rows))], [plain[i] for i in range(len(rows))]


def repeated(values: list[np.ndarray], tokens: int) -> np.ndarray:
    """As many tokens as the gate of a 7B compares."""
    return np.resize(np.concatenate(values), tokens)


@pytest.mark.parametrize("tokens", GATES)
def test_two_hundred_engines_that_apply_it_pass_and_those_that_ignore_it_do_not(trained, tokens):
    """Of short turns an ignored adapter may pass one iteration's gate; none passes those of two."""
    adapted, plain = (repeated(values, tokens) for values in trained[2:])
    rng, refused = np.random.default_rng(0), {"applied": 0, "ignored": 0}
    for _ in range(200):
        for what, played in (("applied", adapted), ("ignored", plain)):
            engine = played + rng.normal(0, NOISE, tokens)
            metrics = parity.measure_slope([engine], [adapted], [plain])
            assert parity.compare(engine, adapted)["parity/mean_abs"] < TRAIN.parity.max_kl
            try:
                parity.check_slope(metrics, TRAIN.parity.min_slope, exact=True)
            except UserError as error:
                refused[what] += 1
                assert "does not apply the adapter" in error.message and "--enable-lora" in error.hint
    assert refused["applied"] == 0 and refused["ignored"] >= (200 if tokens == max(GATES) else 190)


def test_an_engine_that_applies_it_is_never_refused_however_noisy_the_trainer_is(trained):
    """In bfloat16, where memory has no room for float32, the trainer's own two passes are as noisy as the engine."""
    adapted, plain = (repeated(values, max(GATES)) for values in trained[2:])
    rng = np.random.default_rng(1)
    for share in (0.01, 0.1, 1.0):
        exact = plain + share * (adapted - plain)
        for _ in range(200):
            engine, ours, base = (values + rng.normal(0, NOISE, len(plain)) for values in (exact, exact, plain))
            parity.check_slope(parity.measure_slope([engine], [ours], [base]), TRAIN.parity.min_slope, exact=False)


@pytest.mark.parametrize("applied", [True, False])
def test_a_job_refuses_rollouts_that_the_base_played(world, trained, applied):
    policy, rows, adapted, plain = trained
    played = adapted if applied else plain
    trajectories = [
        dataclasses.replace(one, logprobs=tuple(map(float, values)))
        for one, values in zip(world.trajectories, played, strict=True)
    ]
    assert [row.trajectory_id for row in rows] == [one.trajectory_id for one in trajectories]
    rollouts = world.rollouts(f"played-{applied}", trajectories)
    # Of some hundred tokens the interval is wide.
    train = TRAIN.model_copy(update={"parity": TRAIN.parity.model_copy(update={"min_slope": 0.9})})
    job = world.job(f"judged-{applied}", model=LORA, train=train, policy=policy, rollouts=str(rollouts.directory))
    if applied:
        metrics = world.train(job)["metrics"]
        assert metrics["parity/slope"] == pytest.approx(1, abs=0.05)
        return
    with pytest.raises(UserError, match="does not apply the adapter"):
        world.train(job)


def test_an_adapter_without_an_effect_says_nothing(world):
    assert "parity/slope" not in world.train(world.job("new adapter", model=LORA))["metrics"]
