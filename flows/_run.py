"""Stages on Prefect: one flow per stage, and the pipeline with each of its stages as a sub-flow.

stage_flow(stage) ──► a flow with a form ──► the stages that it needs, as sub-flows ──► the stage itself
flows/loop.py ──► PrefectRun ──► scheduler ──► each stage as a sub-flow, some side by side
"""

import contextvars
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flows._environment  # noqa: F401

from prefect.runtime import flow_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed, State

from flows import _server, _ui
from flows._common import Overrides, Preset, described, open_config, open_input
from flows._device import hold_device
from flows._flow import Flow
from flows._runner import mapper
from thinkimg import console
from thinkimg.config.tree import Config
from thinkimg.resources import Resources
from thinkimg.scheduler import Handle, Scheduler
from thinkimg.stages.build import build_artifact, complete_inputs
from thinkimg.stages.stage import Stage, list_inputs
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact
from thinkimg.tracking.loop import log_stage

FORCE = described(bool, "Make a new attempt even if there is one.")


class PrefectRun(Scheduler):
    """Scheduler of a pipeline within a flow, which runs each stage as a sub-flow."""

    def __init__(
        self,
        config: Config,
        store: Store,
        resources: Resources,
        link: str | None = None,
        on_report: Callable[[int, dict[str, Artifact]], None] = lambda iteration, artifacts: None,
    ):
        """link: page of the MLflow run that logs the stages; None: each stage has a run of its own."""
        super().__init__(
            config,
            self.execute,
            execute_early=lambda handle: self.build_early(handle, store, resources),
            turns=resources.where.turns,
            on_report=on_report,
            on_stop=resources.close,
        )
        self.store, self.resources, self.link = store, resources, link
        self._contexts: dict[Handle, contextvars.Context] = {}

    def wait(self) -> None:
        # A sub-flow ends with its flow: a heartbeat of its own would cost a second each time.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            # The flow that we are in is the parent of each thread's sub-flow.
            self._contexts = {handle: contextvars.copy_context() for handle in self.handles}
            super().wait()

    def execute(self, handle: Handle) -> Artifact:
        """Run a stage as a sub-flow, in a thread of the scheduler, and return its artifact."""
        given = complete_inputs(handle.stage, self.config, handle.inputs(), self.store)
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
        """Find or make the artifact in the current flow run; its state reads Cached or Completed.

        The state carries the reference, never the data.
        """
        check = partial(self.check, handle)
        with _ui.report_progress(self.label(handle)) as show, mapper(self.config.where) as run:

            def progress(done: int, total: int) -> None:
                check()
                show(done, total)

            check()
            stage, settings = handle.stage, handle.settings
            artifact, cached = build_artifact(
                stage,
                settings,
                inputs,
                self.store,
                self.resources,
                force=force,
                progress=progress,
                check=check,
                begin=handle.begin,
                map=run,
            )
        link = self.link
        if link is None and not (cached and _server.is_embedded()):  # else there is no page to link it from
            link = log_stage(artifact, self.store, self.config.where.tracking)
        _ui.show_artifact(artifact, cached, link)
        return artifact, Completed(name="Cached" if cached else "Completed", data=str(artifact.reference))


def stage_flow(stage: Stage) -> Flow:
    """Return the flow of a stage that runs alone; inputs that are not named come from the lineage or are made first."""

    def run(*given: Any, **named: Any) -> State:
        fields = form_of(stage).bind(*given, **named)
        fields.apply_defaults()
        return run_alone(stage, fields.arguments)

    run.__name__ = run.__qualname__ = stage.label
    run.__doc__ = stage.help
    run.__signature__ = form_of(stage)
    run.__annotations__ = {name: field.annotation for name, field in run.__signature__.parameters.items()}
    return Flow(run, name=stage.label, flow_run_name=lambda: name_stage_run(stage, flow_run.parameters))


def run_alone(stage: Stage, form: Mapping[str, Any]) -> State:
    """Run a stage in the current flow, after the stages that make the inputs that are not named."""
    offered = {name: form[name] for name in stage.offers}
    config, store = open_config(form["preset"], form["overrides"], **offered)
    roles = [role for role in list_inputs(stage) if form.get(role)]
    given = {role: open_input(store, form[role], stage.reads[role].kind.KIND) for role in roles}
    parameters = {name: form[name] for name in stage.parameters}
    with Resources(config.where, console.note, hold_device) as resources:
        scheduler = PrefectRun(config, store, resources)
        handle = scheduler.require(stage, **given, **parameters)
        scheduler.handles.remove(handle)
        scheduler.wait()
        inputs = complete_inputs(stage, config, handle.inputs(), store)
        return scheduler.build(handle, inputs, force=form["force"])[1]


def name_stage_run(stage: Stage, form: Mapping[str, Any]) -> str:
    """Return the name of a run: stage, iteration, and the inputs that are named; the preset where none is."""
    iteration = [str(form["iteration"])] if "iteration" in form else []
    inputs = [shorten(form[role]) for role in list_inputs(stage) if form.get(role)]
    return " ".join([stage.label, *iteration, *(inputs or [Path(form.get("preset", "")).stem])]).rstrip()


def shorten(reference: str) -> str:
    """Return the beginning of the fingerprint in an artifact's reference or path."""
    parts = reference.rstrip("/").split("/")
    attempt = len(parts) > 1 and len(parts[-1]) == 4 and parts[-1].isdigit()
    return parts[-2 if attempt else -1][:12]


def form_of(stage: Stage) -> inspect.Signature:
    """Return the fields of a stage's form; its command has them as well."""
    fields: list[inspect.Parameter] = []

    def add(name: str, kind: Any, default: Any) -> None:
        position = inspect.Parameter.POSITIONAL_OR_KEYWORD
        fields.append(inspect.Parameter(name, position, default=default, annotation=kind))

    for role in list_inputs(stage):
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
