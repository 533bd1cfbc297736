"""Process between thinkimg and a command: runs it, and ends all its descendants when thinkimg's end of a pipe closes.

Run by path with `python -I -S` (see process.py), so that it starts at once: it uses the standard library only and
imports nothing of thinkimg. Linux only. It is a child subreaper: a grandchild whose parent has ended, or that started a
session of its own, still descends from it. It records its descendants: if it is killed, another process ends them.

    thinkimg ──pipe──► watchdog ──► command ──► VLLM::EngineCore, workers, ...
        └────────────► record ◄──┘
"""

import ctypes
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PARENT_GONE_GRACE_S = 3.0  # from SIGTERM to SIGKILL; a vLLM server needs two seconds to remove its shared memory
LEFTOVER_GRACE_S = 3.0  # for descendants to end after the command has ended
TRACKER_GRACE_S = 1.0  # then for Python's resource trackers to unlink the files of killed processes
LOOK_S = 1.0  # between two looks at the descendants, at least
LOOK_SHARE = 0.01  # of a core, at most, for looking, however many processes the machine has
OPEN_PROCESSES = 100  # open at a time; a process may often open no more than 1024 files

Process = namedtuple("Process", "started parent session")
"""A living process: start time in clock ticks since the boot, ids of its parent and of its session."""

Table = dict[int, Process]
"""Living processes by id."""

ProcessId = tuple[int, int]
"""Process id and start time; no later process of this boot has the same pair."""


def prctl(option: int, value: int) -> None:
    """Call the system's prctl for this process."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def process_table(pids: Iterable[int] | None = None) -> Table:
    """Return the living processes by id, of `pids` alone if given. Each is read at a moment of its own."""
    table = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pids is None else pids:
        try:
            with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
                # The name in parentheses may contain spaces and parentheses.
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or another user hides it
            continue
        if fields[0] not in b"ZX" or int(fields[17]) > 1:  # with other threads it is no zombie yet
            table[pid] = Process(int(fields[19]), int(fields[1]), int(fields[3]))
    return table


def descendants(root: int, table: Table | None = None) -> list[int]:
    """Return the process ids of all living descendants of `root`, in a process table or right now."""
    children: dict[int, list[int]] = {}
    for pid, process in (process_table() if table is None else table).items():
        children.setdefault(process.parent, []).append(pid)
    family, todo = [], [root]
    while todo:
        below = children.pop(todo.pop(), [])
        family += below
        todo += below
    return family


def confirm(before: Table, after: Table) -> Table:
    """Return the entries of a second reading of the process table for the processes of the first.

    A reading takes milliseconds, in which a process id may go to another process: an entry may name a wrong parent or
    session. For a process that both readings have, the second is right: no process gets a younger parent, and a session
    ends before its number is used again.
    """
    return {pid: process for pid, process in after.items() if pid in before and process.started == before[pid].started}


def observe(root: int, earlier: set[ProcessId]) -> set[ProcessId]:
    """Return the living descendants of `root`, and the living ones among the earlier descendants."""
    table = process_table()
    family = descendants(root, table)
    # An earlier one needs no second reading. It may be missing in `family` because its parent ended during the reading.
    members = {(pid, started) for pid, started in earlier if pid in table and table[pid].started == started}
    if any((pid, table[pid].started) not in earlier for pid in family):
        checked = confirm(table, process_table(family))
        members |= {(pid, checked[pid].started) for pid in descendants(root, checked)}
    return members


class ProcessHandle:
    """A process by its descriptor: no signal to it can reach a later process with the same id.

    Raises ProcessLookupError if there is none with that id. Some systems have no descriptors for processes: Linux
    before 5.3, sandboxes, builds of Python. There it has the id alone: the caller has to check it just before a signal.
    """

    def __init__(self, pid: int):
        self.pid = pid
        self._descriptor: int | None = None
        if hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal"):
            try:
                self._descriptor = os.pidfd_open(pid)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.ENOENT):  # a thread has the id now
                    raise ProcessLookupError(*error.args) from error
                if error.errno not in (errno.ENOSYS, errno.EPERM):  # refused by a sandbox
                    raise

    def send(self, signum: int) -> None:
        """Send a signal; do nothing if the process has ended, or belongs to another user now (sudo)."""
        with suppress(ProcessLookupError, PermissionError):
            if self._descriptor is None:
                os.kill(self.pid, signum)
            else:
                signal.pidfd_send_signal(self._descriptor, signum)

    def close(self) -> None:
        """Close the descriptor."""
        if self._descriptor is not None:
            os.close(self._descriptor)


def signal_each(
    choose: Callable[[Table], Iterable[int]], signum: int, spare: Callable[[int], bool] = lambda pid: False
) -> set[ProcessId]:
    """Send a signal to the processes that `choose` picks from a process table, and return these.

    spare: True for a process that gets no signal. A process is opened between two readings, and gets the signal if
    `choose` picks it again from the confirmed entries. One that is missed (its parent ended just then) remains for the
    next call.
    """
    before = process_table()
    chosen = sorted(choose(before))
    signalled = set()
    for start in range(0, len(chosen), OPEN_PROCESSES):
        with ExitStack() as stack:
            handles = {}
            for pid in chosen[start : start + OPEN_PROCESSES]:
                with suppress(ProcessLookupError):
                    if not spare(pid):
                        handles[pid] = ProcessHandle(pid)
                        stack.callback(handles[pid].close)
            for pid in handles.keys() & choose(confirm(before, process_table(chosen))):
                handles[pid].send(signum)
                signalled.add((pid, before[pid].started))
    return signalled


def is_tracker(pid: int) -> bool:
    """Return True for a resource tracker, multiprocessing's or loky's."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"resource_tracker" in file.read()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False


