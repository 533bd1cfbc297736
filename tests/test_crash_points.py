"""Every stage, stopped before and after every operation of the file layer, with and without a power cut; and every file
of what they make, damaged.

What takes an engine or a trainer is recorded: scripted conversations, and a policy that is copied. All else is the stage's own
code, so that the operations are those of a real run.
"""

import contextlib
import os
import random
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from disk import Crash, Disk

from thinkimg import resources
from thinkimg.config import load
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.episode import Episode, scripted
from thinkimg.conversation.picture import picture
from thinkimg.conversation.protocol import PROTOCOLS
from thinkimg.errors import UserError
from thinkimg.puzzles.demonstrations import script
from thinkimg.stages import evaluate, prepare, rollout, score, train, warmstart
from thinkimg.store import files
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable

SETTINGS = [
    "data.train=4", "data.held_out=2", "rollout.samples=2", "rollout.group_size=2", "evaluate.samples=2", "evaluate.k=1",
    "where.workers=2", "where.tracking.enabled=false", "mix={answer: 1.0}", "image.types=[]", "warmstart.pairs=0",
]  # fmt: skip
STAGES = ("prepare", "demonstrate", "warmstart", "rollout", "score", "train", "evaluate")


class Crew:
    """The loop's machines with a trainer that copies a recorded policy."""

    def __init__(self, scratch: Path, base: Path):
        self.scratch, self.base, self.trainer = scratch, base, self

    def submit(self, job, progress=None):
        shutil.copytree(self.base, Path(job["output"]) / "model", dirs_exist_ok=True)
        (Path(job["output"]) / "state.json").write_text("{}")
        return {"metrics": {"loss": 0.5}}

    def vocabulary(self, policy):
        return policy.checked("policy/model")


class Recorded:
    """Players whose conversations are written."""

    def __init__(self, config, dataset, policy, crew):
        self.config, self.policy, self.codec = config, policy, Codec.load(crew.base)
        self.images = ImageTable([dataset])
        self.pool = ThreadPoolExecutor(1)  # as one thread's operations have an order

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        self.pool.shutdown()

    async def play(self, jobs, progress):
        for job in jobs:
            yield job, self.episode(job)

    def episode(self, job):
        sample, config = job.sample, self.config
        episode = Episode(
            sample, [picture(self.images.decoded(sha), config.images) for sha in sample.images], config.conversation,
            config.images, self.codec, trajectory_id=f"{sample.sample_id}-{job.index}", group_id=sample.sample_id,
            index=job.index, policy=self.policy.digest,
        )  # fmt: skip
        form = PROTOCOLS[config.conversation.protocol]
        scripted(episode, script(sample, form, config.warmstart.flaws, np.random.default_rng(job.index), tools=True))
        return episode


class Stages:
    """The stages by name, each on the recorded outputs of those before it."""

    def __init__(self, root: Path):
        self.config, self.store = load("tiny", SETTINGS), Store(root / "whole")
        self.dataset = self.run("prepare", self.store)
        self.stack = contextlib.ExitStack()
        self.base = warmstart.BaseModel(self.config, self.dataset, self.stack)
        (root / "scratch").mkdir()
        self.crew = Crew(root / "scratch", self.base.directory)
        self.made = {"prepare": self.dataset}
        for name in STAGES[1:]:
            self.made[name] = self.run(name, self.store)

    def run(self, name: str, store: Store, *, config=None, force: bool = False):
        config = config or self.config
        if name == "prepare":
            return prepare.prepare(config, store)[0]
        token = resources.CURRENT.set(self.crew)
        try:
            if name == "demonstrate":
                recipe = warmstart.script_recipe(config, self.dataset)
                return store.build(
                    "demonstrations",
                    recipe,
                    lambda work: warmstart.demonstrate(work, config, self.dataset, self.base, lambda *_: None),
                )[0]
            if name == "warmstart":
                scripts = self.made["demonstrate"]
                recipe = warmstart.recipe(config, self.dataset, scripts)
                return store.build(
                    "policy",
                    recipe,
                    lambda work: warmstart.train(
                        work, config, self.dataset, scripts, self.base, self.crew, lambda *_: None
                    ),
                )[0]
            policy = self.made["warmstart"]
            if name == "rollout":
                return rollout.rollout(config, self.dataset, policy, store, force=force)[0]
            if name == "score":
                return score.score(config, self.dataset, self.made["rollout"], store)[0]
            if name == "train":
                inputs = (self.dataset, policy, self.made["rollout"], self.made["score"])
                return train.train(config, *inputs, store)[0]
            return evaluate.evaluate(config, self.dataset, policy, store, force=force)[0]
        finally:
            resources.CURRENT.reset(token)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(rollout, "Players", Recorded)
    patch.setattr(Recorded, "episode", cached(Recorded.episode))
    made = Stages(tmp_path_factory.mktemp("stages"))
    yield made
    made.stack.close()
    patch.undo()


