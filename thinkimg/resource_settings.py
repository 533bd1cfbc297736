"""Settings of the resources: machines and speed; recorded, never fingerprinted."""

from typing import Any, Self

from pydantic import Field, model_validator

from thinkimg.engine.settings import EngineConfig, TeacherEndpoint
from thinkimg.redaction import without_password
from thinkimg.settings import FilePath, Positive, Settings
from thinkimg.trainer.settings import TrainerConfig


class ResourcesConfig(Settings):
    """Machines and speed: recorded, never fingerprinted."""

    store: FilePath = "artifacts"
    """Root of the artifact store."""
    engine: EngineConfig = EngineConfig()
    teacher: TeacherEndpoint = TeacherEndpoint()
    trainer: TrainerConfig = TrainerConfig()
    workers: Positive = 4
    """Threads for decoding images, image tools and scoring."""
    runner: str = Field("threads", pattern=r"^(threads|dask|(tcp|tls)://\S+)$")
    """Machines that compute scores: `threads` of this process, `dask` for processes of this machine, or the address of
    a Dask scheduler such as tcp://10.0.0.1:8786. Its workers must see the store under the same path.
    """

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.trainer.keep and not self.engine.keep and not self.engine.urls:
            raise ValueError(
                "where.engine.keep=false needs where.trainer.keep=false: "
                "an engine that left the memory does not fit back beside a trainer that stays"
            )
        return self

    def public(self) -> dict[str, Any]:
        """Return the settings as JSON, without the passwords in URIs."""
        tree = self.model_dump(mode="json")
        tree["teacher"]["url"] = tree["teacher"]["url"] and without_password(tree["teacher"]["url"])
        tree["engine"]["urls"] = [without_password(url) for url in tree["engine"]["urls"]]
        return tree
