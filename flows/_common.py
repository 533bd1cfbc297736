"""Parameter types of the flows, opening of config and store, and the command line."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import flows._environment  # noqa: F401

import cyclopts
from prefect.context import FlowRunContext
from prefect.runtime import deployment
from pydantic import Field

from thinkimg import settings
from thinkimg.config import tree
from thinkimg.config.deployment import check_run
from thinkimg.config.load import list_presets, load_config
from thinkimg.config.tree import Config
from thinkimg.config.values import MAX_LENGTH, NAME
from thinkimg.errors import UserError
from thinkimg.exit import run_guarded
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact
from thinkimg.user_paths import expand_path


def described(kind: Any, text: str, **limits) -> Any:
    """Return a type with description and limits; given twice, as Prefect takes the first from docstrings alone."""
    return Annotated[kind, Field(description=text, json_schema_extra={"description": text}, **limits)]


# Prefect's server checks these limits before it schedules a run, and its UI makes a form of them.
Preset = described(
    str,
    f"One of {', '.join(list_presets())}, or the path of a YAML file.",
    pattern=rf"^({'|'.join(list_presets())}|.+\.ya?ml)$",
)
Overrides = described(
    list[Annotated[str, Field(pattern=f"^{NAME}=", max_length=MAX_LENGTH)]],
    "Settings that differ from the preset, each as a.b=value; see `thinkimg schema`.",
)
Iterations = described(tree.Iterations | None, "Iterations of the loop; left out, as the preset says.")
Seed = described(settings.Seed | None, "Seed; left out, as the preset says.")


def is_deployed() -> bool:
    """Tell whether the current run is a deployment's."""
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:  # else prefect.runtime asks the API each time
        return context.flow_run.deployment_id is not None
    return deployment.id is not None


def open_config(preset: str, overrides: list[str], **settings: Any) -> tuple[Config, Store]:
    """Return the resolved config and its store.

    settings: name -> value of those that are parameters of the flow; None leaves the preset's.
    Raises UserError for what the run of a deployment may not set (see thinkimg/config/deployment.py).
    """
    if is_deployed():
        check_run(preset, overrides)
    given = [f"{name}={json.dumps(value)}" for name, value in settings.items() if value is not None]
    config = load_config(preset, [*overrides, *given])
    return config, Store(config.where.store)


def open_input(store: Store, reference: str, kind: str) -> Artifact:
    """Return the artifact that a form names. Raises UserError where the run of a deployment names one elsewhere."""
    artifact = store.resolve(expand_path(reference), kind)
    inside = artifact.directory.resolve().is_relative_to(store.root.resolve())
    if not inside and is_deployed():
        raise UserError(
            f"The run of a deployment can't use {reference}, which is outside of its store.",
            hint="Name an artifact by the beginning of its fingerprint.",
        )
    return artifact


def main(flow: Callable) -> None:
    """Run a flow with arguments of the command line, as in `python -m flows.score --rollouts 3f2a…`."""
    run_guarded(lambda: cyclopts.run(flow))
