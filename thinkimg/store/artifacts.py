"""Content-addressed store: each artifact lies under the fingerprint of everything that defines it.

artifacts/<kind>/<fingerprint>/.lock         one process at a time works on a fingerprint
                               0001/         a complete attempt: it has its name and a manifest.json
                               0002.work/    the next attempt in progress, in closed parts
                               0002.jsonl    its journal: the closed parts with their hashes; removed after the rename
                               0001.dropped  a mark: `gc` has removed the files of 0001, all but its manifest
"""

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.store.kinds import as_kind, open_artifact
from thinkimg.store.manifest import (
    DROPPED,
    MANIFEST,
    TRIMMED,
    Artifact,
    Recipe,
    Reference,
    canonical_json,
    content_digest,
    file_entry,
    git_revision,
    host_facts,
    is_intact,
    is_trimmed,
    json_number,
    read_inputs,
    read_manifest,
    seal,
    utc_now,
)
from thinkimg.store.tables import write_table

log = logging.getLogger(__name__)

PART_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
ATTEMPT = re.compile(r"[0-9]{4,}")


@dataclass(frozen=True)
class Problem:
    """A file of an artifact that differs from its manifest."""

    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


class Work:
    """An attempt in progress: parts that are closed one by one, and survive a crash.

    A stage asks `has(name)` and skips the parts that an earlier run has closed. It sets `seed` and `family` and fills
    the dictionaries `metrics` and `where` (URLs, devices, paths), which go into the manifest.
    """

    def __init__(self, home: Path, kind: str, recipe: Recipe, *, anew: bool = False):
        """anew: remove the parts of an earlier run instead of continuing with them."""
        self.kind, self.recipe = kind, recipe
        self.seed: int | None = None
        self.family: str | None = None
        self.metrics: dict[str, Any] = {}
        self.where: dict[str, Any] = {}
        self.reading = threading.Lock()
        """Held by who reads closed parts while others are made; who renames or removes them waits for it."""
        self._home, self._started = home, utc_now()
        self._parts: dict[str, list[dict[str, Any]]] = {}
        unfinished, complete = list_attempts(home, ".work"), list_attempts(home)
        number = int(unfinished[-1].stem) if unfinished else 1 + (int(complete[-1].name) if complete else 0)
        self.attempt = f"{number:04}"
        self.directory = home / f"{self.attempt}.work"
        self._journal = _journal(self.directory)
        if anew:
            files.remove(self._journal)
        self._recover()

    def has(self, name: str) -> bool:
        """Return True if the part is closed."""
        return name in self._parts

    @property
    def closed(self) -> list[str]:
        """Names of the closed parts."""
        return list(self._parts)

    def path(self, name: str) -> Path:
        """Return the path of a closed part."""
        assert self.has(name), f"{name} is not closed"
        return self.directory / name

    @contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """Yield a path to write one file or one directory at; after the block it is the closed part `name`."""
        assert PART_NAME.fullmatch(name) and name != MANIFEST and not self.has(name), (
            f"{name} is no name for a new part"
        )
        assert self.directory.is_dir(), "published work takes no more parts"
        path = self.directory / name
        with files.replacing(path) as temporary:
            yield temporary
        inside = [f"{name}/{child}" for child in files.files_under(path)] if path.is_dir() else [name]
        entries = [file_entry(self.directory, child, files.sha256(self.directory / child)) for child in inside]
        files.append(self._journal, canonical_json({"part": name, "files": entries}))
        self._parts[name] = entries

    def table(self, name: str, table: pa.Table) -> None:
        """Write and close a Parquet part; equal tables give equal bytes, however they are chunked."""
        with self.part(name) as path:
            write_table(path, table)

    def json(self, name: str, value: Any) -> None:
        """Write and close a JSON part. Raises ValueError for NaN and infinities."""
        self.text(name, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")

    def text(self, name: str, text: str) -> None:
        """Write and close a part of UTF-8 text."""
        with self.part(name) as path:
            path.write_bytes(text.encode())

    def discard(self, name: str) -> None:
        """Remove a closed part, so that it can be made again; do nothing if there is none."""
        if not self.has(name):
            return
        with self.reading:
            del self._parts[name]
            self._write_journal()  # first: recovery removes a part that is not in the journal
            files.remove(self.directory / name)

    def publish(self) -> Artifact:
        """Write the manifest, sync everything and rename; return the artifact."""
        on_disk = [name for name in files.files_under(self.directory) if name != MANIFEST]
        manifest = self._describe()
        assert on_disk == [entry["name"] for entry in manifest["files"]], f"not only closed parts: {on_disk}"
        body = manifest | {"host": host_facts(), "git": git_revision(), "finished": utc_now()}
        files.write(self.directory / MANIFEST, seal(body))
        files.sync_tree(self.directory)
        final = self._home / self.attempt
        with self.reading:
            files.rename(self.directory, final)
        files.remove(self._journal)
        return open_artifact(final)

    def snapshot(self, count: int) -> Artifact:
        """Return the first `count` closed parts as an artifact that has no place of its own yet."""
        return as_kind(self.directory, self._describe(count))

    def _describe(self, count: int | None = None) -> dict[str, Any]:
        """Return the manifest of the first closed parts, or of all, but for what is known when the work ends."""
        parts = [*self._parts.values()][:count]
        entries = sorted((entry for part in parts for entry in part), key=lambda entry: entry["name"])
        return {
            "kind": self.kind,
            "fingerprint": self.recipe.fingerprint,
            "attempt": self.attempt,
            "digest": content_digest(entries),
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "family": self.family,
            "files": entries,
            "metrics": {name: json_number(value) for name, value in self.metrics.items()},
            "where": self.where,
            "started": self._started,
        }

    def _recover(self) -> None:
        """Keep the parts of a killed run whose bytes match the journal; remove everything else."""
        files.make_directory(self.directory)
        files.remove(self.directory.with_suffix(TRIMMED))
        files.remove(self.directory.with_suffix(DROPPED))  # of an attempt with this number that gc has removed
        lines = self._journal.read_bytes().splitlines() if self._journal.exists() else []
        for line in lines:
            try:
                part = json.loads(line)
            except ValueError:
                continue  # torn by the crash: its part is made again
            if all(is_intact(self.directory, entry) for entry in part["files"]):
                self._parts[part["part"]] = part["files"]
        for path in sorted(self.directory.iterdir()):
            if path.name not in self._parts:
                files.remove(path)
        self._write_journal()
        if self._parts:
            log.info("%s: %d parts of an earlier run are reused.", self.directory, len(self._parts))

    def _write_journal(self) -> None:
        lines = [canonical_json({"part": name, "files": entries}) + "\n" for name, entries in self._parts.items()]
        files.write(self._journal, "".join(lines))


class Store:
    """Artifacts under one root. Reading takes no lock and writes nothing."""

    def __init__(self, root: Path | str):
        self.root = Path(root)

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        """Return the newest complete attempt, None if there is none. Raises UserError if it was changed or moved."""
        attempts = self._attempts(self.root / kind / fingerprint)
        if not attempts:
            return None
        artifact = open_artifact(attempts[-1])
        if (artifact.kind, artifact.fingerprint) != (kind, fingerprint):
            raise UserError(
                f"{artifact.directory} holds {artifact.reference}.", hint="Move it to the directory of that name."
            )
        return artifact

    @contextmanager
    def create(
        self,
        kind: str,
        recipe: Recipe,
        *,
        force: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[Artifact | Work]:
        """Yield the artifact if there is one already, else the work on a new attempt, alone on this fingerprint.

        A second process waits here, calls `waiting` meanwhile, and gets the artifact of the first.
        The closed parts of a dead run are reused, unless `force` is set.
        """
        assert PART_NAME.fullmatch(kind), kind
        home = self.root / kind / recipe.fingerprint
        artifact = None if force else self.find(kind, recipe.fingerprint)
        if artifact and not _journal(artifact.directory).exists():
            yield artifact
            return
        files.make_directory(home)
        for parent in (home.parent, self.root):
            files.sync_path(parent)  # a killed run may have made them and not synced them
        with files.locked(home / ".lock", waiting=waiting):
            artifact = None if force else self.find(kind, recipe.fingerprint)
            if artifact and _journal(artifact.directory).exists():
                files.sync_path(home)  # that run was killed between its rename and this
                files.remove(_journal(artifact.directory))
            yield artifact or Work(home, kind, recipe, anew=force)

    def build(
        self,
        kind: str,
        recipe: Recipe,
        produce: Callable[[Work], object],
        *,
        force: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> tuple[Artifact, bool]:
        """Return the artifact, and True if it was there already (*Cached*); else `produce(work)` makes it.

        force, waiting: as in `create`.
        """
        with self.create(kind, recipe, force=force, waiting=waiting) as work:
            if isinstance(work, Artifact):
                return work, True
            produce(work)
            return work.publish(), False

    def resolve(self, reference: str | Path | Reference, kind: str | None = None) -> Artifact:
        """Return the artifact of a path, of `kind/fingerprint/attempt`, or of the beginning of a fingerprint.

        The path may be that of a part, as of the final policy's weights. Of several attempts it is the newest. Raises
        UserError, which lists candidates, for none, for several, and for another kind.
        """
        reference = str(reference)
        for path in (Path(reference), self.root / reference):
            attempt = next((place for place in (path, path.parent) if (place / MANIFEST).is_file()), None)
            attempts = [attempt] if attempt and path.exists() else self._attempts(path)
            if reference and attempts:
                artifact = open_artifact(attempts[-1])
                if kind not in (None, artifact.kind):
                    raise UserError(f"{reference} is of kind {artifact.kind}, not {kind}.")
                return artifact
        homes = [home for home in self._homes(kind) if self._attempts(home)]
        matches = [
            home
            for home in homes
            if reference and str(home.relative_to(self.root if "/" in reference else home.parent)).startswith(reference)
        ]
        if len(matches) == 1 and (newest := self.find(matches[0].parent.name, matches[0].name)) is not None:
            return newest
        others = sorted(homes, key=lambda home: home.stat().st_mtime, reverse=True)  # the newest first
        names = [f"{home.parent.name}/{home.name[:12]}" for home in matches or others]
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} older ones" if len(names) > 8 else "")
        subject = "Several artifacts begin" if len(matches) > 1 else f"No {kind or 'artifact'} under {self.root} begins"
        none = f"There are none yet in {self.root.absolute()}; another store is named by where.store, or --store."
        raise UserError(f"{subject} with {reference!r}.", hint=f"There are {listed}." if names else none)

    def origin(self, artifact: Artifact, role: str) -> Artifact:
        """Return the input of a role that an artifact was made from. Raises UserError if the store does not have it."""
        if role not in artifact.inputs:
            raise UserError(f"{artifact.reference} was not made from {role}.")
        return self.resolve(artifact.inputs[role])

    def verify(self, artifact: Artifact | Path) -> list[Problem]:
        """Hash every file and the manifest again; return a problem for each that is missing, extra or different."""
        directory = artifact.directory if isinstance(artifact, Artifact) else artifact
        try:
            manifest = read_manifest(directory)
        except UserError as error:
            return [Problem(MANIFEST, str(error))]
        problems = []
        dropped = directory.with_suffix(DROPPED).is_file()
        expected = {entry["name"]: entry for entry in manifest["files"]}
        for name in sorted({MANIFEST, *expected} | set(files.files_under(directory))):
            path, entry = directory / name, expected.get(name)
            if (dropped and name != MANIFEST and not path.exists()) or is_trimmed(directory, name):
                continue
            if path.is_symlink() or (path.exists() and not path.is_file()):
                problems.append(Problem(name, "not a regular file"))
            elif not path.exists():
                problems.append(Problem(name, "missing"))
            elif entry is None:
                if name != MANIFEST:
                    problems.append(Problem(name, "not in the manifest"))
            elif path.stat().st_size != entry["size"]:
                problems.append(Problem(name, f"has {path.stat().st_size} bytes, not {entry['size']}"))
            elif (sha256 := files.sha256(path)) != entry["sha256"]:
                problems.append(Problem(name, f"has sha256 {sha256[:12]}…, not {entry['sha256'][:12]}…"))
        inputs = read_inputs(manifest)
        if Recipe(**{**manifest["recipe"], "inputs": inputs}).fingerprint != manifest["fingerprint"]:
            problems.append(Problem(MANIFEST, "the fingerprint is not that of its recipe"))
        if content_digest(manifest["files"]) != manifest["digest"]:
            problems.append(Problem(MANIFEST, "the digest is not that of its files"))
        for role, reference in inputs.items():
            source = self.root / str(reference)
            stored = reference.attempt and (source / MANIFEST).is_file()
            if stored and read_manifest(source)["digest"] != reference.digest:
                problems.append(Problem(f"input {role}", f"{reference} has changed since it was used"))
        return problems

    def sweep(self, remove: bool = False) -> list[Path]:
        """Return the work directories, journals and temporary files of dead runs, and remove them if asked to.

        The next run of the stage would continue with them.
        """
        remains = []
        for home in self._homes(None):
            remainders = (*list_attempts(home, ".work"), *list_attempts(home, ".jsonl"))
            paths = sorted([*remainders, *home.glob(files.TEMPORARY + "*")])
            if not paths:
                continue
            with files.locked(home / ".lock", wait=False) as free:
                if free:
                    remains += paths
                    for path in paths if remove else ():
                        files.remove(path)
        return remains

    def busy(self) -> list[Path]:
        """Return the directories <kind>/<fingerprint> on which a process works at this moment."""
        homes = []
        for home in self._homes(None):
            if (home / ".lock").exists():
                with files.locked(home / ".lock", wait=False) as free:
                    homes += [] if free else [home]
        return homes

    def _homes(self, kind: str | None) -> list[Path]:
        return sorted(path for path in self.root.glob(f"{kind or '*'}/*") if path.is_dir() and len(path.name) == 64)

    @staticmethod
    def _attempts(home: Path) -> list[Path]:
        return [path for path in list_attempts(home) if (path / MANIFEST).is_file()]

    def directories(self, kind: str | None = None) -> Iterator[Path]:
        """Yield the directory of every complete attempt, by kind, fingerprint and attempt."""
        for home in self._homes(kind):
            yield from self._attempts(home)

    def list(self, kind: str | None = None) -> Iterator[Artifact]:
        """Yield every complete attempt, by kind, fingerprint and attempt; a damaged manifest is logged, not listed."""
        for directory in self.directories(kind):
            try:
                yield as_kind(directory, read_manifest(directory))
            except UserError as error:
                log.warning("%s", error)


def list_attempts(home: Path, suffix: str = "") -> list[Path]:
    """Return the paths in a directory <kind>/<fingerprint> that are named as attempts, with a suffix, in their order.

    What people or other programs put there (`old.work`, macOS's `._0001.work`) is left alone.
    """
    named = [path for path in home.glob(f"*{suffix}") if ATTEMPT.fullmatch(path.name.removesuffix(suffix))]
    return sorted(named, key=lambda path: int(path.stem))


def _journal(attempt: Path) -> Path:
    """Return the path of the journal beside an attempt or its work; it is removed when the rename is safe on disk."""
    return attempt.with_suffix(".jsonl")
