"""The scheduler on invented stages: what runs when, what is told, and how all of it ends."""

import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder, Handle, Interrupted, Scheduler, Task
from thinkimg.stages.stage import Early, Input, Slice, Stage
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import Dataset

CONFIG = load_config("tiny")
SOON_S = 20.0  # a test that waits for longer has found a fault
ENGINE, TRAINER, ALL = frozenset({"engine"}), frozenset({"trainer"}), frozenset({"engine", "teacher", "trainer"})


def invent(name: str, run: Callable, reads=(), uses=frozenset(), player=None, **options) -> Stage:
    """A stage; `run` is handed its handle, and returns what stands for its artifact."""
    inputs = {role: Input(Dataset) for role in reads}
    options = {"settings": lambda config: Slice(), "uses": lambda config: uses} | options
    return Stage(name=name, version=1, makes=Dataset, run=run, reads=inputs, player=player, **options)


def run_stage(handle: Handle) -> Any:
    return handle.stage.run(handle)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


# what runs when -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A stage of a graph. inputs: positions of earlier ones. player: one of these, or the name of an artifact."""

    inputs: frozenset[int]
    uses: frozenset[str]
    player: int | str | None
    report: int | None

    @property
    def roles(self) -> dict[str, int | str]:
        player = {} if self.player is None else {"player": self.player}
        return {f"input {i}": i for i in self.inputs} | player


@st.composite
def graphs(draw) -> list[Node]:
    nodes: list[Node] = []
    for i in range(draw(st.integers(1, 8))):
        inputs = draw(st.frozensets(st.integers(0, i - 1), max_size=2)) if i else frozenset()
        uses = draw(st.frozensets(st.sampled_from(["engine", "trainer", "teacher"]), max_size=2))
        player = draw(st.sampled_from(["policy", "other policy", *sorted(inputs)])) if "engine" in uses else None
        nodes.append(Node(inputs, uses, player, draw(st.sampled_from([None, 0, 1, 2]))))
    return nodes


def compatible(one: Node, other: Node, exclusive: bool) -> bool:
    """Whether the two may run at a time."""
    if not one.uses or not other.uses:
        return True
    if exclusive and not one.uses == other.uses == ENGINE:
        return False
    return one.uses & other.uses <= ENGINE and (one.player == other.player or not one.uses & other.uses)


def under_way(nodes: list[Node], done: set[int], running: list[int], exclusive: bool) -> list[int]:
    """What has to be running once all of `done` has ended: lowest position first."""
    running = list(running)
    for i, node in enumerate(nodes):
        waits = i in done or i in running or not set(node.roles.values()) - {"policy", "other policy"} <= done
        if not waits and all(compatible(node, nodes[other], exclusive) for other in running):
            running.append(i)
    return running


@dataclass
class Trial:
    """A run of a graph, of which the test says when each stage ends."""

    nodes: list[Node]
    exclusive: bool
    allowed: set[int] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    told: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.starts: queue.Queue[int] = queue.Queue()
        self.ends = [threading.Event() for _ in self.nodes]
        self.scheduler = Scheduler(
            CONFIG, run_stage, turns=ALL if self.exclusive else frozenset(), on_report=self.report
        )
        handles: dict[int | str, Any] = {"policy": object(), "other policy": object()}
        for i, node in enumerate(self.nodes):
            player = "player" if node.uses & ENGINE else None
            stage = invent(f"stage {i}", self.stage(i), node.roles, node.uses, player)
            handles[i] = self.scheduler(stage, **{role: handles[key] for role, key in node.roles.items()})
        self.members = [[i for i, node in enumerate(self.nodes) if node.report == number] for number in range(3)]
        for number, members in enumerate(self.members):
            if members:
                self.scheduler.report(number, **{f"stage {i}": handles[i] for i in members})

    def stage(self, i: int) -> Callable[[Handle], int]:
        def run(handle: Handle) -> int:
            if i not in self.allowed:
                self.faults.append(f"{i} runs beside or before what it must not")
            found = {role: value for role, value in handle.inputs().items() if not role.startswith("player")}
            if found != {f"input {j}": j for j in self.nodes[i].inputs}:
                self.faults.append(f"{i} got {found}")
            self.starts.put(i)
            if not self.ends[i].wait(SOON_S):
                self.faults.append(f"nobody ended {i}")
            return i

        return run

    def report(self, number: int, made: dict[str, int]) -> None:
        self.told.append(number)
        if made != {f"stage {i}": i for i in self.members[number]} or threading.current_thread() is not self.waiting:
            self.faults.append(f"report {number} was told {made} in {threading.current_thread()}")

    def go(self, order: list[int]) -> None:
        """Run the graph; whenever no more can start, the next number of `order` says which stage ends."""
        done, running, seen = set(), under_way(self.nodes, set(), [], self.exclusive), []
        self.allowed = set(running)
        with ThreadPoolExecutor(1, initializer=self.begin) as pool:
            ended = pool.submit(self.scheduler.wait)
            try:
                while running:
                    while not set(running) <= set(seen):
                        seen.append(self.starts.get(timeout=SOON_S))
                    assert sorted(seen) == sorted(done | set(running)), "more than can run, or twice"
                    chosen = running.pop(order.pop() % len(running) if order else 0)
                    done.add(chosen)
                    running = under_way(self.nodes, done, running, self.exclusive)
                    self.allowed = done | set(running)
                    self.ends[chosen].set()
                    wait_until(lambda chosen=chosen: self.scheduler.handles[chosen].done)  # ends come in this order
                ended.result(SOON_S)
            finally:
                for end in self.ends:
                    end.set()
        assert done == set(range(len(self.nodes))) and self.starts.empty() and self.faults == []
        assert self.told == [number for number, members in enumerate(self.members) if members]

    def begin(self) -> None:
        self.waiting = threading.current_thread()


