"""Every command in odd surroundings: no traceback, the right exit code, whatever stdout, HOME and TMPDIR are.

Each command meets some of the surroundings; `make test-all` lets every command meet all of them.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from cyclopts import App
from paths import REPOSITORY, SUPPORT

from thinkimg.cli.main import app
from thinkimg.stages.names import stage_names

REFUSED = "--set", "iterations=0"
COMMANDS: dict[str, tuple[tuple[str, ...], int]] = {
    "run": (REFUSED, 2),
    "serve": (("--preset", "tiny"), 2),
    "chat": (("--policy", "no such–one", "--preset", "tiny"), 2),
    "trainer": (("--rank", "1"), 2),
    "deployments": ((), 0),
    "schema": ((), 0),
    "artifacts ls": ((), 0),
    "artifacts show": (("decece",), 0),
    "artifacts lineage": (("069a",), 0),
    "artifacts verify": (("decece",), 0),
    "artifacts gc": ((), 0),
    "artifacts export": (("569f", "out"), 0),
    "data inspect": (("no such–one",), 2),
    "data show": (("2b6d",), 0),
    "data ls": ((), 0),
    "data pin": (("no such–one",), 2),
    "track sync": (REFUSED, 2),
    "track ui": (("--port", "70000"), 2),
    "remix": (("069a", "--preset", "tiny", "--json"), 0),
    "explain": (("no such–one",), 2),
    "view": (("no such–one",), 2),
    "diff": (("069a", "069a", "--json"), 0),
    "calibrate attention": (("nothing",), 2),
    **{stage.replace("_", "-"): (REFUSED, 2) for stage in stage_names()},
}
"""Command -> arguments with which it is soon done, and its exit code."""
NEEDED = {"score": ("--rollouts", "decece"), "evaluate": ("--policy", "569f"), "train": ("--scores", "069a"),
          "rollout": ("--policy", "569f"), "demonstrate": ("--dataset", "2b6d"), "known-pairs": ("--dataset", "2b6d"),
          "train-clip": ("--dataset", "2b6d")}  # fmt: skip
PRINTING = ["artifacts export", "schema", "diff", "artifacts show", "artifacts ls"]
REFUSING = ["run", "track ui", "explain", "prepare"]


@dataclass(frozen=True)
class Surroundings:
    """What a shell may hand to a command."""

    script: str = 'exec "$@"'
    variables: dict[str, str] = field(default_factory=dict)
    is_read: bool = True
    files: bool = True
    code: Callable[[int, bool], set[int]] = lambda code, prints: {code}


def or_two(code: int, prints: bool) -> set[int]:
    return {code, 2}


SURROUNDINGS = {
    "latin-1": Surroundings(variables={"PYTHONIOENCODING": "latin-1"}),
    "ascii": Surroundings(variables={"PYTHONIOENCODING": "ascii"}),
    "posix": Surroundings(variables={"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
    "closed stdin": Surroundings('exec "$@" <&-'),
    "closed stdout": Surroundings('exec "$@" >&-'),
    "closed stderr": Surroundings('exec "$@" 2>&-'),
    "all closed": Surroundings('exec "$@" <&- >&- 2>&-'),
    "nobody reads": Surroundings(is_read=False, code=lambda code, prints: {141 if prints else code}),
    "full stdout": Surroundings('exec "$@" >/dev/full', code=lambda code, prints: {2 if prints else code}),
    "no directory": Surroundings('mkdir gone && cd gone && rmdir ../gone && exec "$@"', code=lambda code, prints: {2}),
    "full disk": Surroundings(files=False, code=or_two),
    "no home": Surroundings(variables={"HOME": "/proc/nothing/home", "TMPDIR": "/proc/nothing/tmp"}, code=or_two),
    "nothing writable": Surroundings(variables={"HOME": "/proc", "TMPDIR": "/proc"}, code=or_two),
}


def commands(group: App = app, prefix: str = "") -> Iterator[str]:
    """Yield every command of the console."""
    for name in group:
        if name.startswith("-"):
            continue
        inner = group[name]
        if any(not part.startswith("-") for part in inner):
            yield from commands(inner, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def run(place: Path, command: str, name: str) -> None:
    """Run a command in its surroundings, and check what it says and how it ends."""
    arguments, expected = COMMANDS[command]
    around, folder = SURROUNDINGS[name], place / f"{command}-{name}".replace(" ", "_")
    shutil.copytree(SUPPORT / "golden" / "store_v1", folder / "artifacts")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""} | around.variables
    python = [sys.executable, "-c", "from thinkimg.cli.main import main; main()"]
    argv = ["sh", "-c", around.script, "sh", *python, *command.split(), *NEEDED.get(command, ()), *arguments]
    reader, writer = os.pipe()
    if not around.is_read:
        os.close(reader)
    limit = None if around.files else partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0))
    try:
        with subprocess.Popen(
            argv, cwd=folder, env=environment, stdin=subprocess.DEVNULL, text=True, preexec_fn=limit,  # noqa: PLW1509
            stdout=subprocess.PIPE if around.is_read else writer, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            stdout, stderr = process.communicate(timeout=120)
    finally:
        os.close(writer)
        if around.is_read:
            os.close(reader)
    said = (command, name, process.returncode, stderr[-2000:])
    assert process.returncode in around.code(expected, expected == 0), said
    assert "Traceback" not in stderr and "Exception ignored" not in stderr and "crash" not in stderr, said
    assert "Traceback" not in (stdout or ""), said
    if process.returncode == 2 and "closed stderr" != name != "all closed":
        assert re.search(r"thinkimg: \S.+|Error", stderr), said
    if process.returncode in (0, 141):
        assert stderr == "", said
    if command in ("diff", "remix", "artifacts show") and process.returncode == 0 and around.is_read:
        assert "?" not in stdout, said  # JSON and YAML have escapes instead


def test_every_command_is_tried():
    assert set(commands()) == COMMANDS.keys()


def test_each_surroundings_meet_some_commands(tmp_path):
    pairs = [
        (sample[number % len(sample)], name)
        for number, name in enumerate(SURROUNDINGS)
        for sample in (PRINTING, REFUSING)
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pair: run(tmp_path, *pair), pairs))


@pytest.mark.long
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_all_surroundings_meet_every_command(tmp_path, name):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda command: run(tmp_path, command, name), COMMANDS))
