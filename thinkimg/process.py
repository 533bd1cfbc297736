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
from pathlib import Path
from typing import Self

WATCHDOG = Path(__file__).with_name("watchdog.py")
WATCHDOG_TIMEOUT_S = 15.0  # it needs five to end everything


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
        with nullcontext() if log_path is None else open(log_path, "ab") as output:
            log_start = 0 if output is None else output.tell()
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(WATCHDOG),
                    str(read_end),
                    str(os.getpid()),
                    str(record),
                    *map(str, argv),
                ],
                env=None if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(read_end,),
                start_new_session=True,
            )
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    watchdog = identity(process.pid)
    if watchdog is not None:  # else it has ended already
        write_record(record.with_suffix(".json"), {"name": name, "parent": identity(os.getpid()), "watchdog": watchdog})
    return Child(name, process, write_end, log_path, log_start)


def run_directory() -> Path:
    """Where the sessions of running children are recorded: per machine and user, gone after a reboot at the latest."""
    directory = Path(tempfile.gettempdir()) / f"thinkimg-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.lstat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user; set TMPDIR to a directory of your own")
    return directory


def clear_leftovers() -> list[str]:
    """End the children whose parent is gone; returns their names. Where the watchdog lives this only waits for it."""
    cleared = []
    for path in sorted(run_directory().glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:  # its watchdog was quicker
            continue
        parent, watchdog = record["parent"], record["watchdog"]
        if identity(parent["pid"]) == parent:
            continue
        if parent["boot"] == boot_id():
            cleared.append(record["name"])
            deadline = time.monotonic() + WATCHDOG_TIMEOUT_S
            while identity(watchdog["pid"]) == watchdog and time.monotonic() < deadline:
                time.sleep(0.05)
            for pid in session_members(watchdog["pid"]):
                with suppress(ProcessLookupError):  # ended meanwhile
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink(missing_ok=True)
    return sorted(set(cleared))


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
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] == "Z":
        return None
    return {"pid": pid, "started": int(fields[19]), "boot": boot_id()}


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def session_members(session: int) -> list[int]:
    """Process ids of the living members of a session, whatever group they have moved to."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry))
    return members
