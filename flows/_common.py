"""What all stage flows share: their parameters' types, the store, and the state that they end in."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from prefect.states import Completed, State
from pydantic import Field

from flows import _server, _ui
from flows._device import device
from thinkimg import resources, tracking
from thinkimg.config import Config, load, presets
from thinkimg.exit import guarded
from thinkimg.store.artifacts import Artifact, Store


def described(text: str, **limits) -> Any:
    """A parameter's description and limits; said twice, as Prefect takes the first from docstrings alone."""
    return Field(description=text, json_schema_extra={"description": text}, **limits)


# A server checks these limits before it schedules anything, and its interface makes a form of them.
Preset = Annotated[
    str,
    described(
        f"One of {', '.join(presets())}, or the path of a YAML file.",
        pattern=rf"^({'|'.join(presets())}|.+\.ya?ml)$",
    ),
]
Overrides = Annotated[
    list[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*=", max_length=2000)]],
    described("Settings that differ from the preset, each as a.b=value; see `thinkimg schema`."),
]
Reference = Annotated[
    str,
    described(
        "An artifact: the beginning of its fingerprint, or kind/fingerprint.",
        min_length=4,
        max_length=300,
    ),
]
Optional = Annotated[
    str | None, described("An artifact; left out, the one that the others were made from.", min_length=4)
]
Iteration = Annotated[int, described("Number of the iteration, from 1.", ge=1, le=1_000_000)]
Iterations = Annotated[
    int | None, described("Iterations of the loop; left out, as the preset says.", ge=1, le=1_000_000)
]
Seed = Annotated[int | None, described("Seed; left out, as the preset says.", ge=0, lt=2**32)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Mix = Annotated[
    dict[str, Weight] | None,
    described("Weight of each reward component, all of them; left out, as the preset says."),
]
Samples = Annotated[int | None, described("Held-out samples; left out, as the preset says.", ge=1, le=10_000_000)]
Blind = Annotated[bool, described("Show grey images in place of those that tools make.")]
Force = Annotated[bool, described("Make a new attempt even if there is one.")]

resources.take_device = device


def opened(preset: str, overrides: list[str], **settings) -> tuple[Config, Store]:
    """settings: name -> value of those that are parameters of the flow; None leaves the preset's."""
    here = str(Path.cwd())
    if here not in sys.path:  # a user's own reward functions
        sys.path.insert(0, here)
    config = load(preset, with_settings(overrides, **settings))
    return config, Store(config.where.store)


def with_settings(overrides: list[str], **settings) -> list[str]:
    return [*overrides, *(f"{name}={json.dumps(value)}" for name, value in settings.items() if value is not None)]


def beside(store: Store, made: Iterable[Artifact]) -> Iterator[Artifact]:
    """What stages have made on their way to these: known pairs, the small CLIP."""
    for artifact in made:
        for name in {"pairs", "clip"} & artifact.manifest["recipe"]["inputs"].keys():
            found = store.origin(artifact, name)
            yield found
            yield from beside(store, [found])


def ended(config: Config, store: Store, artifact: Artifact, cached: bool) -> State:
    """The state shows whether anything was done; its data is the reference, never the data itself."""
    if resources.CURRENT.get() is not None:  # within a loop its tracker logs
        link = _ui.LOOP_LINK.get()
    elif cached and _server.is_embedded():  # nobody can look
        link = None
    else:
        link = tracking.log_stage(artifact, store, config.where.tracking)
    _ui.show_artifact(artifact, cached, link)
    return Completed(name="Cached" if cached else "Completed", data=str(artifact.reference))


def main(flow: Callable) -> None:
    """Run a flow with arguments from the command line, as in `python -m flows.score --rollouts 3f2a…`."""
    import cyclopts

    guarded(lambda: cyclopts.run(flow))
