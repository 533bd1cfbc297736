"""The stages without an engine or a trainer, of which nothing but the outputs is recorded.

Conversations are scripted, and a policy is copied. All else is the stages' own code.
"""

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from thinkimg.config.load import load_config
from thinkimg.config.tree import Config
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.episode import ConversationSpec, Episode, play_script
from thinkimg.conversation.picture import make_picture
from thinkimg.puzzles.demonstrations import write_script
from thinkimg.resources import Resources
from thinkimg.stages import rollout
from thinkimg.stages.build import build_artifact, complete_inputs
from thinkimg.stages.stage import load_stage
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable
from thinkimg.store.manifest import Artifact

SETTINGS = [
    "data.train=4", "data.held_out=2", "rollout.samples=2", "rollout.group_size=2", "evaluate.samples=2",
    "evaluate.k=1",
    "where.workers=2", "where.tracking.enabled=false", "mix={answer: 1.0}", "image.types=[]", "warmstart.pairs=0",
]  # fmt: skip
STAGES = ("prepare", "demonstrate", "warmstart", "rollout", "score", "train", "evaluate")
ROLES = {
    "prepare": "dataset", "demonstrate": "demonstrations", "warmstart": "policy", "rollout": "rollouts",
    "score": "scores",
}  # fmt: skip


class CopyingTrainer:
    """A trainer whose policies have the weights that they start from."""

    def submit(self, order, progress=None):
        start = order["base"]["directory"] if order["kind"] == "warmstart" else f"{order['policy']['directory']}/model"
        output = Path(order["output"])
        shutil.copytree(start, output / "model", dirs_exist_ok=True)
        (output / "state.json").write_text("{}")
        return {"metrics": {"loss": 0.5}}


class RecordedResources(Resources):
    """Resources without an engine, and with a trainer that copies."""

    trainer = CopyingTrainer()


class NoEngine:
    """The engine of a sampler that asks none."""

    async def releases(self):
        return {}


FLAWS = load_config("tiny", SETTINGS).warmstart.flaws


class Recorded:
    """A sampler whose conversations are written, and `rollout.open_sampler`, which yields it."""

    engine = NoEngine()

    def __init__(self, settings, dataset, policy, resources):
        self.settings, self.policy, self.codec = settings, policy, Codec.load(policy.vocabulary)
        self.images, self.flaws = ImageTable([dataset]), FLAWS
        self.pool = ThreadPoolExecutor(1)  # as one thread's operations have an order

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        self.pool.shutdown()

    async def sample(self, specs, progress):
        for spec in specs:
            yield spec, self.episode(spec)

    def episode(self, spec):
        sample, settings = spec.sample, self.settings
        pictures = [make_picture(self.images.decoded(sha), settings.images) for sha in sample.images]
        rules = ConversationSpec(settings.conversation, settings.images, self.codec)
        episode = Episode(
            sample, pictures, rules, policy=self.policy.digest, group_id=sample.sample_id, index=spec.index
        )
        turns = write_script(sample, settings.conversation, self.flaws, np.random.default_rng(spec.index))
        play_script(episode, turns)
        return episode


class Stages:
    """The stages by name, each on the recorded outputs of those before it."""

    def __init__(self, root: Path, resources: Resources):
        self.config, self.store, self.resources = load_config("tiny", SETTINGS), Store(root / "whole"), resources
        self.made: dict[str, Artifact] = {}
        for name in STAGES:
            self.made[name] = self.run(name, self.store)

    def made_by_role(self) -> dict[str, Artifact]:
        return {role: self.made[made] for made, role in ROLES.items() if made in self.made}

    def run(self, name: str, store: Store, *, config: Config | None = None, force: bool = False) -> Artifact:
        stage, config = load_stage(name), config or self.config
        inputs = complete_inputs(stage, config, self.made_by_role(), self.store)
        return build_artifact(stage, stage.settings(config), inputs, store, self.resources, force=force)[0]


@contextlib.contextmanager
def recorded(root: Path) -> Iterator[Stages]:
    """The stages under a root; their conversations are recorded for as long."""
    where = load_config("tiny", SETTINGS).where
    with pytest.MonkeyPatch.context() as patch, RecordedResources(where) as resources:
        patch.setattr(rollout, "open_sampler", Recorded)
        patch.setattr(Recorded, "episode", cached(Recorded.episode))
        yield Stages(root, resources)


def cached(make):
    """Conversations are the same every time, and the pictures take most of a run."""
    known = {}

    def episode(self, spec):
        key = (spec.sample.sample_id, spec.index)
        if key not in known:
            known[key] = make(self, spec)
        return known[key]

    return episode
