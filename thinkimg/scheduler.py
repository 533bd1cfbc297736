"""Scheduler of the pipeline: returns a handle at once, and runs stages in threads as soon as their inputs are there.

    pipeline(scheduler, config) ──► handles ──► wait() ──► execute(handle), each in a thread
                                                  └──────► on_report(iteration, artifacts), in order, in wait's thread

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
from thinkimg.stages.stage import Slice, Stage, build_artifact, complete_inputs
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact

log = logging.getLogger(__name__)

THREADS = 8  # stages under way; more are never ready at once
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

    def inputs(self) -> dict[str, Artifact]:
        """Return the artifacts of the inputs that were handed in, by role."""
        return {role: item.result() if isinstance(item, Handle) else item for role, item in self.given.items()}


class Plan:
    """Handles of a pipeline, or of one stage and those that must run before it, in their order."""

    def __init__(self, config: Config):
        self.config = config
        self.handles: list[Handle] = []
        self.reports: list[tuple[int, dict[str, Handle]]] = []

    def __call__(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Handle | None:
        return self.add(stage, **inputs_and_parameters) if stage.wanted(self.config) else None

    def add(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Handle:
        """Add a stage, wanted or not. Inputs are handles or artifacts; those that are not read are left out."""
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
    exclusive: engine and trainer do not fit into the memory together, and count as one resource.
    on_report: called in the thread of `wait`. on_stop: called once when the rest is to end early.
    """

    def __init__(
        self,
        config: Config,
        execute: Callable[[Handle], Artifact],
        *,
        exclusive: bool = False,
        on_report: Callable[[int, dict[str, Artifact]], None] = lambda iteration, artifacts: None,
        on_stop: Callable[[], None] = lambda: None,
    ):
        super().__init__(config)
        self.execute, self.exclusive, self.on_report, self.on_stop = execute, exclusive, on_report, on_stop
        self.stopped = threading.Event()

    def add(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Handle:
        """Add a stage as Plan does. Raises UserError where its run would fail."""
        stage.check(self.config)  # before hours are spent, not after
        return super().add(stage, **inputs_and_parameters)

    def wait(self) -> None:
        """Run all stages. Raises the first failure, when all stages under way have ended."""
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

    def check(self, handle: Handle) -> None:
        """Raise Interrupted once the rest is to end."""
        if self.stopped.is_set():
            raise Interrupted(f"{self.label(handle)} was ended, as the rest ends. Complete parts are kept.")

    def _ready(self, running: list[Handle]) -> list[Handle]:
        """Return the handles that can start now."""
        chosen: list[Handle] = []
        for handle in self.handles:
            # A stage that ended a moment ago still counts as running, so that its resources are free when the next
            # starts.
            waiting = handle.waits_for or any(item in running for item in handle.given.values())
            if (
                handle.future is None
                and not waiting
                and not any(self._conflict(handle, other) for other in [*running, *chosen])
            ):
                chosen.append(handle)
        return chosen

    def _conflict(self, handle: Handle, other: Handle) -> bool:
        uses = [item.stage.uses(self.config) for item in (handle, other)]
        if not all(uses):
            return False
        if uses == [{"engine"}, {"engine"}]:
            # For wider limits the engine would be started again under the other stage.
            limits = [getattr(item.settings, "engine", None) for item in (handle, other)]
            return _player(handle) is not _player(other) or limits[0] != limits[1]
        return self.exclusive or bool(uses[0] & uses[1])


def _player(handle: Handle) -> "Handle | Artifact | None":
    """Return the policy that the engine has to hold."""
    return handle.given.get(handle.stage.player or "")


class Builder(Scheduler):
    """Scheduler that runs stages in this process, without Prefect; its caller closes `resources`."""

    def __init__(self, config: Config, store: Store, resources: Resources):
        super().__init__(config, self.build, exclusive=resources.exclusive)
        self.store, self.resources = store, resources

    def build(self, handle: Handle) -> Artifact:
        """Return the artifact of a stage, found in the store or made."""
        inputs = complete_inputs(handle.stage, self.config, handle.inputs(), self.store)

        def check(*progress: int) -> None:
            self.check(handle)

        return build_artifact(
            handle.stage, handle.settings, inputs, self.store, self.resources, progress=check, check=check
        )[0]

    def make(self, stage: Stage[Any], /, **inputs_and_parameters: Any) -> Artifact:
        """Return the artifact of a stage, found or made, as are the inputs that are not handed in."""
        handle = self.require(stage, **inputs_and_parameters)
        self.wait()
        return handle.result()
