"""Cost of orchestration: each iteration of a loop, split into work and the rest.

    python benchmarks/overhead.py --preset tiny --set where.store=/tmp/overhead --set iterations=3

Stages run in threads, some side by side, so that times don't add up: what counts is what each moment was used for. An
iteration lasts from the end of the report before it to the end of its own; stages of the next one run within it.

    work      any stage's `run` computes: engine, trainer, tools, rewards. Its thread reading or writing the store does
              not count. Other threads that store meanwhile do: parts of a rollout, judgements
    store     else, any thread hashes, syncs, renames, reads or writes Parquet, or waits for a rollout's last part
    mlflow    else, the loop's record and its projection are written, traces included
    prefect   else, a sub-flow is under way: states, settings, tables, links
    rest      else: alarms, the loop's table, and the scheduler

All but work is cost. The limit is 5 % of an iteration of 60 s or more, and 3 s of a shorter one. Iteration 0 (prepare,
warm start, the first evaluation) is shown and not judged: servers start in it.
"""

import asyncio
import functools
import inspect
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated

import cyclopts

SHARE, LONG_S, SECONDS = 0.05, 60.0, 3.0
PARTS = ("store", "mlflow", "prefect", "rest")

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as intervals that are apart, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def without(intervals: list[Interval], taken: list[Interval]) -> list[Interval]:
    """The moments of `intervals` that are not in `taken`; both as `union` returns them."""
    left: list[Interval] = []
    waiting = list(reversed(taken))
    for start, end in intervals:
        while waiting and waiting[-1][1] <= start:
            waiting.pop()
        for begin, stop in reversed(waiting):
            if begin >= end:
                break
            if begin > start:
                left.append((start, begin))
            start = max(start, stop)
        if start < end:
            left.append((start, end))
    return left


def seconds(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


class Clock:
    """When which thread did what."""

    def __init__(self):
        self._spans: dict[tuple[str, int], list[Interval]] = defaultdict(list)
        self._open: dict[tuple[str, int], list[float]] = defaultdict(list)

    def spans(self, name: str, thread: int | None = None) -> list[Interval]:
        """The moments until now at which any thread, or that one, was in a function of this name."""
        # Copies, as other threads go on. Those that are open first: one that ends meanwhile is in both.
        going = [(key, [(start, time.perf_counter()) for start in starts]) for key, starts in list(self._open.items())]
        ended = list(self._spans.items())
        return union(
            span for (of, by), spans in going + ended if of == name and thread in (None, by) for span in list(spans)
        )

    def worked(self) -> list[Interval]:
        """The moments at which any stage computed."""
        threads = {thread for name, thread in list(self._open) if name == "run"}
        return union(span for one in threads for span in without(self.spans("run", one), self.spans("store", one)))

    def split(self, start: float, end: float) -> dict[str, float]:
        """Seconds of an iteration, by what they were used for."""
        left = [(start, end)]
        row = {"wall": end - start}
        for part, used in (
            ("work", self.worked()),
            *((name, self.spans(name)) for name in ("store", "mlflow", "flow")),
        ):
            after = without(left, used)
            row["prefect" if part == "flow" else part] = seconds(left) - seconds(after)
            left = after
        return row | {"rest": seconds(left)}

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        key = name, threading.get_ident()
        self._open[key].append(time.perf_counter())
        try:
            yield
        finally:
            self._spans[key].append((self._open[key][-1], time.perf_counter()))
            self._open[key].pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """Return the function with its time noted: a coroutine's until its end, a generator's step by step."""

        @functools.wraps(function)
        def call(*arguments, **options):
            with self.timing(name):
                return function(*arguments, **options)

        @functools.wraps(function)
        async def wait(*arguments, **options):
            with self.timing(name):
                return await function(*arguments, **options)

        @functools.wraps(function)
        def steps(*arguments, **options):
            iterator, end = function(*arguments, **options), object()
            while True:
                with self.timing(name):
                    step = next(iterator, end)
                if step is end:
                    return
                yield step

        if asyncio.iscoroutinefunction(function):
            return wait
        return steps if inspect.isgeneratorfunction(function) else call

    def patch(self, name: str, owner: object, *attributes: str) -> None:
        for attribute in attributes:
            # Of stages, too, which are frozen.
            function = self.timed(name, getattr(owner, attribute))
            (type if isinstance(owner, type) else object).__setattr__(owner, attribute, function)


def measure(preset: str, overrides: list[str]) -> list[dict[str, float]]:
    """Seconds per iteration, by part."""
    import pyarrow.parquet as pq

    import flows.loop as loops
    from flows._run import PrefectRun
    from thinkimg.stages.names import stage_names
    from thinkimg.stages.prepare import puzzles
    from thinkimg.stages.rollout import Writer
    from thinkimg.stages.stage import load_stage
    from thinkimg.store import artifacts, files, kinds, manifest
    from thinkimg.tracking.loop import LoopTracker

    clock, rows = Clock(), []
    clock.patch("store", files, "sync_path", "sync_tree", "rename", "remove", "sha256", "append")
    clock.patch("store", artifacts, "write_table")
    clock.patch("store", pq, "read_table", "read_metadata")
    clock.patch("store", manifest, "read_batches")
    clock.patch("store", kinds, "read_batches")
    clock.patch("store", manifest.Artifact, "table", "checked")
    clock.patch("store", Writer, "__aexit__")
    for stage in (*map(load_stage, stage_names()), puzzles):
        clock.patch("run", stage, "run")
    clock.patch("flow", PrefectRun, "execute")
    clock.patch("mlflow", LoopTracker, "log_iteration")
    began = time.perf_counter()

    class Measured(PrefectRun):
        def __init__(self, config, store, resources, link, on_report):
            super().__init__(config, store, resources, link, self.tell)
            self.told = on_report

        def tell(self, iteration, made):
            nonlocal began
            self.told(iteration, made)
            began, start = time.perf_counter(), began
            rows.append(clock.split(start, began))
            print(f"{headings()}\n{line(iteration, rows[-1])}", flush=True)  # at once: a loop may take hours

    loops.PrefectRun = Measured
    loops.loop(preset=preset, overrides=overrides)
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
