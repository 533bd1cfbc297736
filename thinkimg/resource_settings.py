"""Settings of the resources: machines and speed; recorded, never fingerprinted."""

import os
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from thinkimg.devices import overlap, select_gpus
from thinkimg.engine.settings import EngineConfig, TeacherEndpoint
from thinkimg.redaction import without_password
from thinkimg.settings import FilePath, Positive, Settings
from thinkimg.trainer.settings import TrainerConfig


class ResourcesConfig(Settings):
    """Machines and speed: recorded, never fingerprinted."""

    store: FilePath = "artifacts"
    """Root of the artifact store."""
    keep_policies: Annotated[int, Field(ge=2)] | None = None
    """Trained policies of a loop that keep their files: so many of the last, and the most accurate one. Manifests of
    older ones stay, so that the loop goes on; they can no longer be served. What another loop went on from stays, as
    does the warm start. null: all."""
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
        if self.trainer.keep and not (self.engine.keep or self.engine.urls or self.apart):
            raise ValueError(
                "where.engine.keep=false needs where.trainer.keep=false: "
                "an engine that left the memory does not fit back beside a trainer that stays"
            )
        return self

    @property
    def takes_turns(self) -> bool:
        """True where the memory may not hold all at a time: engine, teacher and trainer."""
        return not (self.engine.keep and self.trainer.keep)

    @property
    def exclusive(self) -> bool:
        """True where engine and trainer take turns in the memory."""
        return self.takes_turns and not self.apart

    @property
    def turns(self) -> frozenset[str]:
        """Names of those that take turns in a memory: engine and teacher, and the trainer unless it is apart."""
        if not self.takes_turns:
            return frozenset()
        return frozenset({"engine", "teacher"} if self.apart else {"engine", "teacher", "trainer"})

    @property
    def apart(self) -> bool:
        """True where no server of the loop is on a GPU of the trainer."""
        return not any(self.share_device("trainer", server) for server in ("engine", "teacher"))

    def share_device(self, *names: Literal["engine", "teacher", "trainer"]) -> bool:
        """Tell whether two of the loop's processes are on a common GPU; on a CPU all share its memory.

        Those without `devices` are on the first ones.
        """
        engine = self.engine.devices or tuple(range(self.engine.tensor_parallel_size))
        trainer = self.trainer.devices or tuple(range(self.trainer.processes // self.trainer.nodes))
        places = {"engine": engine, "teacher": self.teacher.devices or engine[:1], "trainer": trainer}
        return overlap(*(places[name] for name in names))

    def check_devices(self) -> None:
        """Raise UserError where settings name a GPU that is not there."""
        for name in ("engine", "teacher", "trainer"):
            select_gpus(f"where.{name}.devices", getattr(self, name).devices, os.environ)

    def public(self) -> dict[str, Any]:
        """Return the settings as JSON, without the passwords in URIs."""
        tree = self.model_dump(mode="json")
        tree["teacher"]["url"] = tree["teacher"]["url"] and without_password(tree["teacher"]["url"])
        tree["engine"]["urls"] = [without_password(url) for url in tree["engine"]["urls"]]
        return tree
