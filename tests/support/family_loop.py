"""A whole loop of a family of models on real parts, stage by stage: puzzles, trainer, one vLLM server, all judges.

The server plays the policy and is its teacher, too: of each family one is started.
"""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from thinkimg.config.load import load_config
from thinkimg.config.tree import Config
from thinkimg.engine.server import Server, ServerSettings
from thinkimg.resources import Resources
from thinkimg.stages.build import build_artifact, complete_inputs
from thinkimg.stages.rollout import settings_of
from thinkimg.stages.stage import load_stage
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact

SETTINGS = [
    "data.train=8", "data.held_out=4", "warmstart.steps=40", "warmstart.batch=16", "warmstart.pairs=8",
    "rollout.samples=3", "rollout.group_size=4", "train.steps=2", "train.min_std=0.0", "evaluate.samples=2",
    "evaluate.samples_ends=2", "evaluate.k=1", "mix={format: 0.3, tool: 0.3, answer: 0.3, image: 0.1}",
    "image.teacher={model: policy, fallback: error}", "image.only_if_right=false", "where.workers=2",
    "where.tracking.enabled=false", "where.teacher.timeout_s=60",
]  # fmt: skip
ROLES = {
    "prepare": "dataset", "known_pairs": "pairs", "train_clip": "clip", "demonstrate": "demonstrations",
    "warmstart": "policy", "rollout": "rollouts", "score": "scores", "train": "policy",
}  # fmt: skip


class FamilyLoop:
    """The stages of a loop, each on the artifacts of those before it; `artifacts` holds the latest by role."""

    def __init__(self, root: Path, family: str, resources: Resources, settings: list[str]):
        self.root, self.family, self.resources = root, family, resources
        self.store, self.settings = Store(root / "artifacts"), settings
        self.artifacts: dict[str, Artifact] = {}
        self.first: Artifact | None = None

    def config(self, *overrides: str) -> Config:
        """Return the settings of the loop, changed."""
        return load_config("tiny", [*self.settings, *overrides])

    def run(self, name: str, *overrides: str, force: bool = False, **parameters: Any) -> Artifact:
        """Run a stage; its artifact takes its role."""
        stage, config = load_stage(name), self.config(*overrides)
        stage.check(config)
        given = self.artifacts | ({"first": self.first} if self.first else {})
        inputs = complete_inputs(stage, config, given, self.store)
        settings = stage.settings(config, **parameters)
        artifact, _ = build_artifact(stage, settings, inputs, self.store, self.resources, force=force)
        if name in ROLES:
            self.artifacts[ROLES[name]] = artifact
        return artifact

    @contextlib.contextmanager
    def serving(self) -> Iterator[Server]:
        """Serve the policy by vLLM within this context, to the stages too."""
        config = self.config()
        model = self.artifacts["policy"].directory / "policy" / "model"
        settings = ServerSettings(settings_of(config).engine, config.where.engine)
        with Server(model, log_path=self.root / "engine.log", version="v0", settings=settings) as server:
            where = self.resources.where
            engine = where.engine.model_copy(update={"urls": (server.url,), "adapters": "never"})
            teacher = where.teacher.model_copy(update={"url": f"{server.url}/v1"})
            self.resources.where = where.model_copy(update={"engine": engine, "teacher": teacher})
            self.settings.append(f"where.teacher.url={teacher.url}")
            yield server


@contextlib.contextmanager
def family_loop(root: Path, family: str, *overrides: str) -> Iterator[FamilyLoop]:
    """Yield a loop of a family whose first policy is trained."""
    settings = [*SETTINGS, f"where.store={root / 'artifacts'}", f"model.tiny.family={family}", *overrides]
    where = load_config("tiny", settings).where
    with pytest.MonkeyPatch.context() as patch, Resources(where, say=lambda line: None) as resources:
        patch.setattr(import_module("thinkimg.stages.train_clip"), "STEPS", 2)  # of 100, which take as long as the rest
        loop = FamilyLoop(root, family, resources, settings)
        for name in ("prepare", "known_pairs", "train_clip", "demonstrate", "warmstart"):
            loop.run(name)
        loop.first = loop.artifacts["policy"]
        yield loop
