"""The stages of a pipeline as sub-flows on a real Prefect server: side by side, cached, and ended together."""

import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from paths import SUPPORT
from prefect_server import ENDED, PrefectServer, wait_for


@pytest.fixture(scope="module")
def prefect(tmp_path_factory):
    with PrefectServer(tmp_path_factory.mktemp("prefect")) as server:
        yield server


class Run:
    """A pipeline's run (sub_flows.py), ended; `children`: its sub-flow runs by name."""

    def __init__(self, prefect: PrefectServer, store: Path, happens: str):
        with start(prefect, store, happens) as process:
            self.id = process.stdout.readline().strip()
            if happens == "interrupt":
                assert process.stdout.readline() == "under way\n"
                process.send_signal(signal.SIGINT)
            self.output, self.errors = process.communicate(timeout=120)
        self.code = process.returncode
        assert self.id, self.errors
        self.flow_run, self.children = prefect.ask(f"/flow_runs/{self.id}"), prefect.children(self.id)

    def state(self, name: str) -> tuple[str, str]:
        return self.children[name]["state_type"], self.children[name]["state_name"]

    def span(self, name: str) -> tuple[datetime, datetime]:
        return tuple(datetime.fromisoformat(self.children[name][key]) for key in ("start_time", "end_time"))


def start(prefect: PrefectServer, store: Path, happens: str) -> subprocess.Popen:
    command = [sys.executable, str(SUPPORT / "sub_flows.py"), str(store), happens]
    return subprocess.Popen(command, env=prefect.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended_task(prefect: PrefectServer, child: dict) -> dict:
    """The task run that stands for a sub-flow, once it reads ended: the server learns of it by an event."""

    def task():
        found = prefect.ask(f"/task_runs/{child['parent_task_run_id']}")
        return found["state_type"] in ENDED and found

    return wait_for(task, 60)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def whole(prefect, store) -> Run:
    return Run(prefect, store, "nothing")


def test_two_stages_run_side_by_side_as_children_of_the_pipelines_run(prefect, whole):
    assert whole.code == 0, whole.errors
    assert whole.flow_run["state_type"] == "COMPLETED" and "ran last left right third" in whole.output
    assert {name: whole.state(name) for name in whole.children} == dict.fromkeys(
        ("third", "left 1", "right 1", "last 1"), ("COMPLETED", "Completed")
    )
    for child in whole.children.values():
        task = ended_task(prefect, child)
        assert task["flow_run_id"] == whole.id and task["state_type"] == "COMPLETED"
    (left_start, left_end), (right_start, right_end) = whole.span("left 1"), whole.span("right 1")
    assert max(left_start, right_start) < min(left_end, right_end)
    assert whole.span("last 1")[0] >= max(left_end, right_end)
    assert whole.children["last 1"]["parameters"]["inputs"].keys() == {"left", "right"}


def test_the_second_time_all_is_cached(prefect, whole, store):
    again = Run(prefect, store, "nothing")
    assert again.code == 0 and again.output.splitlines()[-1] == "ran", again.errors
    assert {again.state(name) for name in again.children} == {("COMPLETED", "Cached")} and len(again.children) == 4


@pytest.mark.parametrize(
    ("happens", "ended", "said"),
    [
        ("error", "FAILED", "the right one is broken"),
        ("alarm", "FAILED", "an alarm"),
        ("interrupt", "CRASHED", "KeyboardInterrupt"),
    ],
)
def test_what_ends_the_pipeline_ends_the_stages_under_way(prefect, tmp_path, happens, ended, said):
    run = Run(prefect, tmp_path, happens)
    assert run.code != 0 and said in run.errors, run.errors
    assert run.flow_run["state_type"] == ended
    assert set(run.children) == {"third", "left 1", "right 1"}, "nothing has begun afterwards"
    assert all(child["state_type"] in ENDED for child in run.children.values())
    interrupted = {"left 1"} if happens == "error" else {"left 1", "right 1"}
    for name in interrupted:
        assert run.state(name)[0] == "FAILED" and "was ended" in run.children[name]["state"]["message"]
    for child in run.children.values():
        ended_task(prefect, child)


HOLD = """
import time
from flows._device import hold_device
from flows._flow import flow

@flow("hold")
def hold():
    with hold_device():
        print("held", flush=True)
        time.sleep(600)

hold()
"""


@pytest.fixture
def started():
    """Processes that a test starts; those that are left are killed."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_who_waits_for_the_device_can_be_interrupted_and_gets_it_when_it_is_free(prefect, tmp_path, started):
    holder = subprocess.Popen([sys.executable, "-c", HOLD], env=prefect.environment, stdout=subprocess.PIPE, text=True)
    started.append(holder)
    assert holder.stdout.readline() == "held\n"
    interrupted, patient = (start(prefect, tmp_path / name, "device") for name in ("interrupted", "patient"))
    started += [interrupted, patient]
    for process in (interrupted, patient):
        assert (process.stdout.readline(), process.stdout.readline())[1] == "under way\n"
    time.sleep(1)
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate(timeout=30)
    assert interrupted.returncode != 0 and "KeyboardInterrupt" in errors, errors
    assert patient.poll() is None and not [*tmp_path.glob("patient/dataset/*/0001")]
    holder.send_signal(signal.SIGINT)
    output, errors = patient.communicate(timeout=120)
    assert patient.returncode == 0 and output.endswith("ran only\n"), errors
    assert prefect.limit()["active_slots"] == 0
