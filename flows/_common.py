"""Parts shared by flows: opening config and store, the types of their parameters, and the command line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from pydantic import Field

from thinkimg.config.load import load, presets
from thinkimg.config.tree import Config
from thinkimg.exit import guarded
from thinkimg.store.artifacts import Store


def described(kind: Any, text: str, **limits) -> Any:
    """A type with description and limits; said twice, as Prefect takes the first from docstrings alone."""
    return Annotated[kind, Field(description=text, json_schema_extra={"description": text}, **limits)]


# A server checks these limits before it schedules anything, and its interface makes a form of them.
Preset = described(
    str,
    f"One of {', '.join(presets())}, or the path of a YAML file.",
    pattern=rf"^({'|'.join(presets())}|.+\.ya?ml)$",
)
Overrides = described(
    list[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*=", max_length=2000)]],
    "Settings that differ from the preset, each as a.b=value; see `thinkimg schema`.",
)
Iterations = described(int | None, "Iterations of the loop; left out, as the preset says.", ge=1, le=1_000_000)
Seed = described(int | None, "Seed; left out, as the preset says.", ge=0, lt=2**32)


def open_config(preset: str, overrides: list[str], **settings: Any) -> tuple[Config, Store]:
    """settings: name -> value of those that are parameters of the flow; None leaves the preset's."""
    here = str(Path.cwd())
    if here not in sys.path:  # a user's own reward functions
        sys.path.insert(0, here)
    given = [f"{name}={json.dumps(value)}" for name, value in settings.items() if value is not None]
    config = load(preset, [*overrides, *given])
    return config, Store(config.where.store)


def main(flow: Callable) -> None:
    """Run a flow with arguments from the command line, as in `python -m flows.score --rollouts 3f2a…`."""
    guarded(lambda: cyclopts.run(flow))
