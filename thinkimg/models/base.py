"""The model that training starts from: a directory, a Hub id, or a tiny one that is made on the spot."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from thinkimg.errors import UserError
from thinkimg.models.settings import ModelConfig
from thinkimg.settings import Settings
from thinkimg.store.artifacts import Reference, directory_digest


class BaseSource(Settings):
    """Where the base model comes from."""

    path: str
    revision: str | None
    tiny: bool

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        return cls(path=model.path, revision=model.revision, tiny=model.tiny is not None)

    def reference(self) -> Reference:
        """A directory by its digest, a Hub model by its id and revision. UserError where `path` is neither."""
        path = Path(self.path)
        if path.is_dir():
            if not (path / "config.json").is_file():
                hint = "name a directory that save_pretrained wrote"
                raise UserError(f"{path} holds no model: there is no config.json", hint=hint)
            return Reference("base", directory_digest(path))
        if path.is_absolute() or self.path.count("/") != 1 or path.exists():
            hint = "name a directory that save_pretrained wrote, or a Hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
            raise UserError(f"there is no model directory {self.path}", hint=hint)
        return Reference("base", f"{self.path}@{self.revision or 'main'}")

    def entry(self) -> dict[str, str | None]:
        """As jobs and adapters name it (`Base`): never by a path, which may change."""
        if self.tiny:
            return {"name": "tiny", "revision": None, "directory": None}
        reference, path = self.reference(), Path(self.path)
        if path.is_dir():
            return {"name": f"model/{reference.digest}", "revision": None, "directory": str(path.resolve())}
        return {"name": self.path, "revision": self.revision, "directory": None}


@dataclass(frozen=True)
class Base:
    """A model from outside: `name` is a Hub id, or says what lies in `directory`."""

    name: str
    revision: str | None = None
    directory: str | None = None

    def checked(self, state: Mapping[str, Any]) -> Self:
        """Itself. Raises UserError where a policy with this state (state.json) was trained on another base."""
        recorded = state["base"]
        if (self.name, self.revision) != (recorded["name"], recorded["revision"]):
            raise UserError(f"The policy was trained on {recorded['name']}, not on {self.name}.")
        return self

    def locate(self) -> Path:
        """Its directory, downloaded if it has none. Raises UserError if it can't be had."""
        if self.directory is not None:
            if not Path(self.directory, "config.json").is_file():
                raise UserError(f"{self.directory} is no model: it has no config.json.")
            return Path(self.directory)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(self.name, revision=self.revision, ignore_patterns=["*.bin", "*.pth", "*.gguf"])
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            detail = " ".join(str(error).split())[:200]
            raise UserError(
                f"The base model {self.name} can't be loaded: {detail}",
                hint="Is it a Hub id, and is the Hub reachable?",
            ) from error
