"""Child processes that never outlive their parent, even if the parent gets SIGKILL."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from thinkimg.watchdog import Identity, Table, descendants, process_table, signal_each

WATCHDOG = Path(__file__).with_name("watchdog.py")
WATCHDOG_TIMEOUT_S = 15.0  # it needs five to end everything
KILL_TIMEOUT_S = 5.0  # a process may be waiting for a disk
PID_MAX = 2**22  # Linux's, on any machine


class Child:
    """A running command with its watchdog; leaving the context ends it and everything that descends from it."""

    def __init__(self, name: str, process: subprocess.Popen, pipe: int, log_path: Path | None, log_start: int):
        self.name = name
        self.log_path = log_path
        self._process = process  # the watchdog: it ends when nothing of the command is left, with the command's status
        self._pipe: int | None = pipe
        self._log_start = log_start

    @property
    def process(self) -> subprocess.Popen:
        """The watchdog, for code that wants a Popen: its signals and its exit status stand for the command's."""
        return self._process

    @property
    def pid(self) -> int:
        """The watchdog's process id, which is also the session id of the command."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """Exit status, None while the command runs; 128 + n if it died of signal n, 127 if it could not be started."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command and all its descendants. Raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout)

    def terminate(self, timeout: float = 10.0) -> int:
        """SIGTERM to the command, SIGKILL to all that is left after `timeout` seconds; the exit status."""
        if self._pipe is not None:
            if self.alive:
                with suppress(BrokenPipeError):  # it ended between the two lines
                    os.write(self._pipe, f"{timeout}\n".encode())
                self._process.wait()
            os.close(self._pipe)
            self._pipe = None
        return self._process.wait()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that this command wrote to its log; empty without a log."""
        if self.log_path is None:
            return ""
        with open(self.log_path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - 64 * 1024))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()


def spawn(
    argv: Sequence[str], *, name: str, env: Mapping[str, str] | None = None, log_path: Path | None = None
) -> Child:
    """Start a command in a session of its own, under a watchdog that ends it and all its descendants when we end.

    It has a directory of its own for temporary files, which goes with it.
    env: the whole environment, or None for ours. log_path: where its stdout and stderr are appended, None for our own.
    First ends what processes of an earlier run have left behind.
    """
    clear_leftovers()
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
    record = run_directory() / f"{name}-{os.getpid()}-{time.monotonic_ns()}"
    # Not inheritable: no other child of ours keeps the write end open. (Forked ones do; the watchdog looks at its
    # parent too.)
    read_end, write_end = os.pipe()
    try:
        # From here to its end there is a record; once the watchdog runs, it alone writes and removes it.
        write_record(Path(f"{record}.json"), {"name": name, "parent": identity(os.getpid()), "watchdog": None})
        with nullcontext() if log_path is None else open(log_path, "ab") as output:
            log_start = 0 if output is None else output.tell()
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WATCHDOG), str(read_end), str(record), *map(str, argv)],
                env=None if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(read_end,),
                start_new_session=True,
            )
    except BaseException:
        os.close(write_end)
        remove_record(Path(f"{record}.json"))
        raise
    finally:
        os.close(read_end)
    return Child(name, process, write_end, log_path, log_start)


def run_directory() -> Path:
    """Where the sessions of running children are recorded: per machine and user, gone after a reboot at the latest."""
    directory = Path(tempfile.gettempdir()) / f"thinkimg-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.lstat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user; set TMPDIR to a directory of your own")
    return directory


@dataclass(frozen=True)
class Record:
    """A child as a file of the run directory names it, for whoever has to end what it has left behind."""

    name: str
    parent: dict
    """Its parent's `identity`."""
    watchdog: dict | None
    """Its watchdog's `identity`; None before it runs, or if the record is strange there."""
    members: frozenset[Identity] | None
    """The descendants that the watchdog saw in its last look; None if the record is strange there."""


