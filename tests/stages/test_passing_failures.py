"""Failures that pass leave nothing behind: a fault in any call of any client, in each stage, and the stage run again.

Whatever broke, the second run makes what a run without the fault makes, bit for bit.
"""

import errno
import json
import socket
import sqlite3
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from http.client import IncompleteRead
from subprocess import CalledProcessError

import numpy as np
import pytest
from aiohttp import ServerDisconnectedError
from disk import Disk
from recorded_stages import SETTINGS, STAGES, CopyingTrainer, Recorded, RecordedResources, Stages, recorded
from scripted_engine import PASSING, REFUSING, ScriptedEngine
from single_stage import build_stage

from thinkimg.config.load import load_config
from thinkimg.conversation.text_core import PendingCall
from thinkimg.engine import client
from thinkimg.engine.errors import EngineError
from thinkimg.engine.play import EpisodeSpec, SamplingMode
from thinkimg.errors import UserError, is_passing
from thinkimg.rewards import maths
from thinkimg.stages import rollout
from thinkimg.stages import train_clip as train_clip_stage
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.prepare import prepare
from thinkimg.stages.rollout import play_settings
from thinkimg.stages.train_clip import train_clip
from thinkimg.store.artifacts import Store, Work
from thinkimg.store.image_table import ImageTable

OPEN_SAMPLER = rollout.open_sampler
FULL = OSError(errno.ENOSPC, "No space left on device")
PLACES = (0, 1, 4, 9)  # of a fault, among the calls of a run


class FailingTrainer(CopyingTrainer):
    """Trainer that copies and measures attention, and whose n-th job fails where `fault(n)` is true."""

    def __init__(self):
        self.begin()

    def begin(self, fault=lambda number: None):
        self.fault, self.count = fault, 0

    def submit(self, order, progress=None):
        fault, self.count = self.fault(self.count), self.count + 1
        if fault:
            raise RuntimeError("the trainer died")
        if order["kind"] != "attention":
            return super().submit(order, progress)
        masses = [{"question": 0.1 * (1 + i % 5), "generic": 0.2} for i in range(len(order["pairs"]))]
        return {"pairs": [{f"{layer}/last": mass for layer in order["layers"]} for mass in masses]}


class World:
    """Stages on scripted servers: `run` makes one artifact, `expected` is that of a run without a fault."""

    def __init__(self, stages: Stages, engine: ScriptedEngine, teacher: ScriptedEngine):
        self.stages, self.engine, self.teacher = stages, engine, teacher
        policy, dataset = stages.made["warmstart"], stages.made["prepare"]
        recorder = Recorded(rollout.RolloutSettings(
            **play_settings(stages.config), rollout=stages.config.rollout, iteration=1, seed=0
        ), dataset, policy, stages.resources)  # fmt: skip
        for sample in dataset.samples():
            for index in range(2):
                engine.record(policy.digest, recorder.episode(EpisodeSpec(sample, index, SamplingMode(0.0))))
        own = {"url": f"{teacher.url}/v1", "retries": 0, "concurrency": 1}
        self.config = load_config("tiny", [
            *SETTINGS[:-2], "warmstart.pairs=0", "image.types=[self, attention, teacher]",
            "image.teacher={model: m, fallback: error}", f"where.teacher={json.dumps(own)}",
            f"where.engine.urls=['{engine.url}']", "where.engine.concurrency=1",
        ])  # fmt: skip
        self.trainer = FailingTrainer()
        stages.resources = RecordedResources(self.config.where)
        stages.resources.trainer = self.trainer
        self.expected = {}

    def run(self, name: str, store: Store):
        return self.stages.run(name, store, config=self.config)

    def expect(self, name: str, root):
        """Return the digest of a run without a fault."""
        if name not in self.expected:
            self.begin()
            self.expected[name] = self.run(name, Store(root / "clean")).digest
        return self.expected[name]

    def begin(self):
        for server in (self.engine, self.teacher, self.trainer):
            server.begin()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    servers = ScriptedEngine(), ScriptedEngine()
    with recorded(tmp_path_factory.mktemp("stages")) as stages, pytest.MonkeyPatch.context() as patch:
        world = World(stages, *servers)
        patch.setattr(rollout, "open_sampler", OPEN_SAMPLER)
        patch.setattr(client, "BACKOFF_S", 0.0)
        with stages.resources:
            yield world
    for server in servers:
        server.close()


