"""Settings of MLflow."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from thinkimg.errors import UserError
from thinkimg.redaction import without_query
from thinkimg.settings import Name, Settings
from thinkimg.user_paths import expand_path

MEMORY = re.compile(r"sqlite[^/]*:/{0,3}(:memory:)?")
"""SQLite without a file."""


def check_uri(uri: str) -> str:
    """Return a tracking URI, with a path in it expanded. Raises UserError for one that SQL would cut, or lose."""
    if MEMORY.fullmatch(uri):
        raise UserError(
            f"{uri} names no file: what is tracked would be gone with the process.",
            hint="Write it as sqlite:////data/mlflow.db, or leave it out: then it is in the store.",
        )
    scheme, mark, path = uri.partition(":///")
    if not (mark and scheme.startswith("sqlite")):
        path = uri.removeprefix("file:")
        if not path.startswith("//") and "://" not in path:
            uri = uri.removesuffix(path) + expand_path(path)
        if not uri.isprintable() or " " in uri:
            raise UserError(f"{without_query(uri)!a} is no tracking URI.", hint="Write it as http://host:5000.")
        return uri
    if "?" in path:
        raise UserError(f"The path of {uri} has a '?', which ends it in a URI.", hint="Rename the folder or file.")
    return f"{scheme}:///{expand_path(path)}"


class TrackingConfig(Settings):
    """Recording of runs in MLflow."""

    enabled: bool = True
    """Write to MLflow."""
    uri: Annotated[Name, AfterValidator(check_uri)] | None = None
    """MLflow tracking URI; null: sqlite at <store>/mlflow.db."""
    traces: int = Field(8, ge=0)
    """Trajectories per iteration that are logged as traces with their images."""
