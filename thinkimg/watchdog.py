"""The process between us and a child: runs a command and ends all that descends from it when our end of a pipe closes.

Run by path with `python -I -S` (see process.py), so it uses the standard library only and imports nothing of thinkimg.
Linux. It is a child subreaper: a grandchild whose parent has gone, or that started a session of its own, still
descends from it. It notes what descends from it in a record, for the process that has to end them should it be killed.

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
PARENT_GONE_GRACE_S = 3.0  # from SIGTERM to SIGKILL; a vLLM server needs two to leave no shared memory behind
LEFTOVER_GRACE_S = 3.0  # what descendants may take to leave after the command itself has ended
SOCKET_PATH = 107  # bytes that the kernel allows; the names of vLLM's are 36 long
TRACKER_GRACE_S = 1.0  # what Python's resource trackers may then take to unlink what the killed ones left
LOOK_S = 1.0  # between two looks at the descendants, or more:
LOOK_SHARE = 0.01  # of a core is the most that looking may take, however many processes the machine has
BATCH = 100  # processes open at a time; a process may often open no more than 1024 files

Process = namedtuple("Process", "started parent session")
"""A living process: its start time in clock ticks since the boot, and the ids of its parent and of its session."""

Table = dict[int, Process]
"""Living processes by id."""

Identity = tuple[int, int]
"""Process id and start time, which no later process of this boot has both."""


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def process_table(pids: Iterable[int] | None = None) -> Table:
    """Return the living processes by id, of `pids` alone if given. Each is read at a moment of its own."""
    table = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pids is None else pids:
        try:
            with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
                # The name in parentheses may itself hold spaces and parentheses.
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended meanwhile, or hidden: another user's
            continue
        if fields[0] not in b"ZX" or int(fields[17]) > 1:  # one whose first thread has ended is no zombie yet
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
    """Return what a second reading of the process table says of the processes that the first one has, too.

    A single reading takes milliseconds. In it a process may be the child, or in the session, of a number that has
    meanwhile gone to another process. Of processes that were all there between two readings the second tells the truth:
    nobody gets a parent that is younger, and a session ends before its number goes to another process.
    """
    return {pid: now for pid, now in after.items() if pid in before and now.started == before[pid].started}


def observe(root: int, known: set[Identity]) -> set[Identity]:
    """Return the living descendants of `root`, among them those that are known."""
    table = process_table()
    family = descendants(root, table)
    # One that is known needs no second reading. Nor has it gone if it is missed because its parent ended just then.
    members = {(pid, started) for pid, started in known if pid in table and table[pid].started == started}
    if any((pid, table[pid].started) not in known for pid in family):
        checked = confirm(table, process_table(family))
        members |= {(pid, checked[pid].started) for pid in descendants(root, checked)}
    return members


class Handle:
    """A process by its descriptor: no signal that is sent to it can reach a later process with the same id.

    Raises ProcessLookupError if there is none with that id. Without descriptors for processes (Linux before 5.3, some
    sandboxes and builds of Python) it keeps the id, and only the caller's check just before protects a later process.
    """

    def __init__(self, pid: int):
        self.pid = pid
        self._descriptor: int | None = None
        if hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal"):
            try:
                self._descriptor = os.pidfd_open(pid)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.ENOENT):  # the id is a thread's by now
                    raise ProcessLookupError(*error.args) from error
                if error.errno not in (errno.ENOSYS, errno.EPERM):  # refused by a sandbox
                    raise

    def send(self, signum: int) -> None:
        """Send a signal; does nothing if the process has ended, or has become another user's (sudo)."""
        with suppress(ProcessLookupError, PermissionError):
            if self._descriptor is None:
                os.kill(self.pid, signum)
            else:
                signal.pidfd_send_signal(self._descriptor, signum)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def signal_each(
    choose: Callable[[Table], Iterable[int]], signum: int, spare: Callable[[int], bool] = lambda pid: False
) -> set[Identity]:
    """Send a signal to the processes that `choose` picks from a process table; return those it was sent to.

    spare: whether a process gets no signal. A process is opened between two readings, and gets the signal if `choose`
    picks it again from what they confirm. Who is missed for that (a parent ended just then) is there for the next call.
    """
    before = process_table()
    chosen = sorted(choose(before))
    signalled = set()
    for start in range(0, len(chosen), BATCH):
        with ExitStack() as stack:
            handles = {}
            for pid in chosen[start : start + BATCH]:
                with suppress(ProcessLookupError):
                    if not spare(pid):
                        handles[pid] = Handle(pid)
                        stack.callback(handles[pid].close)
            for pid in handles.keys() & choose(confirm(before, process_table(chosen))):
                handles[pid].send(signum)
                signalled.add((pid, before[pid].started))
    return signalled


