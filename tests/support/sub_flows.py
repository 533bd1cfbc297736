"""A pipeline of invented stages on Prefect, in a process of its own: `sub_flows.py STORE HAPPENS`.

Prints the flow run's id, "under way" once two stages are, and at the end which stages ran.

    third ──► first report          left, right ──► last ──► second report

With HAPPENS=device there is one stage, which asks for the device; "under way" is printed before that.
"""

import sys
import threading
import time

from prefect.runtime import flow_run

from flows._device import hold_device
from flows._flow import flow
from flows._run import PrefectRun
from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.resources import Resources
from thinkimg.stages.stage import Input, Job, Slice, Stage
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import Dataset

STORE, HAPPENS = sys.argv[1:]  # nothing, error, alarm, device, or interrupt: the parent's
PATIENCE_S = 60
under_way = threading.Event()


def begin() -> None:
    under_way.set()
    print("under way", flush=True)


both = threading.Barrier(2, action=begin, timeout=PATIENCE_S)
ran: list[str] = []


class Alarm(RuntimeError):
    """What the first report raises."""


class Nothing(Slice):
    name: str


def third(job: Job) -> None:
    assert under_way.wait(PATIENCE_S)
    write(job)


def side_by_side(job: Job) -> None:
    """Run until the pipeline ends, or for a second where nothing happens."""
    both.wait()
    if HAPPENS == "error" and job.settings.name == "right":
        raise UserError("the right one is broken")
    for done in range(10 if HAPPENS == "nothing" else 10 * PATIENCE_S):
        time.sleep(0.1)
        job.progress(done, 10 * PATIENCE_S)
    write(job)


def occupy(job: Job) -> None:
    print("under way", flush=True)
    assert job.resources.trainer is not None  # which holds the device
    write(job)


def write(job: Job) -> None:
    ran.append(job.settings.name)
    job.work.json("rows.json", [job.settings.name])


def invent(name: str, run, *reads: str) -> Stage:
    inputs = {role: Input(Dataset) for role in reads}
    return Stage(name=name, version=1, makes=Dataset, settings=lambda config: Nothing(name=name), run=run, reads=inputs)


def report(iteration: int, made: dict) -> None:
    if HAPPENS == "alarm":
        raise Alarm("an alarm")


@flow(name="pipeline")
def pipeline() -> str:
    config = load_config("tiny", [f"where.store={STORE}", "where.tracking.enabled=false"])
    print(flow_run.id, flush=True)
    with Resources(config.where, device=hold_device) as resources:
        run = PrefectRun(config, Store(STORE), resources, on_report=report)
        if HAPPENS == "device":
            only = run(invent("only", occupy))
            run.wait()
            return str(only.result().reference)
        run.report(0, third=run(invent("third", third)))
        left, right = (run(invent(name, side_by_side)) for name in ("left", "right"))
        last = run(invent("last", write, "left", "right"), left=left, right=right)
        run.report(1, left=left, right=right, last=last)
        run.wait()
    return str(last.result().reference)


pipeline()
print(" ".join(["ran", *sorted(ran)]), flush=True)
