"""Settings of a data set as overrides that a shell takes: a reading that was recognised, stated in full."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from thinkimg.data.fields import BoxForm
from thinkimg.data.recognise import Recognised
from thinkimg.data.settings import FilesConfig
from thinkimg.settings import Settings


def pin(data: FilesConfig, schema: Recognised, boxes: BoxForm | None) -> FilesConfig:
    """Return the settings with what was recognised stated, so that nothing of it is left to recognition.

    boxes: form that was found by the boxes alone.
    """
    update: dict[str, Any] = {"schema": schema.name}
    if schema.name == "none":
        update["columns"] = schema.columns
    if boxes is not None:
        update["boxes"] = boxes
    return data.model_copy(update=update)


def list_pins(pinned: FilesConfig, data: FilesConfig) -> dict[str, str]:
    """Return the settings that pin `data` down, as dotted name -> text: the path, the schema, and what differs."""
    pins = {"data.path": str(getattr(data, "path", "")), "data.schema": pinned.schema}
    for name, value in pinned:
        before = getattr(data, name)
        if isinstance(value, Settings):
            changed = {key: inner for key, inner in value if inner != getattr(before, key)}
            pins |= {f"data.{name}.{key}": _as_text(inner) for key, inner in changed.items()}
        elif value != before:
            pins[f"data.{name}"] = _as_text(value)
    return pins


def add_pins(given: Sequence[str], pins: Mapping[str, str]) -> list[str]:
    """Return the overrides of a command that reads the data as they were read. given: the user's own overrides."""
    kept = [text for text in given if text.partition("=")[0] not in pins]
    path, *others = (f"{name}={value}" for name, value in pins.items())
    return [path, *kept, *others]


def shell_command(overrides: Iterable[str]) -> str:
    """Return the command that prepares a data set with these settings, one on each line."""
    return " \\\n    ".join(["thinkimg prepare", *(f"--set {shlex.quote(text)}" for text in overrides)])


def _as_text(value: Any) -> str:
    """Return a value as `--set` reads it: texts as they are, others as JSON, which is YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