def parse_record(text: str) -> Record | None:
    """Return what a record says; None if it does not say who its parent is, as that of a later version may not.

    Raises ValueError if the text is damaged.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    parent, watchdog, name = content.get("parent"), content.get("watchdog"), content.get("name")
    if not is_identity(parent):
        return None
    return Record(
        name=name if isinstance(name, str) else "unknown",
        parent=parent,
        watchdog=watchdog if is_identity(watchdog) and watchdog["boot"] == parent["boot"] else None,
        members=parse_members(content.get("members", [])),  # there were none in the first versions
    )


def parse_members(value: object) -> frozenset[Identity] | None:
    """Return pairs of integers as tuples; None if the value is something else than a list of such pairs."""
    if not isinstance(value, list):
        return None
    if not all(isinstance(pair, list) and list(map(type, pair)) == [int, int] for pair in value):
        return None
    return frozenset((pid, started) for pid, started in value)


def is_identity(value: object) -> bool:
    """Tell whether a value holds what `identity` returns, perhaps with more."""
    if not isinstance(value, dict) or [type(value.get(key)) for key in ("pid", "started", "boot")] != [int, int, str]:
        return False
    return 0 < value["pid"] <= PID_MAX


def is_alive(process: dict) -> bool:
    """Tell whether the process with an `identity` is alive."""
    now = identity(process["pid"])
    return now is not None and now == {key: process[key] for key in now}


def leftovers(record: Record, table: Table, boot: str, own: int) -> set[int]:
    """Return the ids of the processes in a table that are provably those of a record, its watchdog included.

    A recorded process is the one with the recorded start time. It vouches for its children, and for all in its session:
    below the watchdog no process is in a session that began elsewhere, and Linux gives a number to no new process while
    it is some session's id. Neither `own`, the calling process, nor what descends from it is returned, nor an
    unrecorded member of its session.
    """
    if record.parent["boot"] != boot or record.watchdog is None or record.members is None:
        return set()
    leader, leader_started = record.watchdog["pid"], record.watchdog["started"]
    recorded = record.members | {(leader, leader_started)}
    spared = {1, own, *descendants(own, table)}
    family = {pid for pid, started in recorded if pid in table and table[pid].started == started} - spared
    strange = {0}  # sessions for which nobody vouches; 0 is unknown
    if own in table:
        strange.add(table[own].session)
        spared |= {pid for pid, process in table.items() if process.session == table[own].session}
    if leader in table and table[leader].started != leader_started:
        strange.add(leader)  # the number is another's by now: of the watchdog's session nobody is left
    while True:
        sessions = {table[pid].session for pid in family} - strange
        kin = {pid for pid, process in table.items() if process.parent in family or process.session in sessions}
        if kin <= family | spared:
            return family
        family |= kin - spared


def clear_leftovers() -> list[str]:
    """End the children whose parent is gone; returns their names. Where the watchdog lives this only waits for it.

    No process gets a signal that is not provably such a child's (see `leftovers`). A damaged record is removed.
    """
    cleared = set()
    for path in sorted(run_directory().glob("*.json")):
        try:
            record = parse_record(path.read_text())
            if record is None or is_alive(record.parent):
                continue
            if record.parent["boot"] == boot_id():
                cleared.add(record.name)
                deadline = time.monotonic() + WATCHDOG_TIMEOUT_S
                while record.watchdog is not None and is_alive(record.watchdog) and time.monotonic() < deadline:
                    time.sleep(0.05)
                end_leftovers(parse_record(path.read_text()) or record)  # the watchdog may have written meanwhile
        except (FileNotFoundError, IsADirectoryError, PermissionError):  # its watchdog was quicker; or it is no record
            continue
        except ValueError:
            pass
        remove_record(path)
    for part in run_directory().glob("*-*-*.part"):  # of a parent that was killed while it wrote the first record
        pid = part.stem.split("-")[-2]
        if pid.isdecimal() and identity(int(pid)) is None:
            part.unlink(missing_ok=True)
    return sorted(cleared)


def end_leftovers(record: Record) -> None:
    """SIGKILL to all that is provably a record's. What is stuck in the kernel after KILL_TIMEOUT_S ends when it can."""
    if record.members is None:
        return

    def choose(table: Table) -> set[int]:
        return leftovers(replace(record, members=record.members | stopped), table, boot, own)

    boot, own, deadline = boot_id(), os.getpid(), time.monotonic() + KILL_TIMEOUT_S
    # Stopped first, or one might fork behind our back and leave a child for which nobody vouches any more.
    stopped: set[Identity] = set()
    while (fresh := signal_each(choose, signal.SIGSTOP) - stopped) and time.monotonic() < deadline:
        stopped |= fresh
    while choose(process_table()) and time.monotonic() < deadline:
        signal_each(choose, signal.SIGKILL)
        time.sleep(0.02)


def remove_record(path: Path) -> None:
    """Remove a record's file, last of all that belongs to it."""
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    path.with_suffix(".part").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary directory of this process, gone afterwards; what killed processes have left of theirs goes first."""
    clear_leftovers()  # whose children may still write there
    for path in run_directory().glob("scratch-*"):
        boot, pid, started, _ = path.name.removeprefix("scratch-").split("-", 3)
        owner = identity(int(pid))
        if owner is None or (owner["boot"][:8], str(owner["started"])) != (boot, started):
            shutil.rmtree(path, ignore_errors=True)  # another process may be at it, too
    mine = identity(os.getpid())
    prefix = f"scratch-{mine['boot'][:8]}-{mine['pid']}-{mine['started']}-"
    with tempfile.TemporaryDirectory(dir=run_directory(), prefix=prefix) as directory:
        yield Path(directory)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_record(path: Path, record: dict) -> None:
    """Write beside and rename, so that nobody reads half a record."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record))
    part.rename(path)


def identity(pid: int) -> dict | None:
    """What tells a process from a later one with the same id; None if there is no such process."""
    process = process_table([pid]).get(pid)
    return process and {"pid": pid, "started": process.started, "boot": boot_id()}


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
