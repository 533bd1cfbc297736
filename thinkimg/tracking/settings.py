"""Settings of MLflow."""

from typing import Annotated

from pydantic import AfterValidator, Field

from thinkimg.errors import UserError
from thinkimg.redaction import without_password
from thinkimg.settings import Name, Settings, expand_path


def check_uri(uri: str) -> str:
    """Return a tracking URI, the path of a database in a file expanded. Raises UserError for one that SQL would cut."""
    scheme, mark, path = uri.partition(":///")
    if not (mark and scheme.startswith("sqlite")):
        if not uri.isprintable() or " " in uri:
            raise UserError(f"{without_password(uri)!a} is no tracking URI.", hint="Write it as http://host:5000.")
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
