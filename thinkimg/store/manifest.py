"""One artifact: the recipe that defines it, the sealed manifest that proves it, and the reading of its files."""

import functools
import hashlib
import json
import math
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.store.tables import read_batches

MANIFEST = "manifest.json"
TRIMMED = ".trimmed"  # a mark beside an attempt: its optimizer state has been removed
OPTIMIZER = "optimizer.safetensors"
DROPPED = ".dropped"
"""Suffix of the mark beside an attempt whose files `gc` has dropped: it is still found, but can no longer be read."""
MEND = "put it back, or move the attempt's directory away and run the stage again"


def canonical(value: Any) -> str:
    """JSON with sorted keys, no spaces and floats by repr, equal for equal values; UserError for NaN and infinities."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise UserError(f"NaN and infinities have no fingerprint: {error}") from error


def fingerprint(
    stage: str,
    stage_version: int,
    schema_version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    sources: Mapping[str, str] | None = None,
    packages: Mapping[str, str] | None = None,
) -> str:
    """64 hex digits (sha256) over all that defines a stage's output.

    config: the slice that the stage reads, as JSON; inputs: name -> content digest; sources: user function -> sha256
    of its source; packages: name -> version. Where things run is no part of it.
    """
    body = {
        "stage": stage,
        "stage_version": stage_version,
        "schema_version": schema_version,
        "config": dict(config),
        "inputs": dict(inputs),
        "sources": dict(sources or {}),
        "packages": dict(packages or {}),
    }
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def content_digest(entries: Iterable[Mapping[str, Any]]) -> str:
    """64 hex digits over the sorted [name, size, sha256] of the entries that are content."""
    rows = sorted([entry["name"], entry["size"], entry["sha256"]] for entry in entries if entry["content"])
    return hashlib.sha256(canonical(rows).encode()).hexdigest()


def directory_digest(directory: Path) -> str:
    """The content digest of a directory that is no artifact, such as a base model's; read once per process."""
    return content_digest(
        [file_entry(directory, name, files.sha256_once(directory / name)) for name in files.files_under(directory)]
    )


@dataclass(frozen=True)
class Reference:
    """What crosses a stage boundary: an artifact's place and digest; weights from outside have a digest only."""

    kind: str
    digest: str
    fingerprint: str | None = None
    attempt: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.kind, self.fingerprint or self.digest, self.attempt)))


@dataclass(frozen=True)
class Recipe:
    """All that defines a stage's output; the manifest holds it whole, so that the fingerprint can be checked."""

    stage: str
    stage_version: int
    schema_version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, Reference] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        digests = {name: reference.digest for name, reference in self.inputs.items()}
        return fingerprint(
            self.stage, self.stage_version, self.schema_version, self.config, digests, self.sources, self.packages
        )


