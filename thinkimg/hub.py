"""Commits of repositories of the Hugging Face Hub: a branch or a tag identifies no content, as it moves."""

import functools
import os

from thinkimg.errors import UserError, shorten


class Unknown(Exception):
    """Reason for which a commit can't be known; an exception, as functools.cache keeps results alone."""


def resolve_commit(repository: str, revision: str | None = None, kind: str = "model") -> str:
    """Return the commit as `find_commit` does. kind: "model" or "dataset". Raises Unknown from the library's error."""
    return _resolve(repository, revision, kind)


def find_commit(repository: str, revision: str | None = None) -> str | None:
    """Return the commit of a model's revision, by default of its main branch; None if it can't be known.

    A process keeps to the commit that it has found, and asks again while it has found none. Where the Hub can't be
    reached, its cache on this machine answers.
    """
    try:
        return _resolve(repository, revision)
    except Unknown:
        return None


def require_commit(repository: str, revision: str | None = None) -> str:
    """Return `find_commit`. Raises UserError if it can't be known."""
    try:
        return _resolve(repository, revision)
    except Unknown as reason:
        raise UserError(
            f"The commit of {repository} on the Hub can't be found: {reason}",
            hint="Check the id, the revision, and that the Hub can be reached; or set model.revision to a commit.",
        ) from None


def cached_commit(repository: str) -> str:
    """Return the commit of a model's main branch that this machine's cache has. Raises the library's own errors."""
    from huggingface_hub import HfApi

    return HfApi().resolve_revision(repository, local_files_only=True).resolved


@functools.cache
def _resolve(repository: str, revision: str | None, kind: str = "model") -> str:
    """Return the commit. Raises Unknown with the reason if there is none."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    api = HfApi()
    try:
        try:
            commit = api.resolve_revision(repository, repo_type=kind, revision=revision).resolved
        except RevisionNotFoundError:
            raise
        except HfHubHTTPError:  # such as a missing key: what is in the cache can be used all the same
            cached = api.resolve_revision(repository, repo_type=kind, revision=revision, local_files_only=True)
            commit = cached.resolved
    except Exception as error:  # the library's own, and those of its HTTP client
        raise Unknown(shorten(str(error))) from error
    if commit is None:
        raise Unknown("the Hub names none.")
    return commit
