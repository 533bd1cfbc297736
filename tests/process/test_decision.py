"""The decision who gets a signal, on invented records, process tables and a kernel of nine numbers."""

import json
import random
import signal
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from thinkimg import process, watchdog
from thinkimg.process import Record, leftovers, parse_record
from thinkimg.watchdog import Process, descendants, observe, signal_each

BOOT = process.boot_id()


# The decision, on invented records and process tables.

NUMBERS = st.integers(1, 9)
STARTS = st.integers(0, 2)
TABLES = st.dictionaries(NUMBERS, st.builds(Process, STARTS, st.integers(0, 9), st.integers(0, 9)), min_size=1)


@st.composite
def situations(draw) -> tuple[Record, dict[int, Process], int]:
    """A record, a process table in which some of the recorded processes may live, and the caller's number."""
    table = draw(TABLES)
    alive = st.sampled_from([(pid, entry.started) for pid, entry in table.items()])
    someone = alive | st.tuples(NUMBERS, STARTS)
    (parent, watchdog), boots = draw(st.tuples(someone, someone)), st.sampled_from([BOOT] * 9 + ["another"])
    members = frozenset(draw(st.lists(someone, max_size=4)))
    record = Record(
        "engine",
        {"pid": parent[0], "started": parent[1], "boot": draw(boots)},
        draw(st.sampled_from([{"pid": watchdog[0], "started": watchdog[1], "boot": BOOT}] * 9 + [None])),
        draw(st.sampled_from([members] * 9 + [None])),
    )
    return record, table, draw(NUMBERS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(BOOT) | NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "parent", "watchdog", "members", "pid", "started", "boot"]), inner)
    ),
)


def verified(record: Record, table: dict[int, Process]) -> set[int]:
    """Ids of the recorded processes that are alive, by a second implementation."""
    known = set(record.members or ())
    if record.watchdog is not None:
        known.add((record.watchdog["pid"], record.watchdog["started"]))
    return {pid for pid, entry in table.items() if (pid, entry.started) in known}


@settings(max_examples=500)
@given(situations())
def test_who_is_signalled_is_recorded_or_someone_who_is_vouches_for_it(situation):
    record, table, own = situation
    chosen, anchors = leftovers(record, table, BOOT, own), verified(record, table)
    event(f"{len(chosen & anchors)} recorded and {min(len(chosen - anchors), 1)} other")
    assert chosen <= table.keys() and own not in chosen and 1 not in chosen
    assert chosen.isdisjoint(descendants(own, table))
    if record.parent["boot"] != BOOT or record.watchdog is None or record.members is None or not anchors:
        assert chosen == set()
        return
    assert anchors - {1, own} - set(descendants(own, table)) <= chosen
    session = table[own].session if own in table else None
    leader = table.get(record.watchdog["pid"])
    for pid in chosen - anchors:
        entry = table[pid]
        others = {other for other in chosen if other != pid}
        mates = {other for other in others if table[other].session == entry.session}
        reused = leader is not None and leader.started != record.watchdog["started"]
        if entry.session in (0, session) or (reused and entry.session == record.watchdog["pid"]):
            mates = set()
        assert entry.session != session
        assert entry.parent in others or mates


@settings(max_examples=500)
@given(
    JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(["name", "parent", "watchdog", "members"], JSON)), TABLES
)
def test_no_text_crashes_the_decision(content, table):
    try:
        record = parse_record(json.dumps(content))
    except ValueError:
        assert not isinstance(content, dict)
        return
    if record is not None:
        assert leftovers(record, table, BOOT, 1) <= table.keys()
        assert verified(record, table) or not leftovers(record, table, BOOT, 1)
        process.is_alive(record.parent)


@given(st.text() | st.binary().map(lambda data: data.decode(errors="replace")))
def test_any_text_is_a_record_or_damaged(text):
    with suppress(ValueError):
        parse_record(text)


# A kernel of nine numbers, so that each soon goes to another process: between two lines of ours, too.


@dataclass(frozen=True)
class Entry:
    """A process of the invented kernel."""

    serial: int
    started: int
    parent: int
    session: int
    ours: bool = False  # the watchdog or what descends from it, which nothing but the kernel knows for sure
    subreaper: bool = False


