"""Child processes that never outlive their parent, even if the parent gets SIGKILL."""

import errno
import hashlib
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
from typing import BinaryIO, Self

from thinkimg.disk import writing
from thinkimg.errors import UserError
from thinkimg.watchdog import ProcessId, Table, descendants, process_table, signal_each, write_record

WATCHDOG = Path(__file__).with_name("watchdog.py")
WATCHDOG_TIMEOUT_S = 15.0  # it needs five seconds to end everything
KILL_TIMEOUT_S = 5.0  # a process may be waiting for a disk
PID_MAX = 2**22  # Linux's, on any machine
SOCKET_PATH = 107  # bytes of a socket's path that the kernel allows
SOCKET_NAME = 1 + 36  # of vLLM's sockets, the longest
RECORD_NAME = 1 + 36  # a name of up to 9 letters, process id and nanoseconds
SHORT_ROOTS = (Path("/tmp"), Path("/dev/shm"))


class Child:
    """A running command with its watchdog; leaving the context ends it and all its descendants."""

    def __init__(self, name: str, process: subprocess.Popen, pipe: int, log_path: Path | None, log_start: int):
        self.name = name
        self.log_path = log_path
        self._process = process  # the watchdog: it ends after the last descendant, with the command's status
        self._pipe: int | None = pipe
        self._log_start = log_start

    @property
    def pid(self) -> int:
        """Process id of the watchdog, which is also the session id of the command."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the command or one of its descendants runs."""
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """Exit status, None while the command runs; 128 + n if it died of signal n, 127 if it could not be started."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the command and all its descendants. Raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout)

    def terminate(self, timeout: float = 10.0) -> int:
        """Send SIGTERM to the command, and after `timeout` seconds SIGKILL to the rest; return the exit status."""
        if self._pipe is not None:
            if self.alive:
                with suppress(BrokenPipeError):  # it ended after the line above
                    os.write(self._pipe, f"{timeout}\n".encode())
                self._process.wait()
            os.close(self._pipe)
            self._pipe = None
        return self._process.wait()

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines that this command wrote to its log; "" without a log."""
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
    """Start a command in a session of its own, under a watchdog that ends it and all its descendants with this process.

    It has a directory of its own for temporary files, which is removed with it. Processes that earlier runs left behind
    are ended first.
    env: its environment (see environment.py), None for ours. log_path: file to append its stdout and stderr to, None
    for ours. Raises UserError where a directory can't be written to.
    """
    clear_leftovers()
    record = run_directory() / f"{name}-{os.getpid()}-{time.monotonic_ns()}"
    # Not inheritable: no other child of ours keeps the write end open. Forked ones do; so the watchdog also checks its
    # parent.
    read_end, write_end = os.pipe()
    try:
        # From here to its end there is a record. The watchdog alone writes and removes it, once it runs.
        with writing(record):
            content = {"name": name, "origin": origin(), "parent": identify(os.getpid()), "watchdog": None}
            write_record(str(record), content)
        with nullcontext() if log_path is None else open_log(log_path) as output:
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


def open_log(path: Path) -> BinaryIO:
    """Open a log for appending. Raises UserError where it can't be written."""
    with writing(path, hint="Free some space there, or set where.store to a directory that this user can write to."):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "ab")


def run_directory() -> Path:
    """Return the directory of records and temporary files of children: one per machine and user, removed by a reboot.

    It is in TMPDIR; where that is too long for the sockets of children, or another user has taken the name, elsewhere.
    Raises UserError without one.
    """
    roots = [temporary_root(), *SHORT_ROOTS, Path(os.environ.get("XDG_RUNTIME_DIR") or "/nowhere")]
    usable = []
    for root in roots:
        directory = root / f"thinkimg-{os.getuid()}"
        short = len(os.fsencode(directory)) <= SOCKET_PATH - SOCKET_NAME - RECORD_NAME
        if short and os.access(root, os.W_OK | os.X_OK):
            usable.append(directory)
    own = [directory for directory in usable if not os.path.lexists(directory) or is_own(directory)]
    if usable:
        return make_private([*own, *usable][0])
    raise UserError(
        f"TMPDIR is too long for the sockets of child processes: {roots[0]}.",
        hint=f"Set it to a directory with at most {SOCKET_PATH - SOCKET_NAME - RECORD_NAME - 20} characters.",
    )


