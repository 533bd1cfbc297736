"""Excluded rows change nothing: the policy of a step with them is, byte for byte, that of a step without."""

import dataclasses
import hashlib
import logging
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pytest
from grpo_world import FULL, World

from thinkimg import records
from thinkimg.config.load import load_config
from thinkimg.records import StopReason
from thinkimg.resource_settings import ResourcesConfig
from thinkimg.resources import Resources
from thinkimg.stages.build import build_artifact
from thinkimg.stages.train import train
from thinkimg.store.manifest import Recipe

REWARDS = {"t0": 0.0, "t1": 1.0, "t2": 0.5, "t3": 0.0, "t4": 1.0, "t5": 0.2}


@pytest.fixture(scope="module")
def policy(world):
    """The base as a policy artifact, whose digest is the weights' version."""

    def write(work):
        with work.part("policy") as path:
            shutil.copytree(world.policies["full"], path)

    return world.store.build("policy", Recipe("warmstart", 1, 1, {}), write)[0]


def config():
    train = {"learning_rate": 0.01, "token_budget": 400, "min_std": 0.02, "parity": {"trajectories": 4}}
    overrides = [f"train.{key}={value}" for key, value in train.items() if key != "parity"]
    images = ["images.min_pixels=784", "images.max_pixels=7056", "mix={answer: 1.0}", "rollout.temperature=0.9"]
    tree = load_config("tiny", [*overrides, *images, "conversation.max_tokens=100"])
    return tree.model_copy(update={"model": FULL})


class InProcess(Resources):
    """Resources whose trainer is this process."""

    def __init__(self, where: ResourcesConfig, world: World):
        super().__init__(where)
        self.world, self.orders = world, []

    @property
    def trainer(self) -> SimpleNamespace:
        return SimpleNamespace(submit=self.submit)

    def submit(self, order: dict, progress) -> dict:
        self.orders.append(order)
        # The world's rollouts are sampled with its own list of banned ids.
        talk = order["conversation"] | {"banned": self.world.job("x")["conversation"]["banned"]}
        images = order["images"] | {"tables": [str(self.world.images)]}  # these rollouts made none of their own
        return self.world.train(order | {"conversation": talk, "images": images, "base": None})


def run(world, policy, name: str, trajectories, rewards) -> tuple:
    """Run the stage; returns (digest of each of the policy's files, metrics, the trainer's orders)."""
    rollouts = world.rollouts(f"{name}-rollouts", trajectories)
    rows = [
        {"trajectory_id": t.trajectory_id, "sample_id": t.sample_id, "group_id": t.group_id}
        | {"answer": {"value": rewards[t.trajectory_id], "status": "ok", "reason": None, "evidence": None}}
        for t in trajectories
    ]
    table = pa.Table.from_pylist(rows, records.score_schema(["answer"]))
    scores = world.build("scores", name, lambda work: work.table("scores.parquet", table))
    inputs = {"dataset": world.store.resolve(world.images), "policy": policy, "player": policy}
    inputs |= {"rollouts": rollouts, "scores": scores}
    settings = config()
    with InProcess(settings.where, world) as resources:
        trained, _ = build_artifact(train, train.settings(settings), inputs, world.store, resources, force=True)
    return policy_files(trained), dict(trained.metrics), resources.orders


def test_excluded_rows_change_nothing(world, policy):
    ours = [dataclasses.replace(t, weights=policy.digest) for t in world.trajectories]
    kept = ours[:6]
    expected, metrics, _ = run(world, policy, "kept", kept, REWARDS)
    like = ours[6]
    junk = {"logprobs": (-77.0,) * len(like.logprobs)}
    added = [
        dataclasses.replace(like, trajectory_id="failed", group_id="g0", stop=StopReason.FAILED, error="?", **junk),
        dataclasses.replace(like, trajectory_id="over", group_id="g1", stop=StopReason.MAX_TURNS, **junk),
        dataclasses.replace(like, trajectory_id="alone", group_id="h", **junk),
        *(dataclasses.replace(like, trajectory_id=f"silent{i}", group_id="s", **junk) for i in range(3)),
    ]
    rewards = REWARDS | {"failed": 9.0, "over": -9.0, "alone": 5.0} | {f"silent{i}": 0.7 for i in range(3)}
    mixed = [added[0], *kept[:3], added[3], added[1], *kept[3:], added[2], *added[4:]]
    found, more, _ = run(world, policy, "mixed", mixed, rewards)
    assert found == expected
    assert more["loss"] == metrics["loss"] and more["grad_norm"] == metrics["grad_norm"]
    assert more["train/rows"] == metrics["train/rows"] == 6 and metrics["train/no_step"] == 0
    assert (more["train/rows_invalid"], more["train/rows_alone"], more["train/rows_silent"]) == (2, 1, 3)
    assert expected != policy_files(policy)


def policy_files(policy) -> dict[str, str]:
    directory = policy.directory / "policy"
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def test_with_nothing_left_no_step_is_taken_and_an_alarm_is_raised(world, policy, caplog):
    ours = [dataclasses.replace(t, weights=policy.digest) for t in world.trajectories]
    with caplog.at_level(logging.WARNING):
        found, metrics, orders = run(world, policy, "none", ours, {t.trajectory_id: 0.5 for t in ours})
    assert orders == [] and found == policy_files(policy)
    assert metrics["train/no_step"] == 1 and metrics["train/rows"] == 0 and metrics["train/silent_groups"] == 1
    assert "no step is taken" in caplog.text


def test_the_stage_is_the_one_that_the_store_knows():
    assert (train.name, train.version) == ("train", 4)
