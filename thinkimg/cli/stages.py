"""The command of each stage, made from the stage: `thinkimg.cli.stages.score` is `thinkimg score`."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

from thinkimg.stages.stage import Stage, open_stage, shown

Preset = Annotated[str, Parameter(name=["--preset", "-p"], help="Name of a preset, or the path of a YAML file.")]
Set = Annotated[
    list[str] | None, Parameter(name=["--set", "-s"], help="A setting, as a.b=value; may be repeated.", negative=[])
]
DryRun = Annotated[
    bool, Parameter(help="Print the resolved config and what is there already, do nothing.", negative=[])
]
Force = Annotated[bool, Parameter(help="Make a new attempt even if there is one.", negative=[])]


def __getattr__(name: str) -> Callable[..., None]:
    """The command of a stage, made when it is asked for: `thinkimg --help` imports none."""
    if name.startswith("_"):
        raise AttributeError(name)
    return command(open_stage(name))


def command(stage: Stage) -> Callable[..., None]:
    """Return the command of a stage; its flags are those of its form."""

    def run(**flags: Any) -> None:
        bound = signature(stage).bind(**flags)
        bound.apply_defaults()  # flags that are left out are not handed in
        run_stage(stage, **bound.arguments)

    run.__name__, run.__doc__ = stage.label, stage.help
    run.__signature__ = signature(stage)
    run.__annotations__ = {name: flag.annotation for name, flag in run.__signature__.parameters.items()}
    return run


def signature(stage: Stage) -> inspect.Signature:
    flags: dict[str, tuple[Any, Any]] = {}
    text = "An artifact: the beginning of its fingerprint, or its path."
    for role in shown(stage):
        if stage.reads[role].origin is None:
            flags[role] = Annotated[str, Parameter(help=text)], inspect.Parameter.empty
        else:
            help_ = f"{text} Left out: the one that the others were made from."
            flags[role] = Annotated[str | None, Parameter(help=help_)], None
    for name, parameter in stage.parameters.items():
        flags[name] = Annotated[parameter.type, Parameter(help=parameter.description)], parameter.default
    flags |= {
        "preset": (Preset, "development"),
        "set": (Set, None),
        "dry_run": (DryRun, False),
        "force": (Force, False),
    }
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in flags.items()
        ]
    )


def run_stage(stage: Stage, preset: str, set: list[str] | None, dry_run: bool, force: bool, **given: Any) -> None:
    """Run one stage as a flow of its own and say what it made."""
    from thinkimg.config.load import load
    from thinkimg.store.artifacts import Store

    config = load(preset, set or ())
    store = Store(config.where.store)
    # Before Prefect's server is started: a mistyped fingerprint is told at once.
    inputs = {role: store.resolve(given[role], stage.reads[role].kind.KIND) for role in shown(stage) if given.get(role)}
    parameters = {name: given[name] for name in stage.parameters}
    if dry_run:
        from thinkimg.cli.dry_run import show
        from thinkimg.scheduler import Plan

        plan = Plan(config)
        plan.require(stage, **inputs, **parameters)
        show(plan)
        return
    from importlib import import_module

    from flows import _server

    _server.start()  # while the flow is imported
    flow = getattr(import_module(f"flows.{stage.label}"), stage.label)
    references = {role: str(artifact.reference) for role, artifact in inputs.items()}
    print(flow(preset=preset, overrides=set or [], force=force, **references, **parameters))