def scratch_directory() -> Path:
    """Return this user's directory in TMPDIR, where there is room for weights and images. Raises UserError."""
    return make_private(temporary_root() / f"thinkimg-{os.getuid()}")


def temporary_root() -> Path:
    """Return the directory for temporary files: TMPDIR, or /tmp. Raises UserError if it is none.

    tempfile falls back to others, in the end to the working directory, where TMPDIR is missing or full.
    """
    root = Path(os.environ.get("TMPDIR") or os.environ.get("TEMP") or os.environ.get("TMP") or "/tmp").absolute()
    with writing(root, hint="Set TMPDIR to a directory that this user can write to."):
        if not root.is_dir():
            raise NotADirectoryError(errno.ENOTDIR if root.exists() else errno.ENOENT, "", str(root))
        if not os.access(root, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "", str(root))
    return root


def make_private(directory: Path) -> Path:
    """Make a directory that only this user can enter, if there is none; return it. Raises UserError."""
    with writing(directory):
        directory.mkdir(mode=0o700, exist_ok=True)
    if not is_own(directory):
        raise UserError(f"{directory} belongs to another user.", hint="Set TMPDIR to a directory of your own.")
    if directory.stat().st_mode & 0o077:
        directory.chmod(0o700)
    return directory


def is_own(path: Path) -> bool:
    """Tell whether a path, which exists, belongs to this user."""
    return path.lstat().st_uid == os.getuid()


@dataclass(frozen=True)
class Record:
    """Record of a child in the run directory, by which another process can end the child's leftovers."""

    name: str
    parent: dict
    """Result of `identify` for its parent."""
    watchdog: dict | None
    """Result of `identify` for its watchdog; None before it runs, or if the record is not understood."""
    members: frozenset[ProcessId] | None
    """Descendants at the watchdog's last look; None if the record is not understood."""
    origin: str | None = None
    """Result of `origin` where it was written; None in records of versions up to 0.2."""