@given(graphs(), st.booleans(), st.lists(st.integers(0, 7), max_size=8))
def test_each_runs_once_after_its_inputs_on_resources_of_its_own_lowest_first(nodes, exclusive, order):
    """And iterations are reported in order, in the thread that waits, when all of theirs is there."""
    Trial(nodes, exclusive).go(order)


@pytest.mark.parametrize(
    ("one", "other", "exclusive"),
    [
        ((frozenset(), None), (frozenset(), None), True),
        ((frozenset(), None), (TRAINER, None), True),
        ((ENGINE, "policy"), (ENGINE, "policy"), True),
        ((ENGINE, "policy"), (TRAINER, None), False),
        ((ENGINE, "policy"), (ENGINE | {"teacher"}, "policy"), False),
    ],
    ids=["no resource", "one resource", "one policy", "two resources", "engine and teacher"],
)
def test_two_that_may_run_side_by_side_do(one, other, exclusive):
    both = threading.Barrier(2, timeout=SOON_S)
    policy, scheduler = object(), Scheduler(CONFIG, run_stage, turns=ALL if exclusive else frozenset())
    for name, (uses, player) in (("one", one), ("other", other)):
        roles = {"policy": policy} if player else {}
        scheduler(invent(name, lambda handle: both.wait(), roles, uses, player), **roles)
    scheduler.wait()  # a barrier that is broken raises


@pytest.mark.parametrize(
    ("one", "other", "exclusive"),
    [
        ((ENGINE, "first"), (ENGINE, "second"), False),
        ((TRAINER, None), (TRAINER, None), False),
        ((ENGINE, "first"), (TRAINER, None), True),
        ((ENGINE, "first"), (ENGINE | {"teacher"}, "first"), True),
        ((ENGINE | {"teacher"}, "first"), (ENGINE | {"teacher"}, "first"), False),
    ],
    ids=["two policies", "one trainer", "exclusive", "engine and teacher in turn", "one teacher"],
)
def test_two_that_may_not_take_turns(one, other, exclusive):
    busy, beside = threading.Lock(), []
    policies = {"first": object(), "second": object()}

    def work(handle):
        if not busy.acquire(blocking=False):
            beside.append(handle)
            return
        time.sleep(0.1)
        busy.release()

    scheduler = Scheduler(CONFIG, run_stage, turns=ALL if exclusive else frozenset())
    for name, (uses, player) in (("one", one), ("other", other)):
        roles = {player: policies[player]} if player else {}
        scheduler(invent(name, work, roles, uses, player), **roles)
    scheduler.wait()
    assert beside == []


def test_servers_take_turns_where_the_trainer_is_apart():
    """Where they do not fit together, a teacher does not judge while an engine plays; the trainer goes on."""
    settings = ["where.engine.devices=[0]", "where.trainer.devices=[1]", "where.engine.keep=false"]
    scheduler = Scheduler(CONFIG, run_stage, turns=load_config("tiny", settings).where.turns)
    tasks = [
        Task(scheduler.add(invent(str(uses), run_stage, uses=frozenset(uses))), early=False)
        for uses in (["engine"], ["engine", "teacher"], ["trainer"])
    ]
    conflicts = [scheduler._conflict(tasks[i], tasks[j]) for i, j in ((0, 0), (0, 1), (0, 2), (1, 2))]
    assert conflicts == [False, True, False, False]


