"""Commits that a user has chosen for data sets of the Hub: thinkimg-pins.toml in the working directory."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinkimg.errors import UserError
from thinkimg.store import files

FILE = Path("thinkimg-pins.toml")
HEAD = "# Commits of public data sets, written by `thinkimg data pin`. Keep this file beside your presets.\n"
COMMIT = re.compile(r"[0-9a-f]{40}")


def read_pins(path: Path = FILE) -> dict[str, dict[str, Any]]:
    """Return name -> its pin, with `id` and `commit`; none where there is no file. Raises UserError for a bad one."""
    try:
        pins = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}.", hint="Correct it, or remove it and pin again.") from error
    for name, pin in pins.items():
        is_pin = isinstance(pin, dict) and isinstance(pin.get("id"), str)
        if not is_pin or not isinstance(pin.get("commit"), str) or not COMMIT.fullmatch(pin["commit"]):
            raise UserError(f"{path} has no id and commit for {name}.", hint="Correct it, or remove it and pin again.")
    return pins


def find_pin(name: str, id: str) -> str | None:
    """Return the commit that was pinned under a name, or under the id that it stands for; None if none was.

    A pin of a name holds for that id alone: another version of the table may mean another data set by it.
    """
    pins = read_pins()
    return next((pins[key]["commit"] for key in (name, id) if key in pins and pins[key]["id"] == id), None)


def write_pin(name: str, pin: Mapping[str, str | int], path: Path = FILE) -> None:
    """Record a pin, in place of an earlier one of that name."""
    pins = read_pins(path) | {name: dict(pin)}
    entries = [
        f"\n[{json.dumps(key)}]\n" + "".join(f"{field} = {json.dumps(value)}\n" for field, value in entry.items())
        for key, entry in sorted(pins.items())
    ]
    try:
        files.write(path.absolute(), HEAD + "".join(entries))
    except OSError as error:
        raise UserError(f"{path.absolute()} can't be written: {error.strerror}.") from error
