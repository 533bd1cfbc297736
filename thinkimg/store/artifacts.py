"""The content-addressed store: what a stage made, under the fingerprint of all that defines it.

artifacts/<kind>/<fingerprint>/.lock         one process at a time works on a fingerprint
                               0001/         an attempt, complete: it has its name and a manifest.json
                               0002.work/    the next attempt in progress, in closed parts
                               0002.jsonl    its journal, the closed parts with their hashes; goes after the rename
                               0001.dropped  a mark: `gc` has removed the files of 0001, all but its manifest
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.store.kinds import open_artifact, typed
from thinkimg.store.manifest import (
    DROPPED,
    MANIFEST,
    TRIMMED,
    Artifact,
    Recipe,
    Reference,
    canonical,
    content_digest,
    directory_digest,
    file_entry,
    fingerprint,
    git_revision,
    host_facts,
    is_intact,
    is_trimmed,
    now,
    number,
    package_versions,
    read_manifest,
    sealed,
)
from thinkimg.store.tables import write_table

__all__ = [
    "Artifact",
    "Problem",
    "Recipe",
    "Reference",
    "Store",
    "Work",
    "directory_digest",
    "fingerprint",
    "package_versions",
]

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
ATTEMPT = re.compile(r"\d{4,}")


@dataclass(frozen=True)
class Problem:
    """One file of an artifact that is not as its manifest says."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


