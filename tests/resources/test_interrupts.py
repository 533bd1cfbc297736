"""Signals while something starts: the first is answered at once, ends the start within seconds, and leaves nothing."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import title

from thinkimg.watchdog import descendants

# A command that waits for a start. The server's and the trainer's programs never answer.
COMMAND = """
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
import thinkimg.engine.server, thinkimg.trainer.client
from thinkimg.config.load import load_config
from thinkimg.engine.settings import EngineSettings
from thinkimg.exit import run_guarded
from thinkimg.models.base import BaseSource
from thinkimg.resources import Resources

place = Path(sys.argv[2])
(place / "model").mkdir()
(place / "model" / "config.json").write_text("{}")
silent = [sys.executable, "-c", "import time; time.sleep(600)  # silent"]
thinkimg.engine.server.server_command = lambda *_: silent
thinkimg.trainer.client.build_launch_command = lambda *_, **__: silent
policy = SimpleNamespace(digest="d", is_full=True, model_directory=place / "model")
limits = EngineSettings(dtype="float32", max_tokens=1024, max_images=4, max_pixels=2_000_000)
base = BaseSource(path="nowhere", revision=None, tiny=True)

def stage():
    cores = "0|1" if sys.argv[1] == "engines" else "0"
    config = load_config("tiny", [f"where.store={place}", f"where.engine.cpu_threads_bind={cores}"])
    with Resources(config.where, say=lambda line: print(line, flush=True)) as it:
        if sys.argv[1] in ("engine", "engines"):
            asyncio.run(it.engine(policy, limits, base))
        elif sys.argv[1] == "judges":
            asyncio.run(gather(it))
        elif sys.argv[1] == "trainer":
            it.trainer.submit({})

async def gather(it):
    await asyncio.gather(asyncio.sleep(600), it.engine(policy, limits, base))

run_guarded(stage)
"""
PREPARE = ["-m", "thinkimg", "prepare", "--preset", "tiny", "--set", "where.tracking.enabled=false"]


def interrupt(command: list[str], place: Path, number: int, ready: str) -> str:
    """Send a signal to a command once a process with `ready` in its title runs; return what it said on stderr."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=place, env=os.environ | {"PREFECT_HOME": str(place / "prefect")},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (
            family := [
                pid for pid in descendants(process.pid) if ready in title(pid) and "watchdog.py" not in title(pid)
            ]
        ):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.05)
        time.sleep(0.3)
        started = time.monotonic()
        process.send_signal(number)
        assert select.select([process.stderr], [], [], 3)[0], "nothing is said"
        # What readline had in its buffer beyond the first line would be lost to communicate.
        first, _, early = os.read(process.stderr.fileno(), 4096).decode().partition("\n")
        assert "stopping" in first, first
        rest = early + process.communicate(timeout=60)[1]
        assert time.monotonic() - started < 12
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + number, rest
    assert "Traceback" not in rest and len(rest.splitlines()) <= 1, rest
    assert not [pid for pid in family if title(pid)]
    return rest


@pytest.mark.parametrize(
    ("start", "number"),
    [
        ("engine", signal.SIGINT),
        ("engine", signal.SIGTERM),
        ("engines", signal.SIGINT),
        ("judges", signal.SIGINT),
        ("trainer", signal.SIGINT),
    ],
)
def test_the_first_signal_ends_a_start_at_once_and_says_so(tmp_path, start, number):
    interrupt(["-c", COMMAND, start, str(tmp_path)], tmp_path, number, "# silent")


def test_the_first_ctrl_c_ends_a_command_that_waits_for_prefect(tmp_path):
    interrupt(PREPARE, tmp_path, signal.SIGINT, "uvicorn")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stderr", ["/dev/full", "pipe"])
def test_the_first_signal_ends_a_start_where_stderr_takes_nothing(tmp_path, stderr, number):
    """The error of the write took the signal's place: `thinkimg run 2>&1 | tee log`, whose tee Ctrl-C ends, too."""
    reader, descriptor = (None, os.open(stderr, os.O_WRONLY)) if stderr == "/dev/full" else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "engine", str(tmp_path)],
        cwd=tmp_path, stderr=descriptor, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        os.close(descriptor)
        deadline = time.monotonic() + 60
        while not any("# silent" in title(pid) for pid in descendants(process.pid)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        if reader is not None:
            os.close(reader)
        time.sleep(0.3)
        process.send_signal(number)
        assert process.wait(15) == 128 + number
    finally:
        process.kill()
        process.wait()


INTERRUPTED = """
import os, sys, time
import pydantic
from thinkimg.exit import run_guarded

number = int(sys.argv[2])

class Model(pydantic.BaseModel):
    field: int = 0

    @pydantic.model_serializer
    def serialize(self):
        os.kill(os.getpid(), number)

class Destroyed:
    def __del__(self):
        os.kill(os.getpid(), number)

def destroy():
    del (it := [Destroyed()])[0]
    time.sleep(60)

def forget():
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        pass
    raise ImportError("multiarray failed to import")

def wrap():
    try:
        os.kill(os.getpid(), number)
    except BaseException as error:
        raise (ValueError if sys.argv[1] == "as an error" else SystemExit)(1) from error

run_guarded({
    "in a text": lambda: exec("os.kill(os.getpid(), number)"),
    "in pydantic": Model().model_dump,
    "in a destructor": destroy,
    "as an error of nothing": forget,
    "as an error": wrap,
    "as an exit": wrap,
}[sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "moment", ["in a text", "in pydantic", "in a destructor", "as an error of nothing", "as an error", "as an exit"]
)
def test_a_signal_has_its_exit_code_whatever_is_made_of_its_exception(tmp_path, moment, number):
    """Out of a text that is executed, as every import of a dataclass does, Python ended by the signal itself; pydantic
    made an error of its own of it, which nobody expected; out of a destructor it was lost, and the command went on.
    """
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, "-m", "interrupted", moment, str(int(number))],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 128 + number
    assert done.stderr.startswith("thinkimg: stopping\nthinkimg: ") and len(done.stderr.splitlines()) == 2


LATER = """
import contextlib, os, signal, time
import thinkimg.exit
from thinkimg.errors import UserError
thinkimg.exit.SOON_S = 0.1

def command():
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    raise UserError("The disk is full.")

thinkimg.exit.run_guarded(command)
"""


def test_an_error_long_after_a_signal_that_a_users_code_ignored_is_told():
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "The disk is full." in done.stderr


GUARDED = """
from thinkimg.exit import run_guarded
from thinkimg.rewards.user_function import load_function
run_guarded(lambda: load_function("slow_module:reward"))
"""


def test_a_termination_while_a_users_module_is_imported_is_no_mistake_of_the_user(tmp_path):
    (tmp_path / "slow_module.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    done = subprocess.run([sys.executable, "-c", GUARDED], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143, done.stderr
    assert "Terminated. The same command goes on" in done.stderr


FORMULAS = """
import os, signal
from thinkimg.exit import run_guarded
from thinkimg.rewards.maths import Checker
def command():
    with Checker() as checker:
        checker.ask("1", "2")
        os.killpg(0, signal.SIGINT)
        checker.ask("1", "3")
run_guarded(command)
"""


def test_a_ctrl_c_of_a_terminal_prints_no_traceback_of_the_process_that_compares_formulas(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORMULAS],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
