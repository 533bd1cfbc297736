"""Commands of the stages, each made from its stage: `thinkimg.cli.stages.score` is `thinkimg score`."""

import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Annotated, Any

from cyclopts import Parameter

from thinkimg.cli.flags import (
    ARTIFACT_HELP,
    ArtifactFlag,
    DryRunFlag,
    ForceFlag,
    PresetFlag,
    SetFlag,
    open_config,
    read_reference,
)
from thinkimg.stages.stage import Stage, list_inputs, load_stage


def __getattr__(name: str) -> Callable[..., None]:
    """Return a stage's command, made when it is asked for: `thinkimg --help` imports no stage."""
    if name.startswith("_"):
        raise AttributeError(name)
    return make_command(load_stage(name))


def make_command(stage: Stage) -> Callable[..., None]:
    """Return the command of a stage; its flags are the fields of its form."""

    def run(**flags: Any) -> None:
        bound = signature_of(stage).bind(**flags)
        bound.apply_defaults()  # cyclopts hands in only the flags that are given
        run_stage(stage, **bound.arguments)

    run.__name__, run.__doc__ = stage.label, stage.help
    run.__signature__ = signature_of(stage)
    run.__annotations__ = {name: flag.annotation for name, flag in run.__signature__.parameters.items()}
    return run


def signature_of(stage: Stage) -> inspect.Signature:
    """Return the flags of a stage's command."""
    flags: dict[str, tuple[Any, Any]] = {}
    for role in list_inputs(stage):
        if stage.reads[role].origin is None:
            flags[role] = ArtifactFlag, inspect.Parameter.empty
        else:
            text = f"{ARTIFACT_HELP} Left out: taken from the lineage of the others, or made first."
            flags[role] = Annotated[str | None, Parameter(help=text, converter=read_reference)], None
    for name, parameter in stage.parameters.items():
        flags[name] = Annotated[parameter.type, Parameter(help=parameter.description)], parameter.default
    flags |= {
        "preset": (PresetFlag, "development"),
        "set": (SetFlag, None),
        "dry_run": (DryRunFlag, False),
        "force": (ForceFlag, False),
    }
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in flags.items()
        ]
    )


def run_stage(stage: Stage, preset: str, set: list[str] | None, dry_run: bool, force: bool, **given: Any) -> None:
    """Run one stage as a flow of its own, and print the reference of its artifact."""
    config, store = open_config(preset, set)
    # Before Prefect's server is started: a mistyped fingerprint is reported at once, and a model that can't be used.
    config.family()
    inputs = {
        role: store.resolve(given[role], stage.reads[role].kind.KIND) for role in list_inputs(stage) if given.get(role)
    }
    parameters = {name: given[name] for name in stage.parameters}
    if dry_run:
        from thinkimg.cli.dry_run import print_plan
        from thinkimg.scheduler import Plan

        plan = Plan(config)
        plan.require(stage, **inputs, **parameters)
        print_plan(plan)
        return
    from importlib import import_module

    from flows import _server
    from thinkimg.cli.data import dataset_lines
    from thinkimg.console import note
    from thinkimg.store.kinds import Dataset

    _server.start_server()  # while the flow is imported
    flow = getattr(import_module(f"flows.{stage.label}"), stage.label)
    references = {role: str(artifact.reference) for role, artifact in inputs.items()}
    with redirect_stdout(sys.stderr):  # what a user's reward prints is no part of the result
        reference = flow(preset=preset, overrides=set or [], force=force, **references, **parameters)
    artifact = store.resolve(reference)
    if report := stage.report(artifact):
        note(report)
    if isinstance(artifact, Dataset):
        for line in dataset_lines(artifact):
            note(line)
    print(reference)
