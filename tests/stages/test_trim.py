"""Only the last two policies of a loop keep their optimizer's state."""

from pathlib import Path

import pytest
import torch

from thinkimg.errors import UserError
from thinkimg.models.base import Base
from thinkimg.models.settings import ModelConfig
from thinkimg.resource_settings import ResourcesConfig
from thinkimg.stages.train import check_optimizer, tidy, train
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact, Recipe
from thinkimg.trainer import checkpoint
from thinkimg.trainer.policy import train_only

FULL = ModelConfig(dtype="float32", adaptation="full")
NAME = "policy/optimizer.safetensors"


def chain(store: Store, base: Path, length: int) -> list[Artifact]:
    """A warm-started policy and policies of `length` iterations."""
    held = checkpoint.start_from_base(Base("tiny", directory=str(base)), FULL, "cpu", seed=0)
    parameters = train_only(held.model, held.config, vision=False)
    made: list[Artifact] = []
    for number in range(length + 1):
        if number:
            for parameter in parameters.values():
                parameter.grad = torch.ones_like(parameter)
            held.resume_optimizer(parameters, 0.0).step()
            held.updates += 1

        def write(work) -> None:
            with work.part("policy") as path:
                checkpoint.save(held, path, learning_rate=0.0, seed=0)

        inputs = {"policy": made[-1].reference} if made else {}
        recipe = Recipe(train.name if number else "warmstart", 1, 1, {"number": number}, inputs)
        made.append(store.build("policy", recipe, write)[0])
    return made


def test_the_last_two_are_kept_and_the_others_still_serve(tmp_path, tiny_models):
    store = Store(tmp_path)
    made = chain(store, tiny_models[0], 4)
    for _ in range(2):  # again changes nothing
        tidy(store, made[-1], ResourcesConfig())
        assert [(policy.directory / NAME).exists() for policy in made] == [True, False, False, True, True]
    for number, policy in enumerate(made):
        if number in (1, 2):
            with pytest.raises(UserError, match=f"{policy.fingerprint[:12]} .* no optimizer state any more"):
                check_optimizer(policy)
        else:
            check_optimizer(policy)
        assert store.verify(policy) == [] and Artifact.open(policy.directory).checked("policy").is_dir()
    old = checkpoint.load(made[2].directory / "policy", FULL, "cpu")
    with pytest.raises(UserError, match="optimizer state is gone"):
        old.resume_optimizer(train_only(old.model, old.config, vision=False), 0.0)
    new = checkpoint.load(made[3].directory / "policy", FULL, "cpu")
    assert new.resume_optimizer(train_only(new.model, new.config, vision=False), 0.0).state


def test_one_that_is_missing_without_a_mark_is_damage(tmp_path, tiny_models):
    store = Store(tmp_path)
    policy = chain(store, tiny_models[0], 1)[-1]
    (policy.directory / NAME).unlink()
    assert [problem.detail for problem in store.verify(policy)] == ["missing"]
    with pytest.raises(UserError, match="not what was published"):
        Artifact.open(policy.directory)