class Kernel:
    """Processes that start, end, and lead sessions; while it is read, time goes on."""

    def __init__(self, rng: random.Random, haste: float):
        """haste: the probability that something happens before the next line of ours."""
        self.rng, self.haste, self.clock = rng, haste, 0
        self.processes = {1: Entry(0, 0, 0, 1, subreaper=True)}
        self.sent: list[Entry] = []
        self.fixed = {1}  # what does not end by itself
        self.ours: set[tuple[int, int]] = set()

    def fork(self, parent: int, **changes) -> int | None:
        taken = self.processes.keys() | {entry.session for entry in self.processes.values()}
        free = [number for number in range(2, 10) if number not in taken]
        if not free:
            return None
        self.clock += 1
        number, above = self.rng.choice(free), self.processes[parent]
        child = Entry(self.clock, self.clock, parent, above.session, above.ours)
        child = self.processes[number] = replace(child, **changes)
        if child.ours:
            self.ours.add((number, child.started))
        return number

    def lead(self, number: int) -> None:
        self.processes[number] = replace(self.processes[number], session=number)

    def end(self, number: int) -> None:
        heir = self.processes[number].parent
        while not self.processes[heir].subreaper:
            heir = self.processes[heir].parent
        del self.processes[number]
        for pid, entry in self.processes.items():
            if entry.parent == number:
                self.processes[pid] = replace(entry, parent=heir)

    def go_on(self) -> None:
        while self.rng.random() < self.haste:
            number = self.rng.choice(list(self.processes))
            deed = self.rng.choice(["fork"] * 4 + ["end"] * 3 + ["lead"])
            if deed == "fork":
                self.fork(number)
            elif number not in self.fixed and deed == "end":
                self.end(number)
            elif number not in self.fixed:
                self.lead(number)

    def read(self, pids=None) -> dict[int, Process]:
        """Like `process_table`, in any order: nobody says that /proc has one."""
        pids = list(self.processes if pids is None else pids)
        self.rng.shuffle(pids)
        table = {}
        for pid in pids:
            self.go_on()
            if entry := self.processes.get(pid):
                table[pid] = Process(entry.started, entry.parent, entry.session)
        return table

    def handle(self, pid: int) -> "KernelHandle":
        self.go_on()
        if pid not in self.processes:
            raise ProcessLookupError
        return KernelHandle(self, pid, self.processes[pid])

    def signal(self, signum, pid: int, entry: Entry) -> None:
        self.go_on()
        now = self.processes.get(pid)
        if now is not None and now.serial == entry.serial:
            self.sent.append(now)
            if signum == signal.SIGKILL and pid not in self.fixed:
                self.end(pid)


@dataclass
class KernelHandle:
    kernel: Kernel
    pid: int
    entry: Entry

    def send(self, signum) -> None:
        self.kernel.signal(signum, self.pid, self.entry)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def story(kernel: Kernel, patch) -> tuple[Record, int]:
    """The life of a watchdog from its start to its death: what its record says then, and the caller's number."""
    patch.setattr(watchdog, "process_table", kernel.read)
    patch.setattr(watchdog, "ProcessHandle", kernel.handle)
    own = kernel.fork(1)
    guard = kernel.fork(own, ours=True, subreaper=True)
    kernel.lead(own)
    kernel.lead(guard)
    kernel.fixed |= {own, guard}
    started, members = kernel.processes[guard].started, set()
    command = kernel.fork(guard)
    kernel.fixed.add(command)
    for _ in range(kernel.rng.randrange(1, 6)):
        kernel.go_on()
        members = observe(guard, members)
        assert members <= kernel.ours
        if kernel.rng.random() < 0.2:
            signal_each(lambda table: descendants(guard, table), signal.SIGKILL)
    if kernel.rng.random() < 0.3:  # it dies just after a look
        haste, kernel.haste = kernel.haste, 0.0
        members = observe(guard, members)
        now = {(pid, entry.started) for pid, entry in kernel.processes.items()} & kernel.ours
        assert members == now - {(guard, started)}
        kernel.haste = haste
    kernel.fixed -= {guard, command}
    kernel.end(guard)
    gone = {"pid": 99, "started": 0, "boot": BOOT}
    return Record("engine", gone, gone | {"pid": guard, "started": started}, frozenset(members)), own


@settings(max_examples=1000)
@given(st.integers(0, 2**32), st.floats(0.0, 0.7))
def test_no_stranger_gets_a_signal_however_numbers_change_hands(patch, seed, haste):
    kernel = Kernel(random.Random(seed), haste)
    record, own = story(kernel, patch)
    killed_by_watchdog = len(kernel.sent)
    kernel.go_on()
    for signum in (signal.SIGSTOP, signal.SIGKILL, signal.SIGKILL):
        signal_each(lambda table: leftovers(record, table, BOOT, own), signum)
    event(
        f"signals: {min(killed_by_watchdog, 1)} by the watchdog, {min(len(kernel.sent) - killed_by_watchdog, 1)} later"
    )
    assert all(entry.ours for entry in kernel.sent)


@settings(max_examples=500)
@given(st.integers(0, 2**32), st.floats(0.0, 0.7))
def test_whoever_was_seen_and_its_session_and_children_are_ended(patch, seed, haste):
    kernel = Kernel(random.Random(seed), haste)
    record, own = story(kernel, patch)
    kernel.haste = 0.0  # only what nobody changes can be told exactly
    ours = {pid for pid, entry in kernel.processes.items() if entry.ours}
    seen = {pid for pid in ours if (pid, kernel.processes[pid].started) in record.members}
    sessions = {kernel.processes[pid].session for pid in seen}
    due = {pid for pid in ours if pid in seen or kernel.processes[pid].session in sessions}
    due |= {pid for pid in ours if kernel.processes[pid].parent in due}
    event(f"{len(seen)} seen, {len(due)} due, {len(ours)} ours")
    signal_each(lambda table: leftovers(record, table, BOOT, own), signal.SIGKILL)
    assert due.isdisjoint(kernel.processes)
