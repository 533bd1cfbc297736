"""Artifacts: the recipe that defines one, the sealed manifest that proves it, and the reading of its files."""

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
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from thinkimg import __version__
from thinkimg.environment import child_environment
from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.store.tables import read_batches

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
TRIMMED = ".trimmed"
"""Suffix of the mark beside an attempt whose optimizer state was removed."""
DROPPED = ".dropped"
"""Suffix of the mark beside an attempt whose files `gc` has dropped: it is listed, and can no longer be read."""
GIT_TIMEOUT_S = 30
MEND = "Put it back, or move the attempt's directory away and run the stage again."


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys, no spaces and floats by repr: equal for equal values.

    Raises UserError for NaN and infinities.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise UserError(f"NaN and infinities have no fingerprint: {error}.") from error


def content_digest(entries: Iterable[Mapping[str, Any]]) -> str:
    """Return 64 hex digits over the sorted [name, size, sha256] of the entries that are content."""
    rows = sorted([entry["name"], entry["size"], entry["sha256"]] for entry in entries if entry["content"])
    return hashlib.sha256(canonical_json(rows).encode()).hexdigest()


def directory_digest(directory: Path) -> str:
    """Return the content digest of a directory that is no artifact, such as a base model's; read once per process.

    Links are followed. Raises UserError for a broken one.
    """
    paths = files.walk_files(directory, "*")
    return content_digest(
        [file_entry(directory, path.relative_to(directory).as_posix(), files.sha256_once(path)) for path in paths]
    )


