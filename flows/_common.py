"""What all stage flows share: their parameters' types, the store, and the state that they end in."""

from collections.abc import Callable
from typing import Annotated

from prefect.states import Completed, State
from pydantic import Field

from thinkimg import cli, machines, tracking
from thinkimg.artifacts import Artifact, Store
from thinkimg.config import Config, load

Preset = Annotated[str, Field(description="Name of a preset, or the path of a YAML file.")]
Overrides = Annotated[list[str], Field(description="Settings that differ from the preset, as a.b=value.")]
Reference = Annotated[
    str, Field(description="An artifact: the beginning of its fingerprint, or kind/fingerprint.", min_length=4)
]
Optional = Annotated[str | None, Field(description="An artifact; left out, the one that the others were made from.")]
Iteration = Annotated[int, Field(description="Number of the iteration, from 1.", ge=1)]
Force = Annotated[bool, Field(description="Make a new attempt even if there is one.")]


def opened(preset: str, overrides: list[str]) -> tuple[Config, Store]:
    config = load(preset, overrides)
    return config, Store(config.where.store)


def origin(store: Store, artifact: Artifact, name: str) -> Artifact:
    """The input `name` that an artifact was made from."""
    entry = artifact.manifest["recipe"]["inputs"][name]
    return store.resolve(f"{entry['kind']}/{entry['fingerprint']}/{entry['attempt']}")


def ended(config: Config, store: Store, artifact: Artifact, cached: bool) -> State:
    """The state shows whether anything was done; its data is the reference, never the data itself."""
    if not cached and machines.CURRENT.get() is None:  # within a loop its tracker does this
        tracking.log_stage(artifact, store, config.where.tracking)
    return Completed(name="Cached" if cached else "Completed", data=str(artifact.reference))


def main(flow: Callable) -> None:
    """Run a flow with arguments from the command line, as in `python -m flows.score --rollouts 3f2a…`."""
    import cyclopts

    cli.guarded(lambda: cyclopts.run(flow))