def once(fault, at):
    return lambda number: fault if number == at else None


def always(fault, at):
    return lambda number: fault if number >= at else None


def check_second_run(world: World, name: str, root, break_it) -> bool:
    """Run a stage within `break_it()`, and again; True if the first run failed."""
    whole, store = world.expect(name, root), Store(root / "store")
    failed = False
    world.begin()
    with break_it():
        try:
            made = world.run(name, store)
        except (UserError, EngineError, OSError, RuntimeError) as error:
            failed = True
            assert str(error)
            assert not list(store.list()), "a failure was published"
        else:
            assert made.digest == whole, "a failure became a result"
    world.begin()
    assert world.run(name, store).digest == whole
    return failed


def breaking(client, fault):
    """Return a context in which a client's calls fail as `fault(number)` says."""

    @contextmanager
    def broken():
        client.begin(fault)
        yield

    return broken


def sweep_server(world, name, server, faults, root, places):
    """Fail once, and from then on, with each fault at each place; a fault for good has to end the stage."""
    for fault in faults:
        for at in places(fault):
            check_second_run(world, name, root / f"{fault} once {at}", breaking(server, once(fault, at)))
            if fault not in REFUSING:
                check_lasting(world, name, server, fault, root, at)


def check_lasting(world, name, server, fault, root, at):
    assert check_second_run(world, name, root / f"{fault} {at}", breaking(server, always(fault, at)))


def rotate(fault) -> list[int]:
    """Return one place for each fault, another one for the next."""
    return [PLACES[[*PASSING, *REFUSING].index(fault) % len(PLACES)]]


@pytest.mark.parametrize(("name", "faults"), [("rollout", [*PASSING, 400]), ("evaluate", [503, "abort", 422])])
def test_a_fault_of_the_engine_becomes_no_row(world, tmp_path, name, faults):
    """A refusal, too, if it is not repeated: the first calls are those for health, versions and weights."""
    sweep_server(world, name, world.engine, faults, tmp_path, rotate)


def test_a_fault_of_a_judges_server_becomes_no_judgement(world, tmp_path):
    for number, (once_, lasting) in enumerate([(429, 401), ("reset", 503), ("garbage", "page")]):
        check_second_run(world, "score", tmp_path / f"once {number}", breaking(world.teacher, once(once_, number)))
        check_lasting(world, "score", world.teacher, lasting, tmp_path, number)
    for number, server in enumerate((world.engine, world.teacher)):  # a refusal that is not repeated
        check_second_run(world, "score", tmp_path / f"refused {number}", breaking(server, once(400, 8 - 6 * number)))
    check_lasting(world, "score", world.engine, "empty", tmp_path, 9)


def test_a_server_that_comes_back_with_other_weights_becomes_no_row(world, tmp_path):
    """It was started again: it serves the weights of its start."""
    for name in ("rollout", "evaluate"):
        world.begin()
        world.engine.begin(restarted_at=12)
        with pytest.raises((UserError, EngineError), match="played default and not"):
            world.run(name, Store(tmp_path / name))
        world.begin()
        assert world.run(name, Store(tmp_path / name)).digest == world.expect(name, tmp_path)


def test_a_part_that_is_refused_whole_is_no_finished_work(world, tmp_path):
    """Also where others are closed: of a run that goes on, what is played now is what counts."""
    world.begin()
    world.engine.begin(always(503, 12))
    with pytest.raises((UserError, EngineError)):
        world.run("rollout", Store(tmp_path))
    world.begin()
    world.engine.begin(always(400, 9))
    with pytest.raises(UserError, match="conversations"):
        world.run("rollout", Store(tmp_path))
    world.begin()
    assert world.run("rollout", Store(tmp_path)).digest == world.expect("rollout", tmp_path)