def is_tracker(pid: int) -> bool:
    """Tell whether a process is a resource tracker: multiprocessing's, or loky's."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"resource_tracker" in file.read()
    except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
        return False


def kill_all(*, trackers: bool) -> None:
    """SIGKILL to every descendant, to Python's resource trackers only if told so."""
    own = os.getpid()
    spare = (lambda pid: False) if trackers else is_tracker
    signal_each(lambda table: descendants(own, table), signal.SIGKILL, spare)


class RecordWriter:
    """The file that says whose watchdog this is and what descends from it; process.py reads it.

    path: without its suffix. The parent has written the file without a watchdog before it started this process. From
    then on this process writes it; its child does so once, while this process waits for it. Raises OSError if the file
    is gone: then so is the parent.
    """

    def __init__(self, path: str):
        self.path = path
        with open(f"{path}.json") as file:
            self._content = json.load(file)
        self.parent: int = self._content["parent"]["pid"]
        self._own = os.getpid()
        started = process_table([self._own])[self._own].started
        self._content["watchdog"] = self._content["parent"] | {"pid": self._own, "started": started}
        self._members: set[Identity] = set()
        self._due = 0.0

    def write(self, members: set[Identity]) -> None:
        """Replace the file by one with these members. Raises OSError (disk full)."""
        with open(f"{self.path}.part", "w") as file:
            json.dump(self._content | {"members": sorted(members)}, file)
        os.replace(f"{self.path}.part", f"{self.path}.json")
        self._members = members

    def write_self(self) -> None:
        """Name the calling process, which is to become the command, as the only member."""
        with suppress(OSError):  # the next look writes it
            self.write({(pid, process.started) for pid, process in process_table([os.getpid()]).items()})

    def look(self) -> None:
        """Write down what descends from this process if that has changed; does nothing if it has just looked."""
        if time.monotonic() < self._due:
            return
        spent = time.process_time()
        members = observe(self._own, self._members)
        if members != self._members:
            with suppress(OSError):  # a full disk: the next look tries again
                self.write(members)
        self._due = time.monotonic() + max(LOOK_S, (time.process_time() - spent) / LOOK_SHARE)

    def remove(self) -> None:
        """Remove the file, last of all that is ours: as long as anything is there, it is found by the file."""
        for suffix in (".part", ".json"):
            with suppress(FileNotFoundError):
                os.unlink(self.path + suffix)


def reap(command: subprocess.Popen) -> bool:
    """Collect every ended child, adopted ones included, and note the command's exit status; whether any are left.

    No child, no descendant: each has an ancestor among our children, as we adopt the orphans.
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
    """Wait for the command to end; stop it when asked to, or when the parent is gone."""
    kill_at = None  # monotonic time of the SIGKILL, once a stop was asked for
    watched = [pipe, wake]

    def stop(grace_s: float) -> None:
        nonlocal kill_at
        if kill_at is None or time.monotonic() + grace_s < kill_at:
            kill_at = time.monotonic() + grace_s
        # To the command alone: vLLM ends its own processes in good order, and loses shared memory if they all get it.
        terminate()

    while command.returncode is None:
        record.look()
        # The timeout is for a parent whose own forked children still hold the pipe's other end.
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


def environment(temporary: str) -> dict[str, str]:
    """The command's: with a directory of its own for temporary files, which goes when nothing of the command is left.

    A killed vLLM leaves seven sockets and a rendezvous file each time. torch's compile cache is worth keeping.
    """
    changed = dict(os.environ)
    if len(os.fsencode(temporary)) + 1 + 36 <= SOCKET_PATH:
        os.mkdir(temporary, 0o700)
        cache = os.path.join(changed.get("TMPDIR", "/tmp"), f"torchinductor_{os.getuid()}")
        # Last, not first: torch sets it again, and setproctitle finds a process' title by the first variable.
        changed.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        changed["TMPDIR"] = temporary
    return changed


def start(argv: list[str], record: RecordWriter) -> subprocess.Popen:
    """Start the command, which the record names before it runs. Raises OSError if it or the record cannot be."""
    watchdog = os.getpid()
    record.write(set())
    if os.getppid() != record.parent:
        raise ProcessLookupError(errno.ESRCH, "its parent has ended")

    def prepare() -> None:
        # Should the watchdog be killed, the command at least gets a SIGTERM: now if it has come while it was blocked.
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        record.write_self()
        if os.getppid() != watchdog:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    return subprocess.Popen(
        argv,
        env=environment(record.path),
        process_group=0,
        preexec_fn=prepare,  # noqa: PLW1509 (no threads here)
    )


def main() -> int:
    """argv: the pipe's read end, our record file without its suffix, then the command."""
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
    except FileNotFoundError:  # cleared by another process, so nobody waits for us
        return 127
    try:
        command = start(argv, record)
    except OSError as error:
        print(f"cannot start {argv[0]}: {error.strerror}", file=sys.stderr)
        code = 127
    else:
        handle = Handle(command.pid)

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
