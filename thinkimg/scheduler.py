"""What runs the pipeline: handles at once, stages in threads as soon as they can, reports in order.

pipeline(scheduler, config) ──► handles ──► wait() ──► execute(handle, inputs), each in a thread
                                              └──────► on_report(iteration, artifacts), in this thread
"""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from thinkimg.config.tree import Config
from thinkimg.resources import Resources
from thinkimg.stages.stage import Slice, Stage, build, complete
from thinkimg.store.artifacts import Artifact, Store

log = logging.getLogger(__name__)

THREADS = 8  # of stages under way; more are never ready at once
H = TypeVar("H")


class Interrupted(Exception):
    """A stage was ended because the rest of the pipeline ends."""


class Run(Protocol[H]):
    """What `pipeline` is given: called with a stage and handles it gives back a handle at once."""

    def __call__(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> H | None:
        """None where the pipeline does without the box. Raises UserError where the stage's settings do not fit."""

    def report(self, iteration: int, **made: H | None) -> None:
        """Tell of an iteration when all of it is there; in order, and an alarm may stop the rest."""


@dataclass(eq=False)
class Handle:
    """A stage that will run: its place in the pipeline, and its artifact once there is one."""

    stage: Stage[Any]
    settings: Slice
    parameters: Mapping[str, Any]
    given: "Mapping[str, Handle | Artifact]"
    """Inputs by role."""
    iteration: int | None = None
    future: Future[Artifact] | None = None

    @property
    def done(self) -> bool:
        return self.future is not None and self.future.done()

    @property
    def succeeded(self) -> bool:
        return self.future is not None and self.future.done() and self.future.exception() is None

    @property
    def waits_for(self) -> "list[Handle]":
        """The inputs that are not there yet."""
        return [handle for handle in self.given.values() if isinstance(handle, Handle) and not handle.done]

    def result(self) -> Artifact:
        """The artifact; raises what the stage has raised."""
        assert self.future is not None, f"{self.stage.label} has not run"
        return self.future.result()

    def inputs(self) -> dict[str, Artifact]:
        """The artifacts of all that was handed in, by role."""
        return {role: one.result() if isinstance(one, Handle) else one for role, one in self.given.items()}


class Plan:
    """The handles of a pipeline, or of one stage and what has to run before it, in their order."""

    def __init__(self, config: Config):
        self.config = config
        self.handles: list[Handle] = []
        self.reports: list[tuple[int, dict[str, Handle]]] = []

    def __call__(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Handle | None:
        return self.add(stage, **inputs_and_parameters) if stage.wanted(self.config) else None

    def add(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Handle:
        """As a call, wanted or not. Inputs are handles or artifacts; what does not count is left out."""
        given = {role: inputs_and_parameters.get(role) for role in stage.counting(self.config)}
        parameters = {name: inputs_and_parameters[name] for name in stage.parameters if name in inputs_and_parameters}
        there = {role: handle for role, handle in given.items() if handle is not None}
        self.handles.append(Handle(stage, stage.settings(self.config, **parameters), parameters, there))
        return self.handles[-1]

    def require(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Handle:
        """As `add`, after the stages that make what is not handed in; these take what they need of the same inputs."""
        given = {name: value for name, value in inputs_and_parameters.items() if value is not None}
        for role, entry in stage.counting(self.config).items():
            if role not in given and isinstance(entry.origin, Stage):
                needed = {name: given[name] for name in entry.origin.required() if name in given}
                given[role] = self.require(entry.origin, **needed)
        return self.add(stage, **given)

    def report(self, iteration: int, **made: Handle | None) -> None:
        there = {name: handle for name, handle in made.items() if handle is not None}
        for handle in there.values():
            handle.iteration = iteration
        self.reports.append((iteration, there))

    def label(self, handle: Handle) -> str:
        """As people see it: with its iteration, if it is there in more than the first."""
        again = handle.iteration or sum(one.stage is handle.stage for one in self.handles) > 1
        return (
            f"{handle.stage.label} {handle.iteration}" if again and handle.iteration is not None else handle.stage.label
        )


class Scheduler(Plan):
    """Runs what is ready, lowest position first; one job per resource, unless both use the engine with the same policy.

    execute: runs one stage in a thread and returns its artifact; once `stopped` is set it ends soon, with Interrupted.
    exclusive: engine and trainer do not fit into the memory together, and count as one resource.
    """

    def __init__(
        self,
        config: Config,
        execute: Callable[[Handle], Artifact],
        *,
        exclusive: bool = False,
        on_report: Callable[[int, dict[str, Artifact]], None] = lambda iteration, made: None,
        on_stop: Callable[[], None] = lambda: None,
    ):
        """on_report: called in the thread of `wait`. on_stop: called once when the rest is to end before its time."""
        super().__init__(config)
        self.execute, self.exclusive, self.on_report, self.on_stop = execute, exclusive, on_report, on_stop
        self.stopped = threading.Event()

    def add(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Handle:
        stage.check(self.config)  # before hours are spent, not after
        return super().add(stage, **inputs_and_parameters)

    def wait(self) -> None:
        """Run all that was registered. Raises the first failure, when all that was under way has ended."""
        running: dict[Future[Artifact], Handle] = {}
        reports = list(self.reports)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="stage") as pool:
            try:
                while True:
                    for handle in self._ready(list(running.values())):
                        handle.future = pool.submit(self.execute, handle)
                        running[handle.future] = handle
                    if not running:
                        return
                    ended, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        del running[future]
                    # Before anything new begins: an alarm may stop the rest.
                    while reports and all(handle.succeeded for handle in reports[0][1].values()):
                        iteration, made = reports.pop(0)
                        self.on_report(iteration, {name: handle.result() for name, handle in made.items()})
                    for future in ended:
                        future.result()
            except BaseException:
                self.stopped.set()
                try:
                    self.on_stop()
                except Exception:  # what has ended the rest is what the user has to hear
                    log.exception("not everything was ended")
                raise  # once the pool is left, which waits for what is under way

    def check(self, handle: Handle) -> None:
        """Raise Interrupted once the rest is to end."""
        if self.stopped.is_set():
            raise Interrupted(f"{self.label(handle)} was ended, as the rest ends. What is complete is kept.")

    def _ready(self, running: list[Handle]) -> list[Handle]:
        """The handles that can start now."""
        chosen: list[Handle] = []
        for handle in self.handles:
            # What ended a moment ago still has its resources: what waits for it begins with what waits for these.
            ready = (
                handle.future is None
                and not handle.waits_for
                and not any(one in running for one in handle.given.values())
            )
            if ready and not any(self._conflict(handle, other) for other in [*running, *chosen]):
                chosen.append(handle)
        return chosen

    def _conflict(self, one: Handle, other: Handle) -> bool:
        uses = [handle.stage.uses(self.config) for handle in (one, other)]
        if not all(uses):
            return False
        if uses == [{"engine"}, {"engine"}]:
            # One that asks for wider limits would have the engine started again under the other.
            settings = [getattr(handle.settings, "engine", None) for handle in (one, other)]
            return _player(one) is not _player(other) or settings[0] != settings[1]
        return self.exclusive or bool(uses[0] & uses[1])


def _player(handle: Handle) -> "Handle | Artifact | None":
    """The policy that the engine has to hold."""
    return handle.given.get(handle.stage.player or "")


class Builder(Scheduler):
    """Runs stages in this process alone, without Prefect; `resources` stay its caller's."""

    def __init__(self, config: Config, store: Store, resources: Resources):
        super().__init__(config, self.build, exclusive=resources.exclusive)
        self.store, self.resources = store, resources

    def build(self, handle: Handle) -> Artifact:
        inputs = complete(handle.stage, self.config, handle.inputs(), self.store)

        def check(*progress: int) -> None:
            self.check(handle)

        return build(handle.stage, handle.settings, inputs, self.store, self.resources, progress=check, check=check)[0]

    def make(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Artifact:
        """Find or make an artifact, and what it needs and is not handed in."""
        handle = self.require(stage, **inputs_and_parameters)
        self.wait()
        return handle.result()
