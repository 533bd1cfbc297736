"""Records and temporary files of another machine, or of another container on this one: nothing there is touched."""

import json
import os
import subprocess
import time

import pytest

from thinkimg import process
from thinkimg.watchdog import process_table


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))


def dead() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


@pytest.mark.parametrize("boot", [None, "another-boot"])
@pytest.mark.parametrize("foreign", [True, False])
def test_a_record_of_another_origin_is_left_alone(foreign, boot):
    """There the ids belong to other processes: here to a stranger, though the start time agrees."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        started = process_table([stranger.pid])[stranger.pid].started
        boot = boot or process.boot_id()
        content = {
            "name": "engine", "parent": {"pid": dead(), "started": 1, "boot": boot},
            "origin": "ffffffff" if foreign else process.origin(),
            "watchdog": {"pid": stranger.pid, "started": started, "boot": boot}, "members": [[stranger.pid, started]],
        }  # fmt: skip
        path = process.run_directory() / "engine-1-1.json"
        path.write_text(json.dumps(content))
        began = time.monotonic()
        if foreign or boot != process.boot_id():
            process.clear_leftovers()
            assert stranger.poll() is None and path.exists() == foreign and time.monotonic() - began < 5
        stranger.kill()


def test_temporary_files_of_another_origin_stay(tmp_path):
    with process.scratch() as own:
        folder = own.parent
        _, origin, boot, pid, started, _ = own.name.split("-", 5)
        assert origin == process.origin() and int(pid) == os.getpid()
        foreign = folder / f"scratch-ffffffff-{boot}-{dead()}-1-x"
        ours = folder / f"scratch-{origin}-{boot}-{dead()}-1-x"
        rebooted = folder / f"scratch-{origin}-00000000-{pid}-{started}-x"
        for path in (foreign, ours, rebooted):
            path.mkdir()
        with process.scratch():
            assert foreign.exists() and not ours.exists() and not rebooted.exists() and own.exists()


def test_a_child_of_ours_writes_where_it_is_from():
    with process.spawn(["sleep", "60"], name="sleeper"):
        (path,) = process.run_directory().glob("sleeper-*.json")
        assert (
            json.loads(path.read_text())["origin"] == process.origin() == process.parse_record(path.read_text()).origin
        )
