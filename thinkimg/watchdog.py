"""The process between us and a child: runs a command and ends all that descends from it when our end of a pipe closes.

Run by path with `python -I -S` (see process.py), so it uses the standard library only and imports nothing of thinkimg.
Linux. It is a child subreaper: a grandchild whose parent has gone, or that started a session of its own, still
descends from it.

    thinkimg ──pipe──► watchdog ──► command ──► VLLM::EngineCore, workers, ...
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PARENT_GONE_GRACE_S = 3.0  # from SIGTERM to SIGKILL; a vLLM server needs two to leave no shared memory behind
LEFTOVER_GRACE_S = 3.0  # what descendants may take to leave after the command itself has ended
SOCKET_PATH = 107  # bytes that the kernel allows; the names of vLLM's are 36 long
TRACKER_GRACE_S = 1.0  # what Python's resource trackers may then take to unlink what the killed ones left


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def descendants(root: int) -> list[int]:
    """Process ids of all living descendants of `root`, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    # the name in parentheses may itself hold spaces and parentheses
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
                continue
            if state != b"Z":
                children.setdefault(int(parent), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def kill_all(*, trackers: bool) -> None:
    """SIGKILL to every descendant, to Python's resource trackers only if told so."""
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError, FileNotFoundError):  # ended meanwhile
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                is_tracker = b"resource_tracker" in file.read()  # multiprocessing's, and loky's
            if trackers or not is_tracker:
                os.kill(pid, signal.SIGKILL)


def reap(command: subprocess.Popen) -> None:
    """Collect every ended child, adopted ones included, and note the command's exit status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == command.pid:
            command.returncode = os.waitstatus_to_exitcode(status)


def supervise(command: subprocess.Popen, pipe: int, parent: int, wake: int) -> None:
    """Wait for the command to end; stop it when asked to, or when the parent is gone."""
    kill_at = None  # monotonic time of the SIGKILL, once a stop was asked for
    watched = [pipe, wake]

    def stop(grace_s: float) -> None:
        nonlocal kill_at
        if kill_at is None or time.monotonic() + grace_s < kill_at:
            kill_at = time.monotonic() + grace_s
        # To the command alone: vLLM ends its own processes in good order, and loses shared memory if they all get it.
        with suppress(ProcessLookupError):  # ended meanwhile
            os.kill(command.pid, signal.SIGTERM)

    while command.returncode is None:
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
        elif kill_at is None and os.getppid() != parent:
            stop(PARENT_GONE_GRACE_S)
        reap(command)
        if kill_at is not None and time.monotonic() >= kill_at:
            kill_all(trackers=False)
    give_up = min(kill_at or float("inf"), time.monotonic() + LEFTOVER_GRACE_S)
    while descendants(os.getpid()):
        if time.monotonic() >= give_up:
            kill_all(trackers=time.monotonic() >= give_up + TRACKER_GRACE_S)
        time.sleep(0.02)
        reap(command)


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


def main() -> int:
    """argv: the pipe's read end, the parent's process id, our record file without its suffix, then the command."""
    pipe, parent, record, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    os.set_inheritable(pipe, False)
    try:
        # Should this process be killed itself, the command at least gets a SIGTERM.
        command = subprocess.Popen(
            argv,
            env=environment(record),
            process_group=0,
            preexec_fn=die_with_parent,  # noqa: PLW1509 (no threads here)
        )
    except OSError as error:
        print(f"cannot start {argv[0]}: {error.strerror}", file=sys.stderr)
        code = 127
    else:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(command.pid, signal.SIGTERM))
        supervise(command, pipe, parent, wake)
        code = command.returncode
    shutil.rmtree(record, ignore_errors=True)
    for suffix in (".part", ".json"):
        with suppress(FileNotFoundError):
            os.unlink(record + suffix)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
