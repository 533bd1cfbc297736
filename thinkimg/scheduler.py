"""Scheduler of the pipeline: returns a handle at once, and runs stages in threads as soon as their inputs are there.

    pipeline(scheduler, config) ──► handles ──► wait() ──┬──► execute(handle), each in a thread
                                                         ├──► execute_early(handle), while an input is being made
                                                         └──► on_report(iteration, artifacts), in order

A Plan only collects the handles, for a dry run. A Builder runs the stages in this process, without Prefect.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from thinkimg.config.tree import Config
from thinkimg.resources import Resources
from thinkimg.stages.build import build_artifact, build_early, complete_inputs, follow
from thinkimg.stages.stage import Slice, Stage
from thinkimg.store.artifacts import Store, Work
from thinkimg.store.manifest import Artifact

log = logging.getLogger(__name__)

THREADS = 8  # stages under way; more are never ready at once
ENGINE = frozenset({"engine"})
H = TypeVar("H")


class Interrupted(Exception):
    """End of a stage because the rest of the pipeline ends."""


class Run(Protocol[H]):
    """Argument of `pipeline`: called with a stage and its inputs, it returns a handle at once."""

    def __call__(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> H | None:
        """Return the handle of a stage; None where the pipeline has no such stage under these settings.

        Raises UserError where the stage's settings do not fit.
        """

    def report(self, iteration: int, **handles: H | None) -> None:
        """Have an iteration reported when all its stages are complete; in order, and an alarm may stop the rest."""


@dataclass(eq=False)
class Handle:
    """Stage in a pipeline with its inputs, and its artifact once it has run."""

    stage: Stage[Any]
    settings: Slice
    parameters: Mapping[str, Any]
    given: "Mapping[str, Handle | Artifact]"
    """Inputs by role."""
    iteration: int | None = None
    future: Future[Artifact] | None = None
    early: Future[frozenset[str]] | None = None
    """Early part of the stage, where it has one: the resources for what it has left."""
    work: Work | None = None
    """Work on its artifact, once it has begun."""

    @property
    def done(self) -> bool:
        """True when it has run, or failed."""
        return self.future is not None and self.future.done()

    @property
    def succeeded(self) -> bool:
        """True when its artifact is complete."""
        return self.future is not None and self.future.done() and self.future.exception() is None

    @property
    def waits_for(self) -> "list[Handle]":
        """Inputs that are not complete yet."""
        return [handle for handle in self.given.values() if isinstance(handle, Handle) and not handle.done]

    def result(self) -> Artifact:
        """Return the artifact; raises what the stage has raised."""
        assert self.future is not None, f"{self.stage.label} has not run"
        return self.future.result()

    def inputs(self, without: str | None = None) -> dict[str, Artifact]:
        """Return the artifacts of the inputs that were handed in, by role; without one of them, if it is named."""
        given = {role: item for role, item in self.given.items() if role != without}
        return {role: item.result() if isinstance(item, Handle) else item for role, item in given.items()}

    def begin(self, work: Work) -> None:
        """Take the work on its artifact, so that others may follow it."""
        self.work = work

    @property
    def followed(self) -> "Handle | Artifact | None":
        """Input that the early part of the stage follows; None without such a part."""
        return self.given.get(self.stage.early.follows) if self.stage.early else None


@dataclass(frozen=True)
class Task:
    """Stage of a pipeline, or its early part, which occupies resources while it runs."""

    handle: Handle
    early: bool

    def uses(self, config: Config) -> frozenset[str]:
        """Return the names of the resources that it occupies."""
        stage, early = self.handle.stage, self.handle.early
        if self.early and stage.early:
            return stage.early.uses(config)
        return stage.uses(config) | (early.result() if early is not None else frozenset())

    @property
    def player(self) -> "Handle | Artifact | None":
        """The policy that the engine has to hold."""
        return self.handle.given.get(self.handle.stage.player or "")

    @property
    def waits_for(self) -> "list[Handle]":
        """Handles that have to be complete before it starts; one that an early part follows has to be under way."""
        if not self.early:
            return self.handle.waits_for
        followed = self.handle.followed
        begun = not isinstance(followed, Handle) or followed.future is not None
        return [handle for handle in self.handle.waits_for if handle is not followed or not begun]

    @property
    def begun(self) -> bool:
        """True if it has been started."""
        return (self.handle.early if self.early else self.handle.future) is not None


class Plan:
    """Handles of a pipeline, or of one stage and those that must run before it, in their order."""

    def __init__(self, config: Config):
        self.config = config
        self.handles: list[Handle] = []
        self.reports: list[tuple[int, dict[str, Handle]]] = []

    def __call__(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Handle | None:
        return self.add(stage, **inputs_and_parameters) if stage.wanted(self.config) else None

    def add(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Handle:
        """Add a stage, wanted or not. Inputs are handles or artifacts; those that are not read are left out.

        Raises UserError where its run would fail.
        """
        stage.check(self.config)  # before hours are spent, not after
        arguments = {name: value for name, value in inputs_and_parameters.items() if value is not None}
        given = {role: arguments[role] for role in stage.counting(self.config) if role in arguments}
        parameters = {name: inputs_and_parameters[name] for name in stage.parameters if name in inputs_and_parameters}
        self.handles.append(Handle(stage, stage.settings(self.config, **parameters), parameters, given))
        return self.handles[-1]

    def require(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Handle:
        """Add a stage after those that make the inputs not handed in, which take theirs from the same arguments."""
        given = {name: value for name, value in inputs_and_parameters.items() if value is not None}
        for role, entry in stage.counting(self.config).items():
            if role not in given and isinstance(entry.origin, Stage):
                needed = {name: given[name] for name in entry.origin.required() if name in given}
                given[role] = self.require(entry.origin, **needed)
        return self.add(stage, **given)

    def report(self, iteration: int, **handles: Handle | None) -> None:
        """Give handles the number of their iteration, and have them reported."""
        reported = {name: handle for name, handle in handles.items() if handle is not None}
        for handle in reported.values():
            handle.iteration = iteration
        self.reports.append((iteration, reported))

    def label(self, handle: Handle) -> str:
        """Return the name for people: with its iteration, if the stage runs in others than iteration 0."""
        repeated = handle.iteration or sum(other.stage is handle.stage for other in self.handles) > 1
        numbered = repeated and handle.iteration is not None
        return f"{handle.stage.label} {handle.iteration}" if numbered else handle.stage.label


class Scheduler(Plan):
    """Plan that runs the stages that are ready, in order; one per resource, unless both use the engine with one policy.

    execute: runs one stage in a thread and returns its artifact; once `stopped` is set it ends soon, with Interrupted.
    execute_early: runs its early part likewise, before it. turns: names of the resources that do not fit into the
    memory together, and count as one.
    on_report: called in the thread of `wait`. on_stop: called once when the rest is to end early.
    """

    def __init__(
        self,
        config: Config,
        execute: Callable[[Handle], Artifact],
        *,
        execute_early: Callable[[Handle], frozenset[str]] = lambda handle: frozenset(),
        turns: frozenset[str] = frozenset(),
        on_report: Callable[[int, dict[str, Artifact]], None] = lambda iteration, artifacts: None,
        on_stop: Callable[[], None] = lambda: None,
    ):
        super().__init__(config)
        self.execute, self.execute_early = execute, execute_early
        self.turns, self.on_report, self.on_stop = turns, on_report, on_stop
        self.stopped = threading.Event()

    def wait(self) -> None:
        """Run all stages. Raises the first failure, when all stages under way have ended."""
        running: dict[Future[Any], Task] = {}
        reports = list(self.reports)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="stage") as pool:
            try:
                while True:
                    while ready := self._ready(list(running.values())):  # one that starts may let another begin
                        running |= {self._start(task, pool): task for task in ready}
                    if not running:
                        return
                    ended, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        del running[future]
                    # Before anything new begins: an alarm may stop the rest.
                    while reports and all(handle.succeeded for handle in reports[0][1].values()):
                        iteration, handles = reports.pop(0)
                        self.on_report(iteration, {name: handle.result() for name, handle in handles.items()})
                    for future in ended:
                        future.result()
            except BaseException:
                self.stopped.set()
                try:
                    self.on_stop()
                except Exception:  # the user has to hear of the first failure
                    log.exception("not everything was ended")
                raise  # once the pool is left, which waits for the stages under way

    def build_early(self, handle: Handle, store: Store, resources: Resources) -> frozenset[str]:
        """Run the early part of a stage; return the names of the resources for what it has left."""
        stage, followed = handle.stage, handle.followed
        assert stage.early is not None and followed is not None

        def check() -> None:
            self.check(handle)

        def complete(given: Mapping[str, Artifact]) -> dict[str, Artifact]:
            return complete_inputs(stage, self.config, given, store)

        snapshots = follow(followed, check) if isinstance(followed, Handle) else (item for item in [followed])
        inputs = handle.inputs(without=stage.early.follows)
        return build_early(stage, handle.settings, inputs, snapshots, store, resources, complete=complete, check=check)

    def check(self, handle: Handle) -> None:
        """Raise Interrupted once the rest is to end."""
        if self.stopped.is_set():
            raise Interrupted(f"{self.label(handle)} was ended, as the rest ends. Complete parts are kept.")

    def _start(self, task: Task, pool: ThreadPoolExecutor) -> Future[Any]:
        handle = task.handle
        if task.early:
            handle.early = pool.submit(self.execute_early, handle)
            return handle.early
        handle.future = pool.submit(self.execute, handle)
        return handle.future

    def _ready(self, running: list[Task]) -> list[Task]:
        """Return the tasks that can start now."""
        chosen: list[Task] = []
        for handle in self.handles:
            for task in [Task(handle, early) for early in ([True, False] if handle.stage.early else [False])]:
                if task.begun or self._waits(task, running):
                    continue
                if not any(self._conflict(task, other) for other in [*running, *chosen]):
                    chosen.append(task)
        return chosen

    @staticmethod
    def _waits(task: Task, running: list[Task]) -> bool:
        """Tell whether a task needs what is not complete.

        What ended a moment ago still counts as running, so that its resources are free when the next starts.
        """
        handle = task.handle
        if not task.early and handle.stage.early and (handle.early is None or Task(handle, early=True) in running):
            return True
        inputs = [item for item in handle.given.values() if not (task.early and item is handle.followed)]
        return bool(task.waits_for) or any(other.handle in inputs for other in running if not other.early)

    def _conflict(self, task: Task, other: Task) -> bool:
        uses, others = task.uses(self.config), other.uses(self.config)
        if not uses or not others:
            return False
        if uses & self.turns and others & self.turns and not uses == others == ENGINE:
            return True
        shared = uses & others
        return bool(shared) and not (shared == ENGINE and task.player is other.player)


class Builder(Scheduler):
    """Scheduler that runs stages in this process, without Prefect; its caller closes `resources`."""

    def __init__(self, config: Config, store: Store, resources: Resources):
        super().__init__(
            config,
            self.build,
            execute_early=lambda handle: self.build_early(handle, store, resources),
            turns=resources.where.turns,
        )
        self.store, self.resources = store, resources

    def build(self, handle: Handle) -> Artifact:
        """Return the artifact of a stage, found in the store or made."""
        inputs = complete_inputs(handle.stage, self.config, handle.inputs(), self.store)

        def check(*progress: int) -> None:
            self.check(handle)

        return build_artifact(
            handle.stage,
            handle.settings,
            inputs,
            self.store,
            self.resources,
            progress=check,
            check=check,
            begin=handle.begin,
        )[0]

    def make(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Artifact:
        """Return the artifact of a stage, found or made, as are the inputs that are not handed in."""
        handle = self.require(stage, **inputs_and_parameters)
        self.wait()
        return handle.result()
