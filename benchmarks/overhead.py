"""What orchestration costs: each iteration of a loop, split into work and what is around it.

    python benchmarks/overhead.py --preset tiny --set where.store=/tmp/overhead --set iterations=3

    work      the stages' own computing: engine, trainer, tools, rewards
    store     hashing, syncing, renaming and reading or writing Parquet in the main thread, and the wait for a rollout's
              last part; what other threads store, while conversations go on or judges judge, counts as work
    prefect   everything between a sub-flow's call and its stage, and back: states, settings, tables, links
    mlflow    the loop's record and its projection, traces included

The limit is 5 % of an iteration of 60 s or more, and 3 s of a shorter one. Iteration 0 (prepare, warm start, the first
evaluation) is shown and not judged: servers start in it.
"""

import asyncio
import functools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import cyclopts

SHARE, LONG_S, SECONDS = 0.05, 60.0, 3.0
PARTS = ("store", "prefect", "mlflow")


class Clock:
    """Seconds of the main thread by name; of nested calls of one name only the outermost counts."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self._running: set[str] = set()

    def timed(self, name: str, function: Callable) -> Callable:
        """For a coroutine function the seconds until it has ended."""

        @functools.wraps(function)
        def call(*arguments, **options):
            if name in self._running or threading.current_thread() is not threading.main_thread():
                return function(*arguments, **options)
            with self._timing(name):
                return function(*arguments, **options)

        @functools.wraps(function)
        async def wait(*arguments, **options):
            if name in self._running:
                return await function(*arguments, **options)
            with self._timing(name):
                return await function(*arguments, **options)

        return wait if asyncio.iscoroutinefunction(function) else call

    @contextmanager
    def _timing(self, name: str) -> Iterator[None]:
        self._running.add(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._running.discard(name)
            self.seconds[name] += time.perf_counter() - started

    def patch(self, name: str, owner: object, *attributes: str) -> None:
        for attribute in attributes:
            setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))


def measure(preset: str, overrides: list[str]) -> list[dict[str, float]]:
    """Seconds per iteration, by part."""
    import pyarrow.parquet as pq

    import flows.loop as pipeline
    from thinkimg.stages.rollout import Writer
    from thinkimg.store import artifacts, files
    from thinkimg.tracking import LoopTracker

    clock, rows = Clock(), []
    clock.patch("store", files, "sync", "sync_tree", "rename", "remove", "sha256", "append")
    clock.patch("store", artifacts, "write_table")
    clock.patch("store", pq, "read_table", "read_metadata")
    clock.patch("store", artifacts.Artifact, "table", "checked")
    clock.patch("store", Writer, "__aexit__")
    for name in ("prepare", "warmstart", "rollout", "score", "train", "evaluate"):
        module = sys.modules[f"flows.{name}"]
        clock.patch("stage", module.stage, name)
        setattr(pipeline, name, clock.timed("flow", getattr(pipeline, name)))
    log_iteration = clock.timed("mlflow", LoopTracker.log_iteration)
    began = time.perf_counter()

    def iteration_ends(self, step, *arguments, **options):
        nonlocal began
        log_iteration(self, step, *arguments, **options)
        spent, clock.seconds = clock.seconds, Counter()
        wall = time.perf_counter() - began
        began = time.perf_counter()
        row = {
            "wall": wall,
            "store": spent["store"],
            "prefect": spent["flow"] - spent["stage"],
            "mlflow": spent["mlflow"],
        }
        row |= {"work": wall - around(row)}
        if step < len(rows):  # the alarms log once more
            rows[step] = {name: rows[step][name] + value for name, value in row.items()}
            return
        rows.append(row)
        print(f"{headings()}\n{line(step, row)}", flush=True)  # at once: a loop may take hours

    LoopTracker.log_iteration = iteration_ends
    pipeline.loop(preset=preset, overrides=overrides)
    return rows


def allowed(wall: float) -> float:
    return SHARE * wall if wall >= LONG_S else SECONDS


def headings() -> str:
    return "".join(f"{name:>10}" for name in ("iteration", "wall s", "work", *PARTS, "around", "allowed"))


def line(number: int, row: dict[str, float]) -> str:
    cells = [row["wall"], row["work"], *(row[part] for part in PARTS), around(row), allowed(row["wall"])]
    return f"{number:>10}" + "".join(f"{cell:>10.2f}" for cell in cells)


def around(row: dict[str, float]) -> float:
    return sum(row[part] for part in PARTS)


def main(
    *,
    preset: str = "tiny",
    set: Annotated[list[str] | None, cyclopts.Parameter(name="--set", negative=[])] = None,
) -> None:
    """Run a loop and split its iterations; exit code 1 if orchestration costs more than it may."""
    rows = measure(preset, set or [])
    print("\n".join([headings(), *(line(number, row) for number, row in enumerate(rows))]))
    if any(around(row) > allowed(row["wall"]) for row in rows[1:]):
        raise SystemExit(1)


if __name__ == "__main__":
    cyclopts.run(main)
