"""No signal reaches a process that is not provably a child's; what provably is one's is ended, and no record stays."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from paths import REPOSITORY

from thinkimg import process, watchdog
from thinkimg.errors import UserError
from thinkimg.process import clear_leftovers, identify, parse_record, spawn
from thinkimg.watchdog import ProcessHandle, descendants, process_table, signal_each

BOOT = process.boot_id()
ME = identify(os.getpid())
GONE = {"pid": process.PID_MAX, "started": 1, "boot": BOOT}  # a number that no process gets


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.02)


def alive(pid) -> bool:
    return identify(int(pid)) is not None


def session(leader: int) -> list[int]:
    return [pid for pid, entry in process_table().items() if entry.session == leader]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """An empty run directory, for this process alone."""
    directory = tmp_path / "run"
    directory.mkdir()
    monkeypatch.setattr(process, "run_directory", lambda: directory)
    return directory


def orphaned(code: str) -> list[int]:
    """Run shell code in a session of its own, as no child of this process; returns the numbers that it prints."""
    return list(map(int, subprocess.check_output(["sh", "-c", f"setsid sh -c '{code}' &"]).split()))


@pytest.fixture(params=["with its leader", "without its leader"])
def stranger(request):
    """A session that is not ours: its id, and its only living member, which is its leader or not."""
    if request.param == "with its leader":
        leader, member = orphaned("echo $$ $$; exec sleep 600 >/dev/null")
    else:
        leader, member = orphaned("sleep 600 >/dev/null & echo $$ $!")
    wait_for(lambda: session(leader) == [member])
    yield leader, member
    with suppress(ProcessLookupError):
        os.kill(member, signal.SIGKILL)


# A stale record, and a stranger that has a number of it.


@pytest.mark.parametrize("members", ["first version", "none", "same pid", "same start", "other boot"])
def test_a_stranger_with_a_number_of_a_stale_record_survives(run, stranger, members):
    leader, member = stranger
    started, boot = identify(member)["started"], "another" if members == "other boot" else BOOT
    record = {
        "name": "engine",
        "parent": GONE | {"boot": boot},
        "watchdog": {"pid": leader, "started": 7, "boot": boot},
    }
    pairs = {"none": [], "same pid": [[member, started - 1]], "same start": [[member + 1, started]]}
    if members != "first version":
        record["members"] = pairs.get(members, [[member, started]])
    (run / "engine-1-1.json").write_text(json.dumps(record))
    (run / "engine-1-1").mkdir()
    assert clear_leftovers() == ([] if members == "other boot" else ["engine"])
    time.sleep(0.1)
    assert alive(member)
    assert list(run.iterdir()) == []


def test_a_record_of_the_first_version_whose_watchdog_hangs_still_ends_it_and_its_session(run, monkeypatch):
    """Its start time tells that it is the one, and the session has been its own without interruption."""
    monkeypatch.setattr(process, "WATCHDOG_TIMEOUT_S", 0.2)
    leader, member = orphaned("sleep 600 >/dev/null & echo $$ $!; exec >/dev/null; wait")
    record = {"name": "engine", "parent": GONE, "watchdog": identify(leader)}
    (run / "engine-1-1.json").write_text(json.dumps(record))
    clear_leftovers()
    wait_for(lambda: not alive(leader) and not alive(member))


DAMAGED = ["", "{", '{"parent": {"pid"', "[]", "null", "7", "[" * 100_000, "9" * 5000, b"\xff\xfe\x00"]
PARENT_UNKNOWN = [
    {},
    {"name": "engine"},
    {"parent": 1},
    {"parent": {"pid": "1", "started": 1, "boot": BOOT}},
    {"parent": {"pid": True, "started": 1, "boot": BOOT}},
    {"parent": {"pid": -1, "started": 1, "boot": BOOT}},
    {"parent": {"pid": 10**400, "started": 1, "boot": BOOT}},
    {"parent": {"process": 12, "since": 3.5}, "version": 9},
]
PARENT_ALIVE = [{"parent": ME}, {"parent": ME | {"namespace": 4}, "watchdog": {"id": 1}, "family": [], "members": {}}]
PARENT_GONE = [
    {"parent": GONE},
    {"parent": GONE, "watchdog": None, "members": []},
    {"parent": GONE | {"namespace": 4}, "watchdog": 5, "name": 7},
    {"parent": GONE, "watchdog": GONE | {"boot": "another"}, "members": []},
    {"parent": ME | {"boot": "another"}},
    {"parent": ME | {"started": 1}},
]
STRANGE_MEMBERS = ["all", None, 5, [5], [[5]], [[True, 1]], [[1, 2, 3]], {"1": 2}, [[1.0, 2]], [None]]


@pytest.mark.parametrize("text", DAMAGED + PARENT_UNKNOWN + PARENT_ALIVE + PARENT_GONE)
def test_a_strange_record_goes_if_it_is_damaged_or_its_parent_has_gone(run, text):
    stays = text in PARENT_UNKNOWN + PARENT_ALIVE
    text = json.dumps(text) if isinstance(text, dict) else text
    (run / "engine-1-1.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    clear_leftovers()
    assert [path.name for path in run.iterdir()] == (["engine-1-1.json"] if stays else [])


def test_a_watchdog_whose_record_has_strange_members_gets_no_signal(run, monkeypatch, stranger):
    monkeypatch.setattr(process, "WATCHDOG_TIMEOUT_S", 0.05)
    leader, member = stranger
    for members in STRANGE_MEMBERS:
        record = {"parent": GONE, "watchdog": identify(member), "members": members}
        (run / "engine-1-1.json").write_text(json.dumps(record))
        assert clear_leftovers() == ["unknown"]
        assert list(run.iterdir()) == []
    time.sleep(0.1)
    assert alive(member)


def test_what_is_no_record_is_left_alone(run):
    (run / "directory.json").mkdir()
    (run / "notes.part").touch()
    (run / f"engine-{os.getpid()}-5.part").touch()  # its writer lives
    (run / f"engine-{GONE['pid']}-5.part").touch()  # its writer was killed before the rename
    clear_leftovers()
    assert sorted(path.name for path in run.iterdir()) == [
        "directory.json",
        f"engine-{os.getpid()}-5.part",
        "notes.part",
    ]


# What a killed parent and a killed watchdog have left.

COMMAND = """
import os, signal, sys, time
def stay(name):
    with open(os.path.join(sys.argv[1], name + ".new"), "w") as file:
        file.write(str(os.getpid()))
    os.rename(file.name, file.name[:-4])
    while True:
        time.sleep(600)