@dataclass(frozen=True)
class Reference:
    """Name of an artifact for another stage; weights from outside have a digest and no fingerprint."""

    kind: str
    digest: str
    fingerprint: str | None = None
    attempt: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.kind, self.fingerprint or self.digest, self.attempt)))


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a stage's output; the manifest holds it, so that the fingerprint can be checked."""

    stage: str
    stage_version: int
    schema_version: int
    config: Mapping[str, Any]
    """The settings that the stage reads, as JSON; where things run is no part of them."""
    inputs: Mapping[str, Reference] = field(default_factory=dict)
    """Role -> artifact; its content digest counts, and not its place."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """A user's function or module -> sha256 of its source."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Name -> version."""

    @property
    def fingerprint(self) -> str:
        """64 hex digits: sha256 over the canonical JSON of all fields. Raises UserError for NaN and infinities."""
        body = asdict(self) | {"inputs": {role: reference.digest for role, reference in self.inputs.items()}}
        return hashlib.sha256(canonical_json(body).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A complete attempt of a stage.

    Opening it compares sizes; `checked`, `table` and `batches` hash a file once per process.
    """

    directory: Path
    manifest: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Return the artifact in a directory.

        Raises UserError for a damaged manifest, and for a file that is missing or of another size (and not dropped).
        """
        return cls(directory, read_manifest(directory)).check_sizes()

    def check_sizes(self) -> Self:
        """Return itself; raises as `open`."""
        for name in () if self.dropped else self.files:
            if not self.is_trimmed(name):
                self.path(name)
        return self

    @property
    def dropped(self) -> bool:
        """True if `gc` has dropped the files: the manifest still lists them and the inputs."""
        return self.directory.with_suffix(DROPPED).is_file()

    def is_trimmed(self, name: str) -> bool:
        """Return True for an optimizer state that was removed: only the last policies of a loop keep theirs."""
        return is_trimmed(self.directory, name)

    @property
    def size(self) -> int:
        """Bytes of all files, as published."""
        return sum(entry["size"] for entry in self.manifest["files"])

    @property
    def kind(self) -> str:
        """Name of the kind, such as "policy"."""
        return self.manifest["kind"]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the recipe, 64 hex digits."""
        return self.manifest["fingerprint"]

    @property
    def attempt(self) -> str:
        """Number among the attempts of one fingerprint, "0001" for the first."""
        return self.manifest["attempt"]

    @property
    def digest(self) -> str:
        """Content digest: equal for attempts that differ in nothing but timings."""
        return self.manifest["digest"]

    @property
    def family(self) -> str | None:
        """Name of the family of models that it was made with; None without a model, and before version 0.3."""
        return self.manifest.get("family")

    @property
    def short(self) -> str:
        """Beginning of the fingerprint, for people."""
        return self.fingerprint[:12]

    @property
    def reference(self) -> Reference:
        """Name for other stages and manifests."""
        return Reference(self.kind, self.digest, self.fingerprint, self.attempt)

    @property
    def inputs(self) -> dict[str, Reference]:
        """Role -> artifact, or weights from outside, that this was made from."""
        return read_inputs(self.manifest)

    @property
    def metrics(self) -> dict[str, float | None]:
        """Headline figures by name."""
        return self.manifest["metrics"]

    @functools.cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """name -> {name, size, rows or None, sha256, content}."""
        return {entry["name"]: entry for entry in self.manifest["files"]}

    def path(self, name: str) -> Path:
        """Return the path of a file or a directory of files. Raises UserError if one is missing or of another size."""
        path = self.directory / name
        for entry in self._entries(name):
            file = self.directory / entry["name"]
            if not file.is_file() or file.stat().st_size != entry["size"]:
                raise self._damaged(entry["name"])
        return path

    def checked(self, name: str) -> Path:
        """Return `path(name)`. Raises UserError also where the bytes are not those that were published."""
        path = self.path(name)
        for entry in self._entries(name):
            if files.sha256_once(self.directory / entry["name"]) != entry["sha256"]:
                raise self._damaged(entry["name"])
        return path

    def json(self, name: str) -> Any:
        """Return the content of a JSON file. Raises as `checked`."""
        return json.loads(self.checked(name).read_bytes())

    def has_table(self, table: str) -> bool:
        """Return True if there are files of the table."""
        return bool(self._names(table))

    def table_files(self, table: str) -> list[Path]:
        """Return the paths of `<table>.parquet` and of its parts `<table>[-<name>]-00000.parquet`, in order.

        Raises UserError if there is none, and as `checked`.
        """
        names = self._names(table)
        if not names:
            raise UserError(f"{self.reference} has no table {table!r}.", hint=f"It has {', '.join(self.files)}.")
        return [self.checked(name) for name in names]

    def _names(self, table: str) -> list[str]:
        pattern = re.compile(re.escape(table) + r"(-[A-Za-z_]\w*)?(-\d{5})?\.parquet", re.ASCII)
        return sorted(name for name in self.files if pattern.fullmatch(name))

    def table(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """Return the table in memory, parts one after the other."""
        return pa.concat_tables(pq.ParquetFile(path).read(columns) for path in self.table_files(table))

    def batches(self, table: str, columns: list[str] | None = None, rows: int = 1024) -> Iterator[pa.RecordBatch]:
        """Return the table in batches of at most `rows`, in order, with one row group in memory at a time."""
        return read_batches(self.table_files(table), columns, rows)

    def _entries(self, name: str) -> list[dict[str, Any]]:
        if name in self.files:
            return [self.files[name]]
        inside = [entry for entry in self.files.values() if entry["name"].startswith(f"{name}/")]
        if not inside:
            raise UserError(f"{self.reference} has no file {name!r}.", hint=f"It has {', '.join(self.files)}.")
        return [entry for entry in inside if len(inside) == 1 or not self.is_trimmed(entry["name"])]

    def _damaged(self, name: str) -> UserError:
        if self.dropped:
            return UserError(
                f"The files of {self.kind}/{self.short} were dropped by gc; only its manifest is kept.",
                hint="Make it again with --force.",
            )
        return UserError(f"{self.directory / name} is not what was published.", hint=MEND)


def package_versions(*names: str) -> dict[str, str]:
    """Return name -> installed version, for `Recipe.packages`."""
    return {name: version(name) for name in names}


@functools.cache
def git_revision() -> str | None:
    """Return the commit of this code, with `-dirty` if files were changed since; None where it can't be known.

    A repository counts if this package is tracked at its top: others may have an installed thinkimg inside.
    """
    package = Path(__file__).resolve().parents[1]
    environment = child_environment("tool", os.environ)  # a GIT_DIR of the caller names another repository

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
        )
        return process.stdout.rstrip("\n")

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, no repository, or one of another user
        return None


def host_facts() -> dict[str, Any]:
    """Return hostname, usable cpus, python and platform of this process, and the version of thinkimg."""
    return {
        "hostname": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "thinkimg": __version__,
    }


def file_entry(directory: Path, name: str, sha256: str) -> dict[str, Any]:
    """Return a file as the manifest lists it: {name, size, rows (Parquet) or None, sha256, content}."""
    path = directory / name
    rows = None
    if name.endswith(".parquet"):
        rows = pq.read_metadata(path).num_rows
    # Clock times, hosts and cache hits differ between two identical runs: hashed, but no content.
    content = not re.fullmatch(r"timings(-\d{5})?\.parquet", name)
    return {"name": name, "size": path.stat().st_size, "rows": rows, "sha256": sha256, "content": content}


def is_trimmed(directory: Path, name: str) -> bool:
    """Return True for an optimizer state in an attempt's directory that was removed on purpose."""
    marked = name.rpartition("/")[2] == OPTIMIZER and directory.with_suffix(TRIMMED).is_file()
    return marked and not (directory / name).exists()


def is_intact(directory: Path, entry: Mapping[str, Any]) -> bool:
    """Return True if the file has the size and hash of its entry."""
    path = directory / entry["name"]
    return path.is_file() and path.stat().st_size == entry["size"] and files.sha256(path) == entry["sha256"]


def seal(body: Mapping[str, Any]) -> str:
    """Return the manifest's text, which ends with the hash of the rest, so that one flipped bit shows."""
    text = json.dumps(body, indent=1, sort_keys=True, allow_nan=False, default=str)
    return json.dumps({**json.loads(text), "seal": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a complete attempt. Raises UserError if it is missing, or not as it was sealed."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"{directory} is no artifact: it has no {MANIFEST}.")
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        manifest.pop("seal")
        if seal(manifest).encode() == data:
            return manifest
        damage = None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        damage = error  # not even a JSON object with a seal
    raise UserError(f"{path} is not what was published.", hint=MEND) from damage


def read_inputs(manifest: Mapping[str, Any]) -> dict[str, Reference]:
    """Return the inputs that a manifest names, by role."""
    return {role: Reference(**entry) for role, entry in manifest["recipe"]["inputs"].items()}


def json_number(value: Any) -> float | None:
    """Return a headline metric as JSON has it: an int, a finite float, or None."""
    try:
        if value is None or not math.isfinite(value):
            return None
        return value if isinstance(value, int) else float(value)
    except OverflowError:  # an int that no float holds
        return None


def utc_now() -> str:
    """Return the time in UTC as ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