def kill_all(*, trackers: bool) -> None:
    """Send SIGKILL to every descendant, to Python's resource trackers only if asked to."""
    own = os.getpid()
    spare = (lambda pid: False) if trackers else is_tracker
    signal_each(lambda table: descendants(own, table), signal.SIGKILL, spare)


def write_record(path: str, content: dict) -> None:
    """Write `<path>.json` beside and rename it, so that no process reads half a record. Raises OSError (disk full)."""
    with open(f"{path}.part", "w") as file:
        json.dump(content, file)
    os.replace(f"{path}.part", f"{path}.json")


class RecordWriter:
    """Record of the parent, this watchdog and its descendants; process.py reads it.

    path: without its suffix. The parent has written the record without a watchdog before it started this process. From
    then on this process writes it; its child does so once, while this process waits for it. Raises OSError if there is
    no record: then the parent has ended.
    """

    def __init__(self, path: str):
        self.path = path
        with open(f"{path}.json") as file:
            self._content = json.load(file)
        self.parent: int = self._content["parent"]["pid"]
        self._own = os.getpid()
        started = process_table([self._own])[self._own].started
        self._content["watchdog"] = self._content["parent"] | {"pid": self._own, "started": started}
        self._members: set[ProcessId] = set()
        self._due = 0.0

    def write(self, members: set[ProcessId]) -> None:
        """Replace the record by one with these members. Raises OSError (disk full)."""
        write_record(self.path, self._content | {"members": sorted(members)})
        self._members = members

    def write_self(self) -> None:
        """Record the calling process, which is to become the command, as the only member."""
        with suppress(OSError):  # the next look writes it
            self.write({(pid, process.started) for pid, process in process_table([os.getpid()]).items()})

    def look(self) -> None:
        """Record the descendants of this process if they have changed; do nothing soon after the last look."""
        if time.monotonic() < self._due:
            return
        spent = time.process_time()
        members = observe(self._own, self._members)
        if members != self._members:
            with suppress(OSError):  # a full disk: the next look tries again
                self.write(members)
        self._due = time.monotonic() + max(LOOK_S, (time.process_time() - spent) / LOOK_SHARE)

    def remove(self) -> None:
        """Remove the record, after everything else: it is needed to find the rest."""
        for suffix in (".part", ".json"):
            with suppress(FileNotFoundError):
                os.unlink(self.path + suffix)