def daemon(name):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        stay(name)
    os.wait()
def late(*_):
    if os.fork() == 0:
        stay("late")
    if os.fork() == 0:  # in a session of its own, but its parent is known
        os.setsid()
        stay("late-session")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, late)
daemon("daemon")
if os.fork() == 0:
    stay("child")
stay("command")
"""
PARENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from thinkimg import process
process.run_directory = lambda: Path(sys.argv[2])
print(process.spawn([sys.executable, "-c", *sys.argv[3:]], name="engine").pid, flush=True)
time.sleep(600)
"""


class Orphans:
    """A command and what it started, whose parent and watchdog have been killed."""

    def __init__(self, run: Path, notes: Path, code: str):
        self.notes = notes
        notes.mkdir()
        argv = [sys.executable, "-c", PARENT, str(REPOSITORY), str(run), code, str(notes)]
        self.parent = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self.watchdog = int(self.parent.stdout.readline())
        self.run = run

    def pid(self, name: str) -> int:
        path = self.notes / name
        wait_for(path.exists)
        return int(path.read_text())

    def wait_until_recorded(self, *names: str) -> None:
        pids = {self.pid(name) for name in names}
        (path,) = self.run.glob("*.json")
        wait_for(lambda: pids <= {pid for pid, _ in json.loads(path.read_text()).get("members", [])})

    def kill(self) -> None:
        os.kill(self.watchdog, signal.SIGKILL)
        self.parent.kill()
        self.parent.wait()

    def __enter__(self) -> "Orphans":
        return self

    def __exit__(self, *_: object) -> None:
        """End what a failed test leaves: all of them have the directory of notes among their arguments."""
        with self.parent:
            self.parent.kill()
        signal_each(self.remaining, signal.SIGKILL)

    def remaining(self, table=None) -> set[int]:
        """Ids of all living processes that have the directory of notes among their arguments."""
        mine = set()
        for pid in process_table() if table is None else table:
            with suppress(FileNotFoundError, ProcessLookupError):
                if os.fsencode(self.notes) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    mine.add(pid)
        return mine


@pytest.mark.parametrize("descriptors", ["pidfd", "ENOSYS", "EPERM", "not built"])
def test_leftovers_are_ended_those_that_came_after_the_last_look_too(run, tmp_path, monkeypatch, descriptors):
    if descriptors == "not built":
        monkeypatch.delattr(os, "pidfd_open")
    elif descriptors != "pidfd":

        def refuse(pid):
            raise OSError(getattr(errno, descriptors), "refused")

        monkeypatch.setattr(os, "pidfd_open", refuse)
    with Orphans(run, tmp_path / "notes", COMMAND) as orphans:
        orphans.wait_until_recorded("command", "child", "daemon")
        os.kill(orphans.watchdog, signal.SIGSTOP)  # it looks no more
        os.kill(orphans.pid("command"), signal.SIGUSR1)
        family = {orphans.pid(name) for name in ("command", "child", "daemon", "late", "late-session")}
        orphans.kill()
        wait_for(lambda: orphans.remaining() == family)
        assert clear_leftovers() == ["engine"]
        assert orphans.remaining() == set()
        assert list(run.iterdir()) == []