@pytest.mark.parametrize("leaves", [frozenset(), ENGINE])
def test_what_an_early_part_leaves_waits_for_its_resources(leaves):
    """Only then is the engine kept from those who play another policy meanwhile."""
    playing, beside, policies = threading.Event(), [], {"own": object(), "other": object()}

    def play(handle):
        playing.set()
        time.sleep(0.2)
        playing.clear()

    early = Early("rows", lambda job, snapshots: frozenset(), lambda config: ENGINE)
    rows = invent("rows", lambda handle: None)
    last = invent("last", lambda handle: beside.append(playing.wait(0.1)), ["rows", "own"], player="own", early=early)
    scheduler = Scheduler(CONFIG, run_stage, execute_early=lambda handle: leaves)
    made = scheduler(rows)
    scheduler(invent("play", play, ["rows", "other"], ENGINE, "other"), rows=made, other=policies["other"])
    scheduler(last, rows=made, own=policies["own"])
    scheduler.wait()
    assert beside == [not leaves]


def test_an_iteration_that_is_ready_early_is_told_in_its_turn():
    late, told = threading.Event(), []
    scheduler = Scheduler(CONFIG, run_stage, on_report=lambda number, made: told.append((number, made, late.is_set())))
    first = scheduler(invent("first", lambda handle: late.wait(SOON_S)))
    second = scheduler(invent("second", lambda handle: "early"))
    third = scheduler(invent("third", lambda handle: late.set(), ["second"]), second=second)
    scheduler.report(1, a=first, nothing=None)
    scheduler.report(2, b=second, c=third)
    scheduler.wait()
    assert told == [(1, {"a": True}, True), (2, {"b": "early", "c": None}, True)]


# how it ends ----------------------------------------------------------------------------------------------------------


class Alarm(Exception):
    """What a report may raise."""


class Ending:
    """Two stages under way when something happens, and one that waits for them."""

    def __init__(self, happens: Callable[[], None] = lambda: None, told: Callable[[], None] = lambda: None):
        """happens: in one of them, with the other under way. told: in the report of a third, likewise."""
        self.scheduler = Scheduler(CONFIG, run_stage, on_report=self.report, on_stop=self.stop)
        self.happens, self.told, self.closed = happens, told, threading.Event()
        self.both = threading.Barrier(2, action=self.begin, timeout=SOON_S)
        self.begun, self.ends, self.stops = threading.Event(), [], []
        third = self.scheduler(invent("third", lambda handle: self.begun.wait(SOON_S)))
        self.scheduler.report(0, third=third)
        left = self.scheduler(invent("left", self.left))
        right = self.scheduler(invent("right", self.right))
        last = self.scheduler(invent("last", lambda handle: self.ends.append("last"), ["a", "b"]), a=left, b=right)
        self.scheduler.report(1, left=left, right=right, last=last)
        self.reports: list[int] = []

    def begin(self) -> None:
        self.begun.set()

    def left(self, handle: Handle) -> None:
        """As a stage that waits for an engine: it goes on when that is closed, and tells its progress."""
        self.both.wait()
        assert self.closed.wait(SOON_S)
        if self.scheduler.stopped.is_set():
            self.ends.append("left was interrupted")
            raise Interrupted

    def right(self, handle: Handle) -> None:
        """As a stage that tells its progress."""
        self.both.wait()
        self.happens()
        if self.scheduler.stopped.wait(SOON_S):
            self.ends.append("right was interrupted")
            raise Interrupted

    def report(self, iteration: int, made: dict[str, Any]) -> None:
        self.reports.append(iteration)
        self.told()

    def stop(self) -> None:
        self.stops.append((threading.current_thread(), self.scheduler.stopped.is_set()))
        self.closed.set()


def fail() -> None:
    raise ValueError("first")


def alarm() -> None:
    raise Alarm


def interrupt() -> None:
    time.sleep(0.1)  # while it waits, not while a thread is being made, which would be nobody's then
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.mark.parametrize(
    ("cause", "raised"),
    [({"happens": fail}, ValueError), ({"told": alarm}, Alarm), ({"happens": interrupt}, KeyboardInterrupt)],
    ids=["a stage fails", "a report raises", "somebody interrupts"],
)
def test_what_ends_it_ends_all_that_is_under_way_and_is_raised(cause, raised):
    ending = Ending(**cause)
    with pytest.raises(raised) as caught:
        ending.scheduler.wait()
    assert not isinstance(caught.value, Interrupted), "what it was, not what followed from it"
    right = [] if raised is ValueError else ["right was interrupted"]
    assert sorted(ending.ends) == ["left was interrupted", *right]
    assert ending.stops == [(threading.current_thread(), True)]
    assert set(ending.reports) <= {0}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage")]


