"""Files of a data set of the Hub at one commit, in the library's own cache; the cache stands in for a Hub out of reach.

hub_tables ──► Snapshot.open ──► names, sizes, card ──► download(patterns)
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from thinkimg.console import format_size, note
from thinkimg.data.hub.card import MAX_CARD, Card, missing_shards, read_card
from thinkimg.disk import NO_SPACE, disk_number, free_space
from thinkimg.errors import UserError, shorten
from thinkimg.hub import Unknown, resolve_commit
from thinkimg.redaction import without_secrets

CARD = "README.md"
SPARE = 2**28
"""Bytes of the disk that a download leaves free."""


@dataclass(frozen=True)
class Snapshot:
    """Data set of the Hub at one commit. sizes: bytes of all files of the repository, by name."""

    id: str
    commit: str
    folder: Path
    """Directory of the files that are here."""
    sizes: Mapping[str, int]
    is_listed: bool
    """False where only the files that are here are known: the Hub is out of reach, and the cache has no list."""

    @classmethod
    def open(cls, id: str, revision: str | None) -> "Snapshot":
        """Return the data set at a revision, by default its main branch, with its card.

        Raises UserError, with one sentence and a hint, where it is missing, closed to the user, or out of reach.
        """
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import get_cached_repo_tree

        try:
            commit = resolve_commit(id, revision, "dataset")
        except Unknown as reason:
            raise explain(reason.__cause__ or reason, id, revision) from reason.__cause__
        folder = fetch(id, commit, [CARD, ".gitattributes"])
        try:
            entries = get_cached_repo_tree(id, repo_type="dataset", revision=commit)
        except Exception:  # there is no list: a cache that another program made, and no Hub
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            return cls(id, commit, folder, {name: (folder / name).stat().st_size for name in names}, False)
        sizes = {entry.path: entry.size or 0 for entry in entries if is_safe(entry.path)}
        return cls(id, commit, folder, sizes, True)

    @cached_property
    def card(self) -> Card:
        path = self.folder / CARD
        if not path.is_file():
            return Card()
        with path.open("rb") as file:
            return read_card(file.read(MAX_CARD).decode("utf-8", errors="replace"))

    def download(self, names: Collection[str], patterns: Collection[str] | None = None) -> Path:
        """Bring files here, and return their directory. patterns: those that fit the names alone, and fewer of them.

        What is here already is not fetched again, and what is here in part is gone on with. Raises UserError.
        """
        missing = [name for name in names if not (self.folder / name).is_file()]
        if not missing:
            return self.folder
        if self.is_listed:
            self._check_space(missing)
        return fetch(self.id, self.commit, list(patterns or map(escape, missing)), is_shown=True)

    def check_shards(self, names: Collection[str]) -> None:
        """Raise UserError where shards of tables are not known to be all here; a list of files says it by itself."""
        if not self.is_listed and (torn := missing_shards(names)):
            raise UserError(
                f"The cache holds only a part of {self.id}: {', '.join(torn[:3])}.",
                hint="Run this again where the Hub can be reached.",
            )

    def _check_space(self, names: Collection[str]) -> None:
        from huggingface_hub import constants

        size = sum(self.sizes[name] for name in names)
        cache = Path(constants.HF_HUB_CACHE)
        free = free_space(cache)
        if size > free - SPARE:
            raise UserError(
                f"{self.id} needs {format_size(size)}, and {format_size(free)} are free at {cache}.",
                hint="Free some space there, or set HF_HOME to another directory.",
            )
        note(f"Downloading {len(names)} files ({format_size(size)}) of {self.id} at {self.commit[:12]} to {cache}.")


def fetch(id: str, commit: str, patterns: Collection[str], *, is_shown: bool = False) -> Path:
    """Download the files of a commit that fit patterns, and return their directory. Raises UserError."""
    from huggingface_hub import snapshot_download

    try:
        with contextlib.nullcontext() if is_shown else _silence():
            return Path(snapshot_download(id, repo_type="dataset", revision=commit, allow_patterns=list(patterns)))
    except Exception as error:  # the library's own, those of its HTTP client, of Xet, and of the disk
        raise explain(error, id, commit) from error


def explain(error: BaseException, id: str, revision: str | None = None) -> UserError:
    """Return what went wrong at the Hub as one sentence, with a hint. The first reason that is known counts."""
    from huggingface_hub import constants, errors

    chain = list(_causes(error))
    if any(isinstance(one, errors.GatedRepoError) for one in chain):
        hint = f"Accept its terms at {constants.ENDPOINT}/datasets/{id}, and then log in: `hf auth login`."
        return UserError(f"{id} is open only to those who have accepted its terms.", hint=hint)
    if any(isinstance(one, errors.RevisionNotFoundError) for one in chain):
        return UserError(f"{id} has no revision {shorten(str(revision), 60)!a}.", hint="Correct data.revision.")
    if any(isinstance(one, errors.RepositoryNotFoundError) for one in chain):
        hint = "`thinkimg data ls` lists public ones by name; a private one needs `hf auth login`."
        return UserError(f"There is no data set {id} on the Hub that you may see, and no such folder here.", hint=hint)
    if any(disk_number(one) in NO_SPACE for one in chain):
        hint = "Free some space there, or set HF_HOME to another directory; what is here is kept."
        return UserError(f"{id} can't be stored in {constants.HF_HUB_CACHE}: the disk is full.", hint=hint)
    if any(type(one).__name__ == "ProxyError" for one in chain):
        hint = "Correct HTTPS_PROXY, or set NO_PROXY."
        return UserError(f"{id} can't be loaded: the proxy refuses the connection to {constants.ENDPOINT}.", hint=hint)
    detail = without_secrets(shorten(str(chain[0])))
    if any(isinstance(one, errors.LocalEntryNotFoundError) for one in chain):
        detail = "the Hub can't be reached, and the cache lacks what is read."
    if isinstance(chain[0], errors.LocalEntryNotFoundError | errors.HfHubHTTPError | OSError) or _is_unreachable(chain):
        hint = "Run this again where the Hub can be reached: what is here is kept, and the rest is fetched."
    else:
        hint = "Correct data.path and data.revision."
    return UserError(f"{id} can't be loaded: {detail}", hint=hint)


def _is_unreachable(chain: Collection[BaseException]) -> bool:
    return any(type(one).__module__.startswith(("httpx", "httpcore")) for one in chain)


def escape(name: str) -> str:
    """Return the pattern that fits a file's name; the sign between patterns, of data.files, is any sign there."""
    return "".join(f"[{sign}]" if sign in "*?[" else "?" if sign == "|" else sign for sign in name)


def is_safe(name: str) -> bool:
    """Tell whether a name of a repository's list stays inside of it."""
    return not name.startswith("/") and ".." not in name.split("/") and "\\" not in name and name.isprintable()


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        cause = todo.pop(0)
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            todo += [cause.__cause__, cause.__context__]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Show no progress of a download that is too small to be spoken of."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