def cached(make):
    """Conversations are the same every time, and the pictures take most of a run."""
    known = {}

    def episode(self, job):
        key = (job.sample.sample_id, job.index)
        if key not in known:
            known[key] = make(self, job)
        return known[key]

    return episode


@cache
def losses(kind: str) -> tuple:
    return {"kill": (None, None, None), "power": (1.0, 1.0, 1.0)}[kind]


def crash_everywhere(stages, name, root, monkeypatch, kind, step):
    whole = stages.made[name]
    disk = Disk(monkeypatch)
    stages.run(name, Store(root / "counted"))
    events = disk.events
    assert events > 20
    for stop_at in range(1 + random.Random(name).randrange(step), events + 1, step):
        rng, disk, store = random.Random(stop_at), Disk(monkeypatch), Store(root / str(stop_at))
        store.root.mkdir()
        stops = (
            stop_at,
            rng.randint(1, events),
            None,
        )  # a run, a recovery that is stopped, too, and one that gets through
        for stop, loss in zip(stops, losses(kind), strict=True):
            disk.events, disk.stop_at = 0, stop
            try:
                stages.run(name, store)
                finished = True
            except Crash:
                finished = False
            if loss is not None:
                disk.cut_power(rng, loss)
            found = store.find(whole.kind, whole.fingerprint)
            assert found or not finished, f"{name} {stop_at}: what was returned must outlive a power cut"
            assert not found or (store.verify(found) == [] and found.digest == whole.digest), f"{name} {stop_at}"
        assert finished and store.sweep() == [], f"{name} {stop_at}: something is left"
        shutil.rmtree(store.root)


@pytest.mark.parametrize("kind", ["kill", "power"])
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_stopped_publishes_all_or_nothing_and_then_gets_through(
    stages, name, kind, tmp_path, monkeypatch
):
    crash_everywhere(stages, name, tmp_path, monkeypatch, kind, step=17)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["kill", "power"])
@pytest.mark.parametrize("name", STAGES)
def test_at_every_operation(stages, name, kind, tmp_path, monkeypatch):
    crash_everywhere(stages, name, tmp_path, monkeypatch, kind, step=1)


WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}


class Audit:
    """Python's audit events that change something under a root while the file layer is not at work in that thread.

    What native code writes (Parquet, safetensors) raises no event of its own; it goes to the name that a "write" has given.
    """

    def __init__(self):
        self.root, self.found, self.depth = None, [], threading.local()
        sys.addaudithook(self)  # for the life of the process: it watches only while there is a root

    def hook(self, event, *paths):
        self.depth.ops = getattr(self.depth, "ops", 0) + (1 if event.startswith("before") else -1)

    def __call__(self, event, arguments):
        if self.root is None or getattr(self.depth, "ops", 0) > 0:
            return
        path, writes = arguments[0] if arguments else None, event in WRITES
        if event == "open" and isinstance(path, (str, bytes, os.PathLike)):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(self.root):
            self.found.append((event, str(path)))


@pytest.fixture(scope="module")
def audit():
    return Audit()


@pytest.mark.parametrize("name", STAGES)
def test_nothing_is_written_past_the_file_layer(stages, name, tmp_path, monkeypatch, audit):
    monkeypatch.setattr(files, "hook", audit.hook)
    audit.root, audit.found = tmp_path, []
    try:
        stages.run(name, Store(tmp_path))
        assert audit.found == []
        (tmp_path / "past").write_text("")
    finally:
        audit.root = None
    assert audit.found == [("open", str(tmp_path / "past"))]  # it does watch


@pytest.mark.parametrize("name", STAGES)
def test_damage_to_any_file_is_named_and_the_file_is_refused(stages, name, tmp_path):
    artifact, rng = stages.made[name], random.Random(name)
    copy = Store(tmp_path)
    shutil.copytree(stages.store.root, tmp_path, dirs_exist_ok=True)
    directory = tmp_path / str(artifact.reference)
    for file in ("manifest.json", *artifact.files):
        path = directory / file
        good = path.read_bytes()
        flips = [rng.randrange(len(good)) for _ in range(6)]
        bad = [good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :] for at in flips]
        bad += [good[: rng.randrange(len(good))], b"", good + b"\0"]
        for data in bad:
            path.write_bytes(data)
            assert [problem.name for problem in copy.verify(directory)] == [file]
            with pytest.raises(UserError, match=f"{path.name}.* is not what was published"):
                copy.find(artifact.kind, artifact.fingerprint).checked(file)
        path.unlink()
        assert [problem.name for problem in copy.verify(directory)] == [file]
        path.write_bytes(good)
    assert copy.verify(directory) == []
