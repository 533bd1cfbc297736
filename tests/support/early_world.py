"""Artifacts in the making, for tests of what follows them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
from rewards_rows import call, failed, final, malformed, sample, trajectory

from thinkimg import records
from thinkimg.config.load import load_config
from thinkimg.records import AnswerType, to_row
from thinkimg.store.artifacts import Store, Work
from thinkimg.store.manifest import Artifact, Recipe

ENDS_S = 20.0


class Growing:
    """Artifact that a thread makes; as the handle of a stage."""

    def __init__(self, store: Store, recipe: Recipe | None = None):
        self.store, self.recipe = store, recipe or Recipe("grows", 1, 1, {})
        self.work: Work | None = None
        self.artifact: Artifact | None = None
        self.error: BaseException | None = None
        self.done = self.reached_end = False

    @property
    def succeeded(self) -> bool:
        return self.artifact is not None

    def result(self) -> Artifact:
        assert self.artifact is not None
        return self.artifact

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + ENDS_S
        while not condition() and not self.reached_end:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    @contextmanager
    def run(self, produce: Callable[[Work], None], kind: str = "rollouts") -> Iterator[None]:
        """Make it in a thread while the block runs; raises what that has raised."""

        def begin(work: Work) -> None:
            self.work = work
            produce(work)

        def make() -> None:
            try:
                self.artifact, _ = self.store.build(kind, self.recipe, begin)
            except BaseException as error:
                self.error = error
            self.done = True

        thread = threading.Thread(target=make)
        thread.start()
        try:
            yield
        finally:
            self.reached_end = True
            thread.join(ENDS_S)
        assert not thread.is_alive(), "somebody keeps it waiting"
        if self.error is not None:
            raise self.error


def config():
    return load_config("tiny", ["image.types=[]"])


def make_dataset(store: Store) -> Artifact:
    def produce(work: Work) -> None:
        rows = [replace(sample("red", AnswerType.CHOICE, ("red", "blue")), sample_id=f"s{i}") for i in range(4)]
        work.table("samples.parquet", pa.Table.from_pylist([to_row(row) for row in rows], records.sample_schema()))
        work.table("images.parquet", pa.Table.from_pylist([], records.image_schema()))

    return store.build("dataset", Recipe("prepare", 1, 1, {}), produce)[0]


def make_rollouts(store: Store, dataset: Artifact) -> Artifact:
    """Rollouts in four parts, each with trajectories that are right, wrong, malformed and failed."""

    def produce(work: Work) -> None:
        for number in range(4):
            rows = [
                trajectory(call(x=1), final("red"), answer="red"),
                trajectory(answer="blue"),
                trajectory(malformed()),
            ]
            names = {"sample_id": f"s{number}", "group_id": f"g{number}"}
            rows = [replace(row, trajectory_id=f"t{number}-{i}", **names) for i, row in enumerate([*rows, failed()])]
            work.table(f"images-{number:05}.parquet", pa.Table.from_pylist([], records.image_schema()))
            work.table(
                f"trajectories-{number:05}.parquet",
                pa.Table.from_pylist([to_row(row) for row in rows], records.trajectory_schema()),
            )

    return store.build("rollouts", Recipe("rollout", 1, 1, {}, {"dataset": dataset.reference}), produce)[0]


def parts_of(rollouts: Artifact) -> list[str]:
    return sorted(name for name in rollouts.files if name.startswith("trajectories"))


def grow(making: Growing, work: Work, rollouts: Artifact, reached: Callable[[int], bool]) -> None:
    """Close the parts of complete rollouts again, one after the other, each when the one before was `reached`."""
    for count, part in enumerate(parts_of(rollouts), start=1):
        for name in (part.replace("trajectories", "images"), part):
            if not work.has(name):
                work.table(name, pq.read_table(rollouts.path(name)))
        making.wait_for(lambda count=count: reached(count))