def test_leftovers_that_fork_all_the_time_do_not_escape(run, tmp_path, monkeypatch):
    """As long as one of them runs it may leave a child of whom nobody knows, so they are stopped first."""
    monkeypatch.setattr(
        watchdog, "OPEN_PROCESSES", 3
    )  # those that vouch for the last of them are killed with the first
    code = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(os.path.join(sys.argv[1], "started"), "w").close()
forking = os.fork()
for _ in range(300):
    if forking == 0 and os.fork() == 0:
        break
    time.sleep(0.003)
time.sleep(600)
"""
    with Orphans(run, tmp_path / "notes", code) as orphans:
        wait_for((orphans.notes / "started").exists)
        orphans.kill()
        wait_for(lambda: len(orphans.remaining()) > 10)
        clear_leftovers()
        assert orphans.remaining() == set()


def test_the_command_is_recorded_before_it_runs(run):
    """So that there is no moment at which a SIGKILL of its watchdog leaves it behind."""
    (run / "child-1-1.json").write_text(
        json.dumps({"name": "child", "parent": identify(os.getppid()), "watchdog": None})
    )
    command = watchdog.start_command(["sleep", "600"], watchdog.RecordWriter(str(run / "child-1-1")))
    record = parse_record((run / "child-1-1.json").read_text())
    try:
        assert record.members == {(command.pid, identify(command.pid)["started"])} and record.watchdog == ME
    finally:
        command.kill()
        command.wait()


def test_a_watchdog_that_comes_too_late_starts_nothing(run, tmp_path):
    """Its parent has ended, and another process may have cleared the record already."""
    read_end, write_end = os.pipe()
    path = run / "child-1-1"
    for record in ({"name": "child", "parent": GONE, "watchdog": None}, None):
        if record is not None:
            Path(f"{path}.json").write_text(json.dumps(record))
        argv = [sys.executable, "-I", "-S", watchdog.__file__, str(read_end), str(path), "touch", str(tmp_path / "ran")]
        assert subprocess.run(argv, pass_fds=[read_end], stderr=subprocess.DEVNULL).returncode == 127
        assert list(run.iterdir()) == [] and not (tmp_path / "ran").exists()
    os.close(read_end)
    os.close(write_end)


def test_nothing_stays_in_the_run_directory(run, tmp_path):
    children = [spawn(["true"], name="engine.1") for _ in range(20)]  # some end before we look at them
    assert [child.wait(20) for child in children] == [0] * 20
    with pytest.raises(UserError, match="Is a directory"):
        spawn(["true"], name="child", log_path=tmp_path)
    assert list(run.iterdir()) == []


def test_a_process_whose_first_thread_has_ended_is_a_living_descendant(run, tmp_path):
    code = f"""
import ctypes, threading, time
threading.Thread(target=time.sleep, args=[600]).start()
open({str(tmp_path / "started")!r}, "w").close()
ctypes.CDLL(None).syscall({60 if os.uname().machine == "x86_64" else 93}, 0)
"""
    with spawn([sys.executable, "-c", code], name="child") as child:
        wait_for((tmp_path / "started").exists)
        wait_for(lambda: any(Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z" for pid in descendants(child.pid)))
        (pid,) = descendants(child.pid)
        assert child.terminate(timeout=1) == 128 + signal.SIGTERM
        assert not alive(pid)


# A handle, and a number that goes to another process.


def test_a_handle_never_reaches_a_later_process(monkeypatch):
    with subprocess.Popen(["sleep", "600"]) as first:
        handle = ProcessHandle(first.pid)
        handle.send(signal.SIGKILL)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("by number"))
    handle.send(signal.SIGKILL)
    handle.close()
    with pytest.raises(ProcessLookupError):
        ProcessHandle(first.pid)


def test_many_are_signalled_with_few_files_open():
    import resource

    sleepers = [subprocess.Popen(["sleep", "600"]) for _ in range(60)]
    pids, before = {sleeper.pid for sleeper in sleepers}, resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, before[1]))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watchdog, "OPEN_PROCESSES", 10)
            assert {pid for pid, _ in signal_each(lambda table: pids & table.keys(), signal.SIGKILL)} == pids
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for sleeper in sleepers:
            sleeper.kill()
    assert [sleeper.wait(5) for sleeper in sleepers] == [-signal.SIGKILL] * 60
