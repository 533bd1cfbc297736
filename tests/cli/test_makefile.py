"""The Makefile in a clone whose path, and with an API whose address, has what a shell would read otherwise."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import REPOSITORY

TOOL = '#!/bin/sh\nprintf "%s\\n" "$(basename "$0") $*|$PWD|$PREFECT_API_URL|$PREFECT_HOME|$DO_NOT_TRACK"\n'


@pytest.mark.parametrize("folder", ["my projects", "a'b", 'a"b', "a$HOME", "a;b & c", "(a)", "é #1"])
def test_a_clone_lies_anywhere(tmp_path, folder):
    """F28: a folder with a blank was cut, and its second half taken for a command."""
    clone = tmp_path / folder / "thinkimg"
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / "requirements").mkdir()
    shutil.copy(REPOSITORY / "Makefile", clone)
    (clone / "pyproject.toml").touch()
    for name in ("prefect", "python", "thinkimg"):
        (tool := clone / ".venv/bin" / name).write_text(TOOL)
        tool.chmod(0o755)
    (clone / ".venv/ready").touch()
    address = "http://127.0.0.1:4300/api?a=1&b='2'"
    environment = {"PATH": os.environ["PATH"], "PREFECT_API_URL": address}

    def make(target: str) -> list[list[str]]:
        command = ["make", "--no-print-directory", target]
        done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [line.split("|") for line in done.stdout.splitlines()]

    asked = make("deploy") + make("worker")
    assert [words[0].split()[:2] for words in asked] == [
        ["prefect", "--no-prompt"], ["python", "-m"], ["prefect", "--no-prompt"], ["prefect", "--no-prompt"]
    ]  # fmt: skip
    for _, directory, api, home, untracked in asked:
        assert (directory, api, home, untracked) == (str(clone), address, str(clone / ".prefect"), "true")
    environment["PREFECT_API_URL"] = "http://127.0.0.1:4300/api"
    (server,) = make("server")
    assert server[0].endswith("--port 4300") and Path(server[3]) == clone / ".prefect"
    assert make("demo")[0][0] == "thinkimg run --preset tiny"