def test_what_stood_in_for_a_teacher_is_not_kept_by_a_run_that_went_no_further(world, tmp_path, monkeypatch):
    settings = world.config.image.teacher.model_copy(update={"fallback": "self"})
    image = world.config.image.model_copy(update={"teacher": settings, "types": ("attention", "teacher")})
    monkeypatch.setattr(world, "config", world.config.model_copy(update={"image": image}))
    monkeypatch.setattr(world, "expected", {})
    whole, asked = world.expect("score", tmp_path), world.teacher.count

    world.begin()
    world.teacher.begin(always(503, 3))
    with monkeypatch.context() as patch:
        patch.setattr(Work, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            world.run("score", Store(tmp_path))
    assert list(tmp_path.rglob("judgements-self-*"))
    world.begin()
    assert world.run("score", Store(tmp_path)).digest == whole
    assert world.teacher.count == asked - 2, "both verdicts that it gave were kept"


def test_an_evaluation_whose_answers_can_not_be_judged_keeps_its_conversations(world, tmp_path, monkeypatch):
    whole = world.expect("evaluate", tmp_path)
    world.begin()
    with monkeypatch.context() as patch:
        patch.setattr("thinkimg.stages.evaluate.judge_answers", lambda rows, *_: np.full(len(rows), np.nan))
        with pytest.raises(UserError, match="answers"):
            world.run("evaluate", Store(tmp_path))
    world.begin()
    world.engine.begin(always(503, 0))  # it is not asked again
    assert world.run("evaluate", Store(tmp_path)).digest == whole


@pytest.mark.long
@pytest.mark.parametrize("name", ["rollout", "evaluate", "score"])
def test_a_fault_of_the_engine_at_any_call(world, tmp_path, name):
    sweep_server(world, name, world.engine, PASSING, tmp_path, lambda fault: range(16 if name != "score" else 10))


@pytest.mark.parametrize("name", ["warmstart", "score", "train"])
def test_a_trainer_that_dies(world, tmp_path, name):
    assert check_second_run(world, name, tmp_path, breaking(world.trainer, once("dead", 0)))


@pytest.mark.parametrize("name", STAGES)
def test_a_disk_that_is_full_for_a_moment_or_for_good(world, tmp_path, monkeypatch, name):
    for at in (1, 14, 29, 44, 75):
        with monkeypatch.context() as patch:
            disk = Disk(patch, error=FULL)

            @contextmanager
            def full(disk=disk, at=at):
                disk.events, disk.stop_at = 0, at
                yield
                disk.stop_at = None

            check_second_run(world, name, tmp_path / str(at), full)


def killed(*_):
    raise KeyboardInterrupt


def test_a_stage_that_is_killed_when_all_is_made_goes_on(world, tmp_path, monkeypatch):
    """With the metrics that it would have had, too."""
    config = load_config("tiny", ["data.train=8", "data.held_out=4", "warmstart.pairs=4", "where.workers=2"])
    monkeypatch.setattr(train_clip_stage, "STEPS", 2)
    store, whole = Store(tmp_path / "killed"), Store(tmp_path / "whole")
    pairs = build_stage(known_pairs, config, whole, dataset=build_stage(prepare, config, whole)[0])[0]
    runs = {
        "known_pairs": lambda at: build_stage(known_pairs, config, at, dataset=whole.origin(pairs, "dataset"))[0],
        "train_clip": lambda at: build_stage(train_clip, config, at, pairs=pairs)[0],
    } | {name: partial(world.run, name) for name in STAGES}
    for run in runs.values():
        world.begin()
        with monkeypatch.context() as patch:
            patch.setattr(Work, "publish", killed)
            with pytest.raises(KeyboardInterrupt):
                run(store)
        again, expected = run(store), run(whole)
        assert (again.digest, again.metrics) == (expected.digest, expected.metrics)


class Failing:
    """Method of a class that raises `error` at its n-th call, or from then on."""

    def __init__(self, kind, name, error, at, lasting):
        self.kind, self.name, self.error, self.at, self.lasting = kind, name, error, at, lasting

    @contextmanager
    def __call__(self):
        method, failing, count = getattr(self.kind, self.name), self, iter(range(10**6))

        def broken(*given, **named):
            number = next(count)
            if number == failing.at or (failing.lasting and number > failing.at):
                raise failing.error
            return method(*given, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.kind, self.name, broken)
            yield


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("name", ["rollout", "evaluate"])
@pytest.mark.parametrize(
    "error", [ConnectionError("refused"), TimeoutError(), MemoryError(), OSError(errno.EIO, "I/O error")], ids=repr
)
def test_a_tool_that_the_machine_fails(world, tmp_path, name, error, lasting):
    """It is tried again at the end; still without it nothing is stored that it could have changed."""
    failed = check_second_run(world, name, tmp_path, Failing(PendingCall, "run", error, 2, lasting))
    assert failed == lasting


def test_a_tool_that_breaks_once_breaks_no_row(world, tmp_path):
    assert not check_second_run(world, "rollout", tmp_path, Failing(PendingCall, "run", KeyError("bug"), 1, False))


def test_a_tool_that_stops_an_iteration_hangs_nothing(world, tmp_path):
    """asyncio hands on no StopIteration: whoever waits for it would wait for ever."""
    assert not check_second_run(world, "rollout", tmp_path, Failing(PendingCall, "run", StopIteration(), 1, False))


@pytest.mark.parametrize("name", ["demonstrate", "rollout", "evaluate", "score"])
def test_a_picture_that_the_disk_does_not_give(world, tmp_path, name):
    for lasting in (False, True):
        broken = Failing(ImageTable, "decoded", OSError(errno.EIO, "I/O error"), 1, lasting)
        assert check_second_run(world, name, tmp_path / str(lasting), broken)


def test_a_comparison_of_formulas_that_is_killed_is_no_verdict(monkeypatch):
    start, pairs = maths.Checker._start, [(rf"\frac{{{n}}}{{7}}", f"{2 * n}/14") for n in (1, 2, 3)]
    whole = maths.verify_formulas(pairs)

    def killed(self):
        process = start(self)
        process.kill()
        return process

    monkeypatch.setattr(maths.Checker, "_start", killed)
    with pytest.raises(UserError, match="ended from outside, by signal 9"):
        maths.verify_formulas(pairs)
    monkeypatch.setattr(maths.Checker, "_start", start)
    assert maths.verify_formulas(pairs) == whole and all(verdict.equal for verdict in whole.values())


def raised_from_itself() -> Exception:
    error = KeyError("x")
    error.__cause__ = error
    return error


class Answered(Exception):
    """An HTTP client's error with a response."""

    def __init__(self, status: int):
        self.response = type("Response", (), {"status_code": status})()


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionResetError(), True), (TimeoutError(), True), (MemoryError(), True), (FULL, True),
        (PermissionError(errno.EACCES, "x"), True), (Answered(503), True), (Answered(429), True),
        (Answered(404), False), (Answered(422), False), (FileNotFoundError(errno.ENOENT, "x"), False),
        (OSError("image file is truncated"), False), (KeyError("x"), False), (ValueError("x"), False),
        (FileExistsError(errno.EEXIST, "x"), False), (socket.gaierror(socket.EAI_NONAME, "x"), False),
        (socket.gaierror(socket.EAI_AGAIN, "x"), True), (IncompleteRead(b""), True), (BrokenProcessPool(), True),
        (CalledProcessError(-9, "x"), True), (CalledProcessError(1, "x"), False),
        (ServerDisconnectedError(), True), (sqlite3.OperationalError("database is locked"), True),
        (ExceptionGroup("x", [KeyError("x"), ConnectionError()]), True), (raised_from_itself(), False),
    ],
    ids=repr,
)  # fmt: skip
def test_what_passes_is_told_by_the_error_or_by_its_cause(error, passing):
    assert is_passing(error) == passing
    try:
        try:
            raise error
        except type(error) as inner:
            raise RuntimeError("a library's own") from inner
    except RuntimeError as outer:
        assert is_passing(outer) == passing
