"""The warm start: what the first policy is made from, and what the trainer is told."""

from pathlib import Path

import pytest
from recorded_stages import SETTINGS, CopyingTrainer, RecordedResources
from single_stage import build_stage, recipe_of
from users_photographs import photographs

from thinkimg.config.load import load_config
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder
from thinkimg.stages.demonstrate import collect_texts, demonstrate, locate_start
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.prepare import prepare
from thinkimg.stages.warmstart import warmstart
from thinkimg.store.artifacts import Store


class NotingTrainer(CopyingTrainer):
    def __init__(self):
        self.orders = []

    def submit(self, order, progress=None):
        self.orders.append(order)
        return super().submit(order)


@pytest.fixture
def trainer(monkeypatch) -> NotingTrainer:
    trainer = NotingTrainer()
    monkeypatch.setattr(RecordedResources, "trainer", trainer)
    return trainer


def test_the_trainer_is_told_the_demonstrations_and_where_their_images_are(tmp_path, trainer):
    config, store = load_config("tiny", [*SETTINGS, "warmstart.pairs=2"]), Store(tmp_path)
    with RecordedResources(config.where) as resources:
        builder = Builder(config, store, resources)
        dataset, pairs = builder.make(prepare), builder.make(known_pairs)
        scripts = builder.make(demonstrate, dataset=dataset, pairs=pairs)
        policy = builder.make(warmstart, dataset=dataset, demonstrations=scripts)
        (order,) = trainer.orders
        # The tokenizer of the demonstrations, made once.
        start = locate_start(demonstrate.settings(config), dataset, resources)
        assert order["base"] == {"name": "tiny", "revision": None, "directory": str(start.resolve())}
        assert [path.name for path in resources.scratch.glob("tiny-*")] == [start.name]
    assert order["rollouts"] == str(scripts.directory.resolve())
    assert order["images"]["tables"] == [str(one.directory.resolve()) for one in (dataset, scripts, pairs)]
    assert order["warmstart"] == config.warmstart.model_dump(mode="json") and order["warmstart"]["steps"] > 0
    assert Path(order["output"]).parent.parent == policy.directory.parent and policy.metrics["loss"] == 0.5


def test_without_demonstrations_the_base_becomes_a_policy_as_it_is(tmp_path, trainer):
    config, store = load_config("tiny", photographs(tmp_path)), Store(tmp_path / "store")
    with RecordedResources(config.where) as resources:
        Builder(config, store, resources).make(warmstart, dataset=build_stage(prepare, config, store)[0])
    (order,) = trainer.orders
    assert order["rollouts"] is None and order["warmstart"]["steps"] == 0


def test_a_tiny_model_is_made_for_a_users_own_questions(tmp_path):
    data = photographs(tmp_path)
    config = load_config("tiny", data)
    dataset, _ = build_stage(prepare, config, Store(tmp_path / "store"))
    assert not config.has_demonstrations
    assert any("What is number" in text for text in collect_texts(warmstart.settings(config), dataset))
    plain = recipe_of(warmstart, config, dataset=dataset).fingerprint
    other = load_config("tiny", [*data, "conversation.system=Look twice."])
    assert recipe_of(warmstart, other, dataset=dataset).fingerprint != plain  # its tokenizer is another
    with Resources(config.where) as resources:
        made = {locate_start(warmstart.settings(one), dataset, resources) for one in (config, other, config)}
    assert len(made) == 2
