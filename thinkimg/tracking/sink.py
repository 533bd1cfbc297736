"""Entries of a run in MLflow: the one place through which metrics, parameters and tags go.

MLflow refuses many names, and with one of them the whole batch. Here each name becomes a valid key that can be turned
back, long texts are cut with a count, and an entry that is refused all the same costs itself alone.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from thinkimg.tracking.connection import Connection

log = logging.getLogger(__name__)

KEY_LENGTH, PARAM_LENGTH, TEXT_LENGTH = 250, 500, 5000  # MLflow 3.17 takes 250, 6000 and 8000, earlier ones less
BATCH = {"metrics": 1000, "params": 100, "tags": 100}
NAME_TAG = "thinkimg.name."
"""Beginning of the tags that hold what is too long for a key."""
# What MLflow refuses: other characters, and slashes and dots of a path that is not in its shortest form.
REFUSED = re.compile(r"[^\w. /-]|(?<![^/])/|/\Z|\A\.(?=\.)|(?:(?<=/)|\A)\.{1,2}(?=/|\Z)")
ESCAPED = re.compile(r":([0-9a-f]*):")
LONG = re.compile(r"::([0-9a-f]{16})")

Point = tuple[str, float, int, int]
"""Name of a metric, value, milliseconds since the epoch, step."""


def encode_name(*parts: str) -> str:
    """Return a valid key for a name, another one for each: `:3f:` stands for a question mark, say.

    parts: of a place in a tree; they are joined by dots, and a dot in one is escaped. The key of a long name is its
    beginning and a hash.
    """
    key = _encode(*parts)
    return key if len(key) <= KEY_LENGTH else f"{key[: KEY_LENGTH - 18]}::{_hash(key)}"


def decode_key(key: str, tags: Mapping[str, str]) -> str:
    """Return the name that a key stands for. tags: those of its run, where the whole of a long one is."""
    if len(key) == KEY_LENGTH and (long := LONG.fullmatch(key[-18:])):
        key = tags[NAME_TAG + long[1]]
    return ESCAPED.sub(lambda match: chr(int(match[1], 16)) if match[1] else "", key)


def _encode(*parts: str) -> str:
    keys = [REFUSED.sub(lambda match: "".join(f":{ord(c):x}:" for c in match[0]), part) or "::" for part in parts]
    return keys[0] if len(keys) == 1 else ".".join(key.replace(".", ":2e:") for key in keys)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def valid_text(text: str, limit: int = TEXT_LENGTH) -> str:
    """Return a text that any database takes, or its beginning and the number of characters that are left out."""
    text = text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
    if len(text) <= limit:
        return text
    kept = text[: limit - 30]
    return f"{kept}… (+{len(text) - len(kept)} characters)"


def valid_tags(tags: Mapping[str, str | None]) -> dict[str, str]:
    """Return tags as MLflow takes them. What can't be known is left out."""
    return {encode_name(name): valid_text(value) for name, value in tags.items() if value is not None}


def log_entries(
    connection: Connection,
    run_id: str,
    *,
    metrics: Sequence[Point] = (),
    params: Mapping[tuple[str, ...], str] | None = None,
    tags: Mapping[str, str | None] | None = None,
) -> None:
    """Add entries to a run, by their names; those of params are places in a tree."""
    from mlflow.entities import Metric, Param, RunTag

    texts = valid_tags(tags or {})
    for parts in [*((name,) for name, *_ in metrics), *(params or {})]:
        if len(whole := _encode(*parts)) > KEY_LENGTH:
            texts[NAME_TAG + _hash(whole)] = valid_text(whole)
    points = [Metric(encode_name(name), value, time, step) for name, value, time, step in metrics]
    settings = [Param(encode_name(*parts), valid_text(text, PARAM_LENGTH)) for parts, text in (params or {}).items()]
    for kind, entries in (
        ("tags", [RunTag(*tag) for tag in texts.items()]), ("params", settings), ("metrics", points),
    ):  # fmt: skip
        for start in range(0, len(entries), BATCH[kind]):
            _log(connection, run_id, kind, entries[start : start + BATCH[kind]])


def _log(connection: Connection, run_id: str, kind: str, entries: list[Any]) -> None:
    """Log entries of one kind; those that MLflow refuses are left out, with a warning each."""
    from mlflow.exceptions import MlflowException

    try:
        connection.client.log_batch(run_id, **{kind: entries})
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        if len(entries) == 1:
            log.warning("MLflow refuses %s of %s: %s", kind, entries[0].key, str(error).split("\n")[0])
            return
        middle = len(entries) // 2
        for half in (entries[:middle], entries[middle:]):
            _log(connection, run_id, kind, half)