def test_what_was_not_under_way_does_not_begin():
    ran = []
    scheduler = Scheduler(CONFIG, run_stage)
    scheduler(invent("fails", lambda handle: fail(), uses=TRAINER))
    scheduler(invent("waits", lambda handle: ran.append("waits"), uses=TRAINER))
    with pytest.raises(ValueError, match="first"):
        scheduler.wait()
    assert ran == []


def test_nothing_is_stopped_where_all_goes_well():
    stops = []
    scheduler = Scheduler(CONFIG, run_stage, on_stop=lambda: stops.append("stop"))
    handle = scheduler(invent("well", lambda handle: "artifact"))
    scheduler.wait()
    assert handle.result() == "artifact" and stops == [] and not scheduler.stopped.is_set()


def test_a_run_in_vain_is_refused_before_anything_begins():
    def refuse(config):
        raise ValueError("in vain")

    scheduler = Scheduler(CONFIG, run_stage)
    with pytest.raises(ValueError, match="in vain"):
        scheduler(invent("vain", run_stage, check=refuse))
    assert scheduler.handles == []


# without Prefect ------------------------------------------------------------------------------------------------------


def test_a_builder_makes_what_a_stage_needs_and_is_not_handed_in(tmp_path):
    ran = []

    def write(job):
        ran.append(job.settings)
        job.work.json("rows.json", sorted(job.inputs))

    first = invent("first", write)
    second = invent("second", write, settings=lambda config, number=1: Numbered(number=number))
    object.__setattr__(second, "reads", {"data": Input(Dataset, origin=first)})
    object.__setattr__(second, "parameters", {"number": None})
    with Resources(CONFIG.where) as resources:
        builder = Builder(CONFIG, Store(tmp_path), resources)
        made = builder.make(second, number=1)
        assert len(ran) == 2 and made.json("rows.json") == ["data"]
        data = builder.make(first)
        assert builder.make(second, number=1).digest == made.digest and len(ran) == 2  # cached
        builder.make(second, data=data, number=2)
        assert len(ran) == 3
    assert len(builder.handles) == 2 + 1 + 2 + 1


class Numbered(Slice):
    number: int


def test_an_iteration_that_is_complete_is_told_before_what_failed_beside_it_is_raised():
    ends = threading.Event()

    def fail(handle):
        ends.wait(SOON_S)
        raise UserError("broken")

    def made(handle):
        ends.wait(SOON_S)
        return "made"

    told = []
    scheduler = Scheduler(CONFIG, run_stage, on_report=lambda iteration, made: told.append((iteration, made)))
    scheduler.report(0, left=scheduler.add(invent("left", made)))
    scheduler.report(1, right=scheduler.add(invent("right", fail)))
    threading.Timer(0.2, ends.set).start()
    with pytest.raises(UserError, match="broken"):
        scheduler.wait()
    assert told in ([(0, {"left": "made"})], []), "never the one that failed"
    assert scheduler.handles[0].result() == "made"


def test_what_goes_wrong_while_the_rest_is_ended_hides_no_cause(caplog):
    def stop():
        raise OSError("a lease is gone")

    def fail(handle):
        raise UserError("the cause")

    scheduler = Scheduler(CONFIG, run_stage, on_stop=stop)
    scheduler.add(invent("broken", fail))
    with pytest.raises(UserError, match="the cause"):
        scheduler.wait()
    assert "not everything was ended" in caplog.text


def test_a_builder_ends_what_is_under_way(tmp_path):
    began = threading.Barrier(2, timeout=SOON_S)

    def fail(job):
        began.wait()
        raise UserError("the cause")

    def go_on(job):
        began.wait()
        for done in range(int(SOON_S / 0.01)):
            job.progress(done, 10)
            time.sleep(0.01)
        raise AssertionError("it was not ended")

    with Resources(CONFIG.where) as resources:
        builder = Builder(CONFIG, Store(tmp_path), resources)
        handles = [builder.add(invent("broken", fail)), builder.add(invent("long", go_on))]
        with pytest.raises(UserError, match="the cause"):
            builder.wait()
    assert isinstance(handles[1].future.exception(), Interrupted)
