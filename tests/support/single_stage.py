"""One stage on inputs at hand, without a scheduler and without Prefect."""

import builtins
from typing import Any

from thinkimg.config.tree import Config
from thinkimg.resources import Resources
from thinkimg.stages.build import build_artifact, complete_inputs
from thinkimg.stages.stage import Mapper, Progress, Stage
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact, Recipe


def build_stage(
    stage: Stage,
    config: Config,
    store: Store,
    *,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    map: Mapper = builtins.map,
    **inputs_and_parameters: Any,
) -> tuple[Artifact, bool]:
    """Find or make the stage's artifact; returns it, and whether it was there.

    Inputs with a lineage may be left out.
    """
    stage.check(config)
    parameters = {name: value for name, value in inputs_and_parameters.items() if name in stage.parameters}
    inputs = complete_inputs(stage, config, inputs_and_parameters, store)
    settings = stage.settings(config, **parameters)
    with Resources(config.where) as resources:
        return build_artifact(stage, settings, inputs, store, resources, force=force, progress=progress, map=map)


def recipe_of(stage: Stage, config: Config, **inputs_and_parameters: Any) -> Recipe:
    """Return what defines the stage's artifact. Inputs that do not count under the config are left out."""
    parameters = {name: value for name, value in inputs_and_parameters.items() if name in stage.parameters}
    inputs = {role: inputs_and_parameters[role] for role in stage.counting(config) if role in inputs_and_parameters}
    return stage.recipe(stage.settings(config, **parameters), inputs)
