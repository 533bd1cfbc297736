"""Stages on Prefect: one flow per stage, and the pipeline with each of its stages as a sub-flow.

stage_flow(stage) ──► a flow with a form ──► what it needs first, as sub-flows ──► the stage itself
flows/loop.py ──► PrefectRun ──► scheduler ──► each stage as a sub-flow, some side by side
"""

import contextvars
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flows._environment  # noqa: F401

from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed, State

from flows import _server, _ui
from flows._common import Overrides, Preset, described, open_config
from flows._device import device
from flows._flow import Flow
from flows._runner import mapper
from thinkimg import console
from thinkimg.config.tree import Config
from thinkimg.resources import Resources
from thinkimg.scheduler import Handle, Scheduler
from thinkimg.stages.stage import Stage, build, complete, shown
from thinkimg.store.artifacts import Artifact, Store
from thinkimg.tracking.loop import log_stage

FORCE = described(bool, "Make a new attempt even if there is one.")


class PrefectRun(Scheduler):
    """Runs a pipeline within a flow, each stage as a sub-flow."""

    def __init__(
        self,
        config: Config,
        store: Store,
        resources: Resources,
        link: str | None = None,
        on_report: Callable[[int, dict[str, Artifact]], None] = lambda iteration, made: None,
    ):
        """link: the MLflow run that logs the stages; None: each has one of its own."""
        super().__init__(
            config, self.execute, exclusive=resources.exclusive, on_report=on_report, on_stop=resources.close
        )
        self.store, self.resources, self.link = store, resources, link
        self._contexts: dict[Handle, contextvars.Context] = {}

    def wait(self) -> None:
        # A sub-flow lives and dies with its flow: its own heartbeat would cost a second each time.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            # Each thread has the flow that we are in for its parent.
            self._contexts = {handle: contextvars.copy_context() for handle in self.handles}
            super().wait()

    def execute(self, handle: Handle) -> Artifact:
        """Run a stage as a sub-flow, in a thread of the scheduler's."""
        given = complete(handle.stage, self.config, handle.inputs(), self.store)
        names = {role: str(artifact.reference) for role, artifact in given.items()}
        artifacts: list[Artifact] = []

        def stage(inputs: dict[str, str], parameters: dict[str, Any]) -> State:
            artifact, state = self.build(handle, given)
            artifacts.append(artifact)
            return state

        sub_flow = Flow(stage, name=handle.stage.label, flow_run_name=self.label(handle), description=handle.stage.help)
        self._contexts[handle].run(sub_flow, names, dict(handle.parameters))
        return artifacts[-1]

    def build(self, handle: Handle, inputs: Mapping[str, Artifact], force: bool = False) -> tuple[Artifact, State]:
        """Find or make the artifact in the flow run that we are in; the state shows whether anything was done.

        Its data is the reference, never the data itself.
        """
        with _ui.progress(self.label(handle)) as tell, mapper(self.config.where) as run:

            def progress(done: int, total: int) -> None:
                self.check(handle)
                tell(done, total)

            self.check(handle)
            artifact, cached = build(
                handle.stage, handle.settings, inputs, self.store, self.resources,
                force=force, progress=progress, check=lambda: self.check(handle), map=run,
            )  # fmt: skip
        link = self.link
        if link is None and not (cached and _server.is_embedded()):  # else nobody can look
            link = log_stage(artifact, self.store, self.config.where.tracking)
        _ui.show_artifact(artifact, cached, link)
        return artifact, Completed(name="Cached" if cached else "Completed", data=str(artifact.reference))


def stage_flow(stage: Stage) -> Flow:
    """The flow of a stage that runs alone; what it needs and is not named comes from the lineage, or is run first."""

    def run(*given: Any, **named: Any) -> State:
        fields = form_of(stage).bind(*given, **named)
        fields.apply_defaults()
        return run_alone(stage, fields.arguments)

    run.__name__ = run.__qualname__ = stage.label
    run.__doc__ = stage.help
    run.__signature__ = form_of(stage)
    run.__annotations__ = {name: field.annotation for name, field in run.__signature__.parameters.items()}
    return Flow(run, name=stage.label)


def run_alone(stage: Stage, form: Mapping[str, Any]) -> State:
    """Run a stage, and before it what it needs and is not named, in the flow that we are in."""
    offered = {name: form[name] for name in stage.offers}
    config, store = open_config(form["preset"], form["overrides"], **offered)
    given = {role: store.resolve(form[role], stage.reads[role].kind.KIND) for role in shown(stage) if form.get(role)}
    parameters = {name: form[name] for name in stage.parameters}
    with Resources(config.where, console.say, device) as resources:
        scheduler = PrefectRun(config, store, resources)
        handle = scheduler.require(stage, **given, **parameters)
        scheduler.handles.remove(handle)
        scheduler.wait()
        inputs = complete(stage, config, handle.inputs(), store)
        return scheduler.build(handle, inputs, force=form["force"])[1]


def form_of(stage: Stage) -> inspect.Signature:
    """The fields of a stage's form, which its command has as well."""
    fields: list[inspect.Parameter] = []

    def add(name: str, kind: Any, default: Any) -> None:
        place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        fields.append(inspect.Parameter(name, place, default=default, annotation=kind))

    for role in shown(stage):
        if stage.reads[role].origin is None:
            text = "An artifact: the beginning of its fingerprint, or kind/fingerprint."
            add(role, described(str, text, min_length=4, max_length=300), inspect.Parameter.empty)
        else:
            text = "An artifact; left out, the one that the others were made from."
            add(role, described(str | None, text, min_length=4), None)
    for name, parameter in stage.parameters.items():
        add(name, described(parameter.type, parameter.description), parameter.default)
    add("preset", Preset, "development")
    add("overrides", Overrides, [])
    for name, parameter in stage.offers.items():
        add(name, described(parameter.type, parameter.description), parameter.default)
    add("force", FORCE, False)
    return inspect.Signature(fields)