class Work:
    """An attempt in progress: parts that are closed one by one, and survive whatever happens to the next.

    A stage asks `has(name)` and skips what an earlier run has closed. `metrics` and `where` (URLs, devices, paths) are
    plain dictionaries that it fills; they go into the manifest.
    """

    def __init__(
        self,
        home: Path,
        kind: str,
        recipe: Recipe,
        seed: int | None,
        where: Mapping[str, Any],
        *,
        anew: bool = False,
    ):
        """anew: what an earlier run has left of the attempt is removed, not gone on with."""
        self.kind, self.recipe, self.seed = kind, recipe, seed
        self.metrics: dict[str, Any] = {}
        self.where: dict[str, Any] = dict(where)
        self._home, self._started = home, now()
        self._parts: dict[str, list[dict[str, Any]]] = {}
        left = [int(path.stem) for path in home.glob("*.work")]
        taken = [int(path.name) for path in home.iterdir() if ATTEMPT.fullmatch(path.name)]
        self.attempt = f"{max(left) if left else 1 + max(taken, default=0):04}"
        self.directory = home / f"{self.attempt}.work"
        self._journal = _journal(self.directory)
        if anew:
            files.remove(self._journal)
        self._recover()

    def has(self, name: str) -> bool:
        """Whether the part is closed."""
        return name in self._parts

    def path(self, name: str) -> Path:
        """Path of a closed part."""
        assert self.has(name), f"{name} is not closed"
        return self.directory / name

    @contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """Yield a path to write one file or one directory at; when the block ends it is the closed part `name`."""
        assert NAME.fullmatch(name) and name != MANIFEST and not self.has(name), f"{name} is no name for a new part"
        assert self.directory.is_dir(), "published work takes no more parts"
        path = self.directory / name
        with files.replacing(path) as temporary:
            yield temporary
        inside = [f"{name}/{child}" for child in files.files_under(path)] if path.is_dir() else [name]
        entries = [file_entry(self.directory, child, files.sha256(self.directory / child)) for child in inside]
        files.append(self._journal, canonical({"part": name, "files": entries}))
        self._parts[name] = entries

    def directory_part(self, name: str, write: Callable[[Path], object]) -> None:
        """Close a part that is a directory, filled by `write(directory)`, such as a model's `save_pretrained`."""
        with self.part(name) as path:
            path.mkdir()
            write(path)

    def table(self, name: str, table: pa.Table) -> None:
        """Close a Parquet part; equal tables give equal bytes, however they are chunked."""
        with self.part(name) as path:
            write_table(path, table)

    def json(self, name: str, value: Any) -> None:
        self.text(name, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")

    def text(self, name: str, text: str) -> None:
        with self.part(name) as path:
            path.write_bytes(text.encode())

    def discard(self, name: str) -> None:
        """Remove a part that an earlier run has closed, so that it can be made again; nothing there is fine."""
        if self._parts.pop(name, None) is not None:
            self._write_journal()  # first: a part that is not in the journal is removed by whoever recovers
            files.remove(self.directory / name)

    def publish(self) -> Artifact:
        """Write the manifest, sync everything and rename: from here on the attempt is an artifact."""
        entries = sorted((entry for part in self._parts.values() for entry in part), key=lambda entry: entry["name"])
        on_disk = [name for name in files.files_under(self.directory) if name != MANIFEST]
        assert on_disk == [entry["name"] for entry in entries], f"not only closed parts: {on_disk}"
        recipe = asdict(self.recipe)
        body = {
            "kind": self.kind,
            "fingerprint": self.recipe.fingerprint,
            "attempt": self.attempt,
            "digest": content_digest(entries),
            "recipe": recipe,
            "seed": self.seed,
            "files": entries,
            "metrics": {name: number(value) for name, value in self.metrics.items()},
            "where": self.where,
            "host": host_facts(),
            "git": git_revision(),
            "started": self._started,
            "finished": now(),
        }
        files.write(self.directory / MANIFEST, sealed(body))
        files.sync_tree(self.directory)
        final = self._home / self.attempt
        files.rename(self.directory, final)
        files.remove(self._journal)
        return open_artifact(final)

    def _recover(self) -> None:
        """Keep the parts of a killed run whose bytes are those in the journal; remove everything else."""
        files.make_directory(self.directory)
        files.remove(self.directory.with_suffix(TRIMMED))
        files.remove(self.directory.with_suffix(DROPPED))  # of an attempt of this number that gc has removed since
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
            log.info("%s: %d parts of an earlier run are reused", self.directory, len(self._parts))

    def _write_journal(self) -> None:
        lines = [canonical({"part": name, "files": entries}) + "\n" for name, entries in self._parts.items()]
        files.write(self._journal, "".join(lines))


class Store:
    """The artifacts under one root. Reading takes no lock and writes nothing."""

    def __init__(self, root: Path | str):
        self.root = Path(root)

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        """The newest complete attempt; UserError if that has been changed since."""
        attempts = self._attempts(self.root / kind / fingerprint)
        if not attempts:
            return None
        artifact = open_artifact(attempts[-1])
        if (artifact.kind, artifact.fingerprint) != (kind, fingerprint):
            raise UserError(f"{artifact.directory} holds {artifact.reference}", hint="move it back to its place")
        return artifact

    @contextmanager
    def create(
        self,
        kind: str,
        recipe: Recipe,
        *,
        seed: int | None = None,
        where: Mapping[str, Any] | None = None,
        force: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[Artifact | Work]:
        """Yield the artifact if there is one already, else the work on a new attempt, alone on this fingerprint.

        A second process waits here (and calls `waiting` meanwhile), and then finds what the first has made. What a dead one has left is taken over, but
        not with `force`: that makes everything anew.
        """
        assert NAME.fullmatch(kind), kind
        home = self.root / kind / recipe.fingerprint
        done = None if force else self.find(kind, recipe.fingerprint)
        if done and not _journal(done.directory).exists():
            yield done
            return
        files.make_directory(home)
        for parent in (home.parent, self.root):
            files.sync(parent)  # a killed run may have made them and not come this far
        with files.locked(home / ".lock", waiting=waiting):
            done = None if force else self.find(kind, recipe.fingerprint)
            if done and _journal(done.directory).exists():
                files.sync(home)  # killed between its rename and this
                files.remove(_journal(done.directory))
            yield done or Work(home, kind, recipe, seed, where or {}, anew=force)

    def build(
        self,
        kind: str,
        recipe: Recipe,
        produce: Callable[[Work], object],
        *,
        seed: int | None = None,
        where: Mapping[str, Any] | None = None,
        force: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> tuple[Artifact, bool]:
        """Find the artifact or make it with `produce(work)`; returns it, and whether it was there (*Cached*)."""
        with self.create(kind, recipe, seed=seed, where=where, force=force, waiting=waiting) as found:
            if isinstance(found, Artifact):
                return found, True
            produce(found)
            return found.publish(), False

    def resolve(self, reference: str | Path | Reference, kind: str | None = None) -> Artifact:
        """The artifact meant by a path, `kind/fingerprint/attempt`, or the beginning of a fingerprint (newest attempt).

        Raises UserError, naming the candidates, where that is none, several, or not of the asked kind.
        """
        reference = str(reference)
        for place in (Path(reference), self.root / reference):
            attempts = [place] if (place / MANIFEST).is_file() else self._attempts(place)
            if reference and attempts:
                artifact = open_artifact(attempts[-1])
                if kind not in (None, artifact.kind):
                    raise UserError(f"{reference} is of kind {artifact.kind}, not {kind}")
                return artifact
        homes = [home for home in self._homes(kind) if self._attempts(home)]
        matches = [
            home
            for home in homes
            if reference and str(home.relative_to(self.root if "/" in reference else home.parent)).startswith(reference)
        ]
        if len(matches) == 1 and (newest := self.find(matches[0].parent.name, matches[0].name)) is not None:
            return newest
        names = [f"{home.parent.name}/{home.name[:12]}" for home in matches or homes]
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        what = "several artifacts begin" if len(matches) > 1 else f"no {kind or 'artifact'} under {self.root} begins"
        raise UserError(f"{what} with {reference!r}", hint=f"there are {listed}" if names else "there are none yet")

    def origin(self, artifact: Artifact, name: str) -> Artifact:
        """The input `name` that an artifact was made from. Raises UserError if there is none, or the store has it no more."""
        entry = artifact.manifest["recipe"]["inputs"].get(name)
        if entry is None:
            raise UserError(f"{artifact.reference} was not made from {name}.")
        return self.resolve(f"{entry['kind']}/{entry['fingerprint']}/{entry['attempt']}")

    def verify(self, artifact: Artifact | Path) -> list[Problem]:
        """Hash every file again, and the manifest itself; one problem for each that is missing, extra or different."""
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
            elif (found := files.sha256(path)) != entry["sha256"]:
                problems.append(Problem(name, f"has sha256 {found[:12]}…, not {entry['sha256'][:12]}…"))
        inputs = {name: Reference(**reference) for name, reference in manifest["recipe"]["inputs"].items()}
        if Recipe(**{**manifest["recipe"], "inputs": inputs}).fingerprint != manifest["fingerprint"]:
            problems.append(Problem(MANIFEST, "the fingerprint is not that of its recipe"))
        if content_digest(manifest["files"]) != manifest["digest"]:
            problems.append(Problem(MANIFEST, "the digest is not that of its files"))
        for name, reference in inputs.items():
            source = self.root / str(reference)
            stored = reference.attempt and (source / MANIFEST).is_file()
            if stored and read_manifest(source)["digest"] != reference.digest:
                problems.append(Problem(f"input {name}", f"{reference} is not what was used"))
        return problems

    def sweep(self, remove: bool = False) -> list[Path]:
        """What dead runs have left and nobody works on; the next run of the stage would take it over."""
        left = []
        for home in self._homes(None):
            found = sorted([*home.glob("*.work"), *home.glob("*.jsonl"), *home.glob(files.TEMPORARY + "*")])
            if not found:
                continue
            with files.locked(home / ".lock", wait=False) as free:
                if free:
                    left += found
                    for path in found if remove else ():
                        files.remove(path)
        return left

    def busy(self) -> list[Path]:
        """Homes (kind/fingerprint) on which a process works right now."""
        found = []
        for home in self._homes(None):
            if (home / ".lock").exists():
                with files.locked(home / ".lock", wait=False) as free:
                    found += [] if free else [home]
        return found

    def _homes(self, kind: str | None) -> list[Path]:
        return sorted(path for path in self.root.glob(f"{kind or '*'}/*") if path.is_dir() and len(path.name) == 64)

    @staticmethod
    def _attempts(home: Path) -> list[Path]:
        complete = [path for path in home.glob("*") if ATTEMPT.fullmatch(path.name) and (path / MANIFEST).is_file()]
        return sorted(complete, key=lambda path: int(path.name))

    def list(self, kind: str | None = None) -> Iterator[Artifact]:
        """Every complete attempt, by kind, fingerprint and attempt; a damaged manifest is logged, not listed."""
        for home in self._homes(kind):
            for directory in self._attempts(home):
                try:
                    yield typed(directory, read_manifest(directory))
                except UserError as error:
                    log.warning("%s", error)


def _journal(attempt: Path) -> Path:
    """The journal beside an attempt or its work; it goes last, when the rename is safe on disk."""
    return attempt.with_suffix(".jsonl")
