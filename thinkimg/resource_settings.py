"""Settings of the resources: on what machines, and how fast; recorded, never fingerprinted."""

from typing import Any

from pydantic import Field

from thinkimg.engine.settings import EngineConfig, TeacherEndpoint
from thinkimg.settings import Positive, Settings, without_password
from thinkimg.trainer.settings import TrainerConfig


class ResourcesConfig(Settings):
    """On what machines and how fast: recorded, never fingerprinted."""

    store: str = "artifacts"
    """Root of the artifact store."""
    engine: EngineConfig = EngineConfig()
    teacher: TeacherEndpoint = TeacherEndpoint()
    trainer: TrainerConfig = TrainerConfig()
    workers: Positive = 4
    """Threads for decoding images, image tools and scoring."""
    runner: str = Field("threads", pattern=r"^(threads|dask|(tcp|tls)://\S+)$")
    """Who scores: threads of this process, Dask with so many processes of this machine, or the Dask scheduler at an
    address such as tcp://10.0.0.1:8786, whose workers must see the store under the same path."""

    def public(self) -> dict[str, Any]:
        """As JSON for manifests and people: without the passwords in URIs."""
        tree = self.model_dump(mode="json")
        tree["teacher"]["url"] = tree["teacher"]["url"] and without_password(tree["teacher"]["url"])
        tree["engine"]["urls"] = [without_password(url) for url in tree["engine"]["urls"]]
        return tree