def reap(command: subprocess.Popen) -> bool:
    """Collect every ended child, adopted ones included, and set the command's exit status. Return True if any live.

    Without a child there is no descendant: each has an ancestor among our children, as we adopt the orphans.
    """
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        if pid == command.pid:
            command.returncode = os.waitstatus_to_exitcode(status)


def supervise(
    command: subprocess.Popen, terminate: Callable[[], None], record: RecordWriter, pipe: int, wake: int
) -> None:
    """Wait for the command to end; stop it when asked to, or when the parent has ended."""
    kill_at = None  # monotonic time of the SIGKILL, after a request to stop
    watched = [pipe, wake]

    def stop(grace_s: float) -> None:
        nonlocal kill_at
        if kill_at is None or time.monotonic() + grace_s < kill_at:
            kill_at = time.monotonic() + grace_s
        # To the command alone: vLLM ends its own processes in order, and leaves shared memory if they all get it.
        terminate()

    while command.returncode is None:
        record.look()
        # The timeout is for an ended parent whose forked children keep the pipe's other end open.
        ready, _, _ = select.select(watched, [], [], 1.0 if kill_at is None else 0.05)
        if wake in ready:
            os.read(wake, 4096)
        if pipe in ready:
            request = os.read(pipe, 64)
            if request:
                stop(float(request.split()[-1]))
            else:
                watched.remove(pipe)
                stop(PARENT_GONE_GRACE_S)
        elif kill_at is None and os.getppid() != record.parent:
            stop(PARENT_GONE_GRACE_S)
        reap(command)
        if kill_at is not None and time.monotonic() >= kill_at:
            kill_all(trackers=False)
    give_up = min(kill_at or float("inf"), time.monotonic() + LEFTOVER_GRACE_S)
    while reap(command):
        record.look()
        if time.monotonic() >= give_up:
            kill_all(trackers=time.monotonic() >= give_up + TRACKER_GRACE_S)
        time.sleep(0.02)


def make_environment(temporary: str) -> dict[str, str]:
    """Return the command's environment, with a directory of its own for temporary files.

    The directory is removed after the command's last descendant.
    A killed vLLM leaves seven sockets and a rendezvous file each time. torch's compile cache stays where it is.
    """
    changed = dict(os.environ)
    os.mkdir(temporary, 0o700)
    cache = os.path.join(changed.get("TMPDIR", "/tmp"), f"torchinductor_{os.getuid()}")
    # Last, not first: torch sets it again, and setproctitle locates a process' title by the first variable.
    changed.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
    changed["TMPDIR"] = temporary
    return changed


def start_command(argv: list[str], record: RecordWriter) -> subprocess.Popen:
    """Start the command, which is in the record before it runs. Raises OSError if it or the parent is missing."""
    watchdog = os.getpid()
    record.write(set())
    if os.getppid() != record.parent:
        raise ProcessLookupError(errno.ESRCH, "its parent has ended")

    def prepare() -> None:
        # If the watchdog is killed, the command gets a SIGTERM: at the unblocking below if that was before it.
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        record.write_self()
        if os.getppid() != watchdog:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    return subprocess.Popen(
        argv,
        env=make_environment(record.path),
        process_group=0,
        preexec_fn=prepare,  # noqa: PLW1509 (no threads here)
    )


def main() -> int:
    """Run a command under this watchdog.

    sys.argv: the pipe's read end, the record's path without its suffix, the command.
    """
    pipe, path, argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is a command to pass it on to
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    os.set_inheritable(pipe, False)
    try:
        record = RecordWriter(path)
    except FileNotFoundError:  # another process cleared it, so that no parent waits
        return 127
    try:
        command = start_command(argv, record)
    except OSError as error:
        detail = "" if error.filename == argv[0] else f": {error.filename or path}"
        print(f"cannot start {argv[0]}: {error.strerror}{detail}", file=sys.stderr)
        code = 127
    else:
        handle = ProcessHandle(command.pid)

        def terminate() -> None:
            if command.returncode is None:
                handle.send(signal.SIGTERM)

        signal.signal(signal.SIGTERM, lambda *_: terminate())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        supervise(command, terminate, record, pipe, wake)
        code = command.returncode
    shutil.rmtree(path, ignore_errors=True)
    record.remove()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
