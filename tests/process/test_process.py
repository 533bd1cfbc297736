"""Children must not outlive their parent, however it ends, nor leave descendants."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import REPOSITORY

from thinkimg import process
from thinkimg.process import clear_leftovers, spawn
from thinkimg.watchdog import process_table

# A command that ignores SIGTERM, with a grandchild that does too, in a session of its own and orphaned (as a daemon
# is).
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
time.sleep(600)
"""
# A parent of such a command. A forked worker survives it, holding the write end of its pipe.
PARENT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from thinkimg.process import spawn
child = spawn([sys.executable, "-c", sys.argv[2], sys.argv[3]], name="stubborn")
worker = os.fork()
if worker == 0:
    time.sleep(30)
    os._exit(0)
print(child.pid, worker, flush=True)
time.sleep(600)
"""


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.02)


def alive(pid) -> bool:
    return process.identify(int(pid)) is not None


def start_stubborn(tmp_path):
    child = spawn([sys.executable, "-c", STUBBORN, str(tmp_path)], name="stubborn")
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, 10)
    return child, [int(path.name) for path in tmp_path.iterdir()]


def start_parent(tmp_path):
    argv = [sys.executable, "-c", PARENT, str(REPOSITORY), STUBBORN, str(tmp_path)]
    parent = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    watchdog, worker = map(int, parent.stdout.readline().split())
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, 10)
    return parent, watchdog, worker, [int(path.name) for path in tmp_path.iterdir()]


def test_status_environment_and_log(tmp_path):
    log = tmp_path / "logs" / "child.log"
    code = "import os, sys; print(os.environ['COLOUR']); print('oops', file=sys.stderr); sys.exit(3)"
    for colour in ("red", "blue"):  # the log is appended to, its tail is that of one child
        with spawn([sys.executable, "-c", code], name="child", env={"COLOUR": colour}, log_path=log) as child:
            assert child.wait(10) == 3
            assert not child.alive
            assert sorted(child.log_tail().split()) == sorted(["oops", colour])
    assert log.read_text().count("oops") == 2


TEMPORARY = """
import tempfile, time
print(tempfile.mkdtemp(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("killed", ["nobody", "parent", "parent and watchdog"])
def test_a_commands_temporary_files_go_with_it(tmp_path_factory, monkeypatch, killed):
    run = tmp_path_factory.mktemp("run")
    monkeypatch.setattr(process, "run_directory", lambda: run)
    code = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from thinkimg import process
process.run_directory = lambda: Path(sys.argv[2])
with process.spawn([sys.executable, "-c", sys.argv[3]], name="child") as child:
    print(child.pid, flush=True)
    sys.stdin.readline()
"""
    argv = [sys.executable, "-c", code, str(REPOSITORY), str(run), TEMPORARY]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        made, watchdog = sorted(parent.stdout.readline().strip() for _ in range(2))  # they come in either order
        assert os.path.isdir(made) and Path(made).is_relative_to(run)
        if killed == "parent and watchdog":
            os.kill(int(watchdog), signal.SIGKILL)
        if killed != "nobody":
            parent.kill()
    if killed != "nobody":
        clear_leftovers()
    assert list(run.iterdir()) == []


def test_missing_program_is_told_in_the_log(tmp_path):
    with spawn(["/nowhere/program"], name="child", log_path=tmp_path / "log") as child:
        assert child.wait(10) == 127
        assert "cannot start /nowhere/program" in child.log_tail()


def test_polite_child_ends_at_once():
    child = spawn([sys.executable, "-c", "import time; time.sleep(600)"], name="polite")
    time.sleep(0.3)
    started = time.monotonic()
    assert child.terminate(timeout=20) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 5
    assert child.terminate() == 128 + signal.SIGTERM  # again is harmless


def test_stubborn_family_is_killed_after_the_timeout(tmp_path):
    child, family = start_stubborn(tmp_path)
    started = time.monotonic()
    assert child.terminate(timeout=0.5) == 128 + signal.SIGKILL
    assert 0.4 < time.monotonic() - started < 5
    assert not any(map(alive, family))


def test_family_ends_with_the_command_itself(tmp_path):
    """The command's exit is the end of whatever it left in the background."""
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}, {str(tmp_path)!r}])"
    code += f"\nimport os, time\nwhile len(os.listdir({str(tmp_path)!r})) < 2: time.sleep(0.05)"
    with spawn([sys.executable, "-c", code], name="child") as child:
        assert child.wait(15) == 0
    assert not any(alive(path.name) for path in tmp_path.iterdir())


def test_kill_of_the_parent_ends_the_family(tmp_path):
    parent, watchdog, worker, family = start_parent(tmp_path)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        assert alive(worker)  # so the pipe was still open
        wait_for(lambda: not any(map(alive, [watchdog, *family])), 8)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_restart_waits_for_a_watchdog_that_is_still_at_work(tmp_path):
    parent, watchdog, worker, family = start_parent(tmp_path)
    os.kill(worker, signal.SIGKILL)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    clear_leftovers()
    assert not any(map(alive, [watchdog, *family]))


def test_leftovers_of_a_killed_parent_and_watchdog_are_cleared(tmp_path):
    parent, watchdog, worker, family = start_parent(tmp_path)
    os.kill(worker, signal.SIGKILL)
    mine = spawn([sys.executable, "-c", "import time; time.sleep(60)"], name="mine")
    os.kill(watchdog, signal.SIGKILL)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    in_session = [pid for pid, process in process_table().items() if process.session == watchdog]
    assert in_session  # SIGTERM, which the command got from the kernel, is ignored
    assert "stubborn" in clear_leftovers()
    wait_for(lambda: not any(map(alive, in_session)), 5)
    assert mine.alive  # its parent lives
    mine.terminate()
    for pid in family:  # the orphan in a session of its own, if the watchdog had not looked since it started
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_record_of_another_boot_is_dropped_without_killing(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "run_directory", lambda: tmp_path)
    with spawn([sys.executable, "-c", "import time; time.sleep(60)"], name="child") as child:
        (own,) = tmp_path.glob("*.json")
        record = json.loads(own.read_text())
        record["parent"] |= {"boot": "another", "started": 1}
        (tmp_path / "old.json").write_text(json.dumps(record))
        assert clear_leftovers() == []
        assert child.alive
        assert [path.name for path in tmp_path.glob("*.json")] == [own.name]
    assert list(tmp_path.glob("*.json")) == []


def test_wait_times_out():
    with spawn([sys.executable, "-c", "import time; time.sleep(60)"], name="child") as child:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.1)
        assert child.returncode is None


def test_scratch_of_a_killed_process_is_removed_by_the_next_and_that_of_a_living_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "scratch_directory", lambda: tmp_path)
    code = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from thinkimg import process
process.scratch_directory = lambda: Path(sys.argv[2])
with process.scratch() as directory:
    (directory / "media").mkdir()
    print(directory, flush=True)
    time.sleep(600)
"""
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(REPOSITORY), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        killed, living = (other.stdout.readline().strip() for other in others)
        others[0].kill()
        others[0].wait()
        with process.scratch() as mine:
            assert sorted(map(str, tmp_path.glob("scratch-*"))) == sorted([living, str(mine)])
        assert [str(path) for path in tmp_path.glob("scratch-*")] == [living] and killed != living
    finally:
        for other in others:
            other.kill()
            other.communicate()
