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


@pytest.mark.parametrize(("user", "kept"), [({}, []), ({"NO_PROXY": "a.org, b.org", "no_proxy": "c"}, ["a.org", "c"])])
def test_prefect_asks_no_proxy_for_this_machine(tmp_path, user, kept):
    """Its client heeds HTTP_PROXY for localhost, so that a deploy behind a proxy did not reach the own server."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "requirements").mkdir()
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    for name in ("prefect", "python"):
        (tool := tmp_path / ".venv/bin" / name).write_text('#!/bin/sh\nprintf "%s|%s\\n" "$NO_PROXY" "$no_proxy"\n')
        tool.chmod(0o755)
    (tmp_path / ".venv/ready").touch()
    environment = {"PATH": os.environ["PATH"], "HTTP_PROXY": "http://127.0.0.1:9"} | user
    for target in ("server", "deploy", "worker"):
        command = ["make", "--no-print-directory", target]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        for line in done.stdout.splitlines():
            upper, lower = line.split("|")
            assert upper == lower and {"127.0.0.1", "localhost", "::1", *kept} <= set(upper.split(",")), line
        assert done.stdout, done.stderr
