"""Settings of MLflow."""

from pydantic import Field

from thinkimg.settings import Settings


class TrackingConfig(Settings):
    """Recording of runs in MLflow."""

    enabled: bool = True
    """Write to MLflow."""
    uri: str | None = None
    """MLflow tracking URI; null: sqlite at <store>/mlflow.db."""
    traces: int = Field(8, ge=0)
    """Trajectories per iteration that are logged as traces with their images."""