def parse_record(text: str) -> Record | None:
    """Return the record of a text; None if it does not identify the parent, as a later version's may not.

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
        members=parse_members(content.get("members", [])),  # the first versions wrote none
        origin=content["origin"] if isinstance(content.get("origin"), str) else None,
    )


def parse_members(value: object) -> frozenset[ProcessId] | None:
    """Return pairs of integers as tuples; None if the value is no list of such pairs."""
    if not isinstance(value, list):
        return None
    if not all(isinstance(pair, list) and list(map(type, pair)) == [int, int] for pair in value):
        return None
    return frozenset((pid, started) for pid, started in value)


def is_identity(value: object) -> bool:
    """Return True for a result of `identify`, also with further keys."""
    if not isinstance(value, dict) or [type(value.get(key)) for key in ("pid", "started", "boot")] != [int, int, str]:
        return False
    return 0 < value["pid"] <= PID_MAX


def is_alive(process: dict) -> bool:
    """Return True if the process that `identify` described is alive."""
    current = identify(process["pid"])
    return current is not None and current == {key: process[key] for key in current}


def leftovers(record: Record, table: Table, boot: str, own: int) -> set[int]:
    """Return the ids of the processes in a table that provably belong to a record, its watchdog included.

    A process with a recorded id and start time belongs to it; so do its children, and all processes of its session.
    Below the watchdog no process is in a session that began elsewhere. Linux gives a session's id to no new process.
    Never returned: `own`, the calling process, its descendants, and unrecorded members of its session.
    """
    if record.parent["boot"] != boot or record.watchdog is None or record.members is None:
        return set()
    leader, leader_started = record.watchdog["pid"], record.watchdog["started"]
    recorded = record.members | {(leader, leader_started)}
    spared = {1, own, *descendants(own, table)}
    family = {pid for pid, started in recorded if pid in table and table[pid].started == started} - spared
    strange = {0}  # sessions that prove nothing; 0 is unknown
    if own in table:
        strange.add(table[own].session)
        spared |= {pid for pid, process in table.items() if process.session == table[own].session}
    if leader in table and table[leader].started != leader_started:
        strange.add(leader)  # another process has the id now: the watchdog's session has ended
    while True:
        sessions = {table[pid].session for pid in family} - strange
        kin = {pid for pid, process in table.items() if process.parent in family or process.session in sessions}
        if kin <= family | spared:
            return family
        family |= kin - spared


def clear_leftovers() -> list[str]:
    """End the children whose parent has ended and return their names. A watchdog that lives is only waited for.

    Only processes that provably belong to such a child get a signal (see `leftovers`). A damaged record is removed.
    """
    cleared = set()
    for path in sorted(run_directory().glob("*.json")):
        try:
            record = parse_record(path.read_text())
            if record is None or record.origin not in (None, origin()) or is_alive(record.parent):
                continue
            if record.parent["boot"] == boot_id():
                cleared.add(record.name)
                deadline = time.monotonic() + WATCHDOG_TIMEOUT_S
                while record.watchdog is not None and is_alive(record.watchdog) and time.monotonic() < deadline:
                    time.sleep(0.05)
                end_leftovers(parse_record(path.read_text()) or record)  # the watchdog may have written meanwhile
        except (FileNotFoundError, IsADirectoryError, PermissionError):  # its watchdog removed it; or it is no record
            continue
        except ValueError:
            pass
        remove_record(path)
    for part in run_directory().glob("*-*-*.part"):  # of a parent that was killed while it wrote the first record
        pid = part.stem.split("-")[-2]
        if pid.isdecimal() and identify(int(pid)) is None:
            part.unlink(missing_ok=True)
    return sorted(cleared)


def end_leftovers(record: Record) -> None:
    """Send SIGKILL to the processes that provably belong to a record, for KILL_TIMEOUT_S at most."""
    if record.members is None:
        return

    def choose(table: Table) -> set[int]:
        return leftovers(replace(record, members=record.members | stopped), table, boot, own)

    boot, own, deadline = boot_id(), os.getpid(), time.monotonic() + KILL_TIMEOUT_S
    # Stopped first: else one might fork after the look, and its child could not be told from others.
    stopped: set[ProcessId] = set()
    while (fresh := signal_each(choose, signal.SIGSTOP) - stopped) and time.monotonic() < deadline:
        stopped |= fresh
    while choose(process_table()) and time.monotonic() < deadline:
        signal_each(choose, signal.SIGKILL)
        time.sleep(0.02)


def remove_record(path: Path) -> None:
    """Remove a record's temporary files, and last the record."""
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    path.with_suffix(".part").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary directory and remove it afterwards; first remove those of killed processes."""
    clear_leftovers()  # whose children may still write there
    parent = scratch_directory()
    own = identify(os.getpid())
    prefix = f"scratch-{origin()}-"
    for path in parent.glob(f"{prefix}*"):
        boot, pid, started, _ = path.name.removeprefix(prefix).split("-", 3)
        owner = identify(int(pid))
        if owner is None or (owner["boot"][:8], str(owner["started"])) != (boot, started):
            shutil.rmtree(path, ignore_errors=True)  # another process may be removing it, too
    prefix += f"{own['boot'][:8]}-{own['pid']}-{own['started']}-"
    with writing(parent):
        directory = tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True)
    with directory as path:
        yield Path(path)


def free_port() -> int:
    """Return a TCP port of this machine on which no process listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def identify(pid: int) -> dict | None:
    """Return {pid, started, boot}, which no later process has as well; None if there is no such process.

    started: in clock ticks since the boot, so that changes of the system's clock do not matter.
    """
    process = process_table([pid]).get(pid)
    return process and {"pid": pid, "started": process.started, "boot": boot_id()}


def origin() -> str:
    """Return 8 hex digits for the machine and the container, in which process ids mean what they mean here.

    A directory for temporary files may be shared with others, whose processes can't be seen.
    """
    namespace = os.stat("/proc/self/ns/pid")
    text = f"{socket.gethostname()} {namespace.st_dev} {namespace.st_ino}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def boot_id() -> str:
    """Return the id that Linux draws at each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