@dataclass(frozen=True)
class Artifact:
    """A complete attempt. Opening it compares sizes; `checked`, `table` and `batches` hash a file once per process."""

    directory: Path
    manifest: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Raises UserError where the manifest is damaged, or a file is missing or of another size (and was not dropped)."""
        return cls(directory, read_manifest(directory)).compared()

    def compared(self) -> Self:
        """Itself; raises as `open`."""
        for name, entry in () if self.dropped else self.files.items():
            if not self.trimmed(entry):
                self.path(name)
        return self

    @property
    def dropped(self) -> bool:
        """Whether `gc` has dropped the files: the manifest still says what they were, and what was made from them."""
        return self.directory.with_suffix(DROPPED).is_file()

    def trimmed(self, entry: Mapping[str, Any]) -> bool:
        """Whether this file is an optimizer state that has been removed: only the last policies of a loop keep theirs."""
        return is_trimmed(self.directory, entry["name"])

    @property
    def size(self) -> int:
        """Bytes of all files, as published."""
        return sum(entry["size"] for entry in self.manifest["files"])

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def attempt(self) -> str:
        return self.manifest["attempt"]

    @property
    def digest(self) -> str:
        """Content digest: equal for attempts that differ in nothing but timings."""
        return self.manifest["digest"]

    @property
    def short(self) -> str:
        return self.fingerprint[:12]

    @property
    def reference(self) -> Reference:
        return Reference(self.kind, self.digest, self.fingerprint, self.attempt)

    @property
    def metrics(self) -> dict[str, float | None]:
        return self.manifest["metrics"]

    @functools.cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """name -> {name, size, rows or None, sha256, content}."""
        return {entry["name"]: entry for entry in self.manifest["files"]}

    def path(self, name: str) -> Path:
        """Path of a file, of the right size, or of a directory of files; UserError where it is not."""
        path = self.directory / name
        for entry in self._entries(name):
            file = self.directory / entry["name"]
            if not file.is_file() or file.stat().st_size != entry["size"]:
                raise self._damaged(entry["name"])
        return path

    def checked(self, name: str) -> Path:
        """As `path`, and the bytes are those that were published."""
        path = self.path(name)
        for entry in self._entries(name):
            if files.sha256_once(self.directory / entry["name"]) != entry["sha256"]:
                raise self._damaged(entry["name"])
        return path

    def json(self, name: str) -> Any:
        return json.loads(self.checked(name).read_bytes())

    def has_table(self, table: str) -> bool:
        """Whether it has files of a table."""
        return bool(self._names(table))

    def table_files(self, table: str) -> list[Path]:
        """`<table>.parquet` and its parts `<table>[-<name>]-00000.parquet`, checked, in order; UserError if there is none."""
        names = self._names(table)
        if not names:
            raise UserError(f"{self.reference} has no table {table!r}", hint=f"it has {', '.join(self.files)}")
        return [self.checked(name) for name in names]

    def _names(self, table: str) -> list[str]:
        pattern = re.compile(re.escape(table) + r"(-[A-Za-z_]\w*)?(-\d{5})?\.parquet", re.ASCII)
        return sorted(name for name in self.files if pattern.fullmatch(name))

    def table(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """The whole table, parts one after the other."""
        return pa.concat_tables(pq.ParquetFile(path).read(columns) for path in self.table_files(table))

    def batches(self, table: str, columns: list[str] | None = None, rows: int = 1024) -> Iterator[pa.RecordBatch]:
        """The table in batches of at most `rows`, in order, with one row group in memory at a time."""
        return read_batches(self.table_files(table), columns, rows)

    def _entries(self, name: str) -> list[dict[str, Any]]:
        inside = (
            [self.files[name]]
            if name in self.files
            else [entry for entry in self.files.values() if entry["name"].startswith(f"{name}/")]
        )
        if not inside:
            raise UserError(f"{self.reference} has no file {name!r}", hint=f"it has {', '.join(self.files)}")
        if len(inside) > 1:
            inside = [entry for entry in inside if not self.trimmed(entry)]
        return inside

    def _damaged(self, name: str) -> UserError:
        if self.dropped:
            return UserError(
                f"the files of {self.kind}/{self.short} were dropped by gc, only its manifest is kept",
                hint="make it again with --force",
            )
        return UserError(f"{self.directory / name} is not what was published", hint=MEND)


def package_versions(*names: str) -> dict[str, str]:
    """name -> installed version, for `Recipe.packages`."""
    return {name: version(name) for name in names}


@functools.cache
def git_revision() -> str | None:
    """The commit of this code, with `-dirty` if files were changed since; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None  # no git on this machine
    return done.stdout.strip() or None


def host_facts() -> dict[str, Any]:
    """hostname, usable cpus, python and platform of this process."""
    return {
        "hostname": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def file_entry(directory: Path, name: str, sha256: str) -> dict[str, Any]:
    """One file as the manifest lists it: {name, size, rows (Parquet) or None, sha256, content}."""
    path = directory / name
    rows = None
    if name.endswith(".parquet"):
        rows = pq.read_metadata(path).num_rows
    # Clock times, hosts and cache hits differ between two identical runs: hashed, but no content.
    content = not re.fullmatch(r"timings(-\d{5})?\.parquet", name)
    return {"name": name, "size": path.stat().st_size, "rows": rows, "sha256": sha256, "content": content}


def is_trimmed(directory: Path, name: str) -> bool:
    mine = name.rpartition("/")[2] == OPTIMIZER and directory.with_suffix(TRIMMED).is_file()
    return mine and not (directory / name).exists()


def is_intact(directory: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the file is there with the size and hash of its entry."""
    path = directory / entry["name"]
    return path.is_file() and path.stat().st_size == entry["size"] and files.sha256(path) == entry["sha256"]


def sealed(body: Mapping[str, Any]) -> str:
    """The manifest's text: it ends with the hash of all before, so that one flipped bit in it shows."""
    text = json.dumps(body, indent=1, sort_keys=True, allow_nan=False, default=str)
    return json.dumps({**json.loads(text), "seal": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a complete attempt; UserError where it is missing, or not byte for byte what was sealed."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{directory} is no artifact: it has no {MANIFEST}")
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        manifest.pop("seal")
        if sealed(manifest).encode() == data:
            return manifest
        damage = None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        damage = error  # not even a JSON object with a seal
    raise UserError(f"{path} is not what was published", hint=MEND) from damage


def number(value: Any) -> float | None:
    """A headline metric as JSON: an int, a finite float, or None."""
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def now() -> str:
    """UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
