"""Base model, from which training starts: a directory, a Hub id, or a tiny model that the warm start makes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from thinkimg.errors import UserError, shorten
from thinkimg.hub import find_commit, require_commit
from thinkimg.models.settings import ModelConfig
from thinkimg.settings import Settings
from thinkimg.store.kinds import Policy
from thinkimg.store.manifest import Reference, directory_digest


class BaseSource(Settings):
    """Origin of the base model, as the settings have it."""

    path: str
    revision: str | None
    tiny: bool

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        """Return the origin of the model of these settings."""
        return cls(path=model.path, revision=model.revision, tiny=model.tiny is not None)

    def reference(self) -> Reference:
        """Return the digest of a directory, or the id and commit of a Hub model, as an input of a stage.

        Where the commit can't be known, the revision stands for it: for a dry run, as `Base.locate` then refuses.
        Raises as `check_model`.
        """
        check_model(self.path)
        path = Path(self.path)
        if path.is_dir():
            return Reference("base", directory_digest(path))
        commit = find_commit(self.path, self.revision)
        return Reference("base", f"{self.path}@{commit or self.revision or 'main'}")

    def entry(self, policy: Policy | None = None) -> dict[str, str | None]:
        """Return the fields of `Base`, for jobs and adapters; the name is never a path, which may change.

        policy: one that is played or trained; its base counts where the settings name no other. Raises as
        `check_model`.
        """
        if self.tiny:
            return {"name": "tiny", "revision": None, "directory": None}
        path = Path(self.path)
        if path.is_dir():
            return {"name": f"model/{self.reference().digest}", "revision": None, "directory": str(path.resolve())}
        check_model(self.path)
        if policy is not None:
            name, revision = map(policy.json("policy/state.json")["base"].get, ("name", "revision"))
            if name == self.path and self._accepts(revision):
                return {"name": name, "revision": revision, "directory": None}
        return {
            "name": self.path,
            "revision": find_commit(self.path, self.revision) or self.revision,
            "directory": None,
        }

    def require(self) -> None:
        """Raise UserError if the model is one of the Hub whose commit can't be known."""
        if not self.tiny and not Path(self.path).is_dir():
            check_model(self.path)
            require_commit(self.path, self.revision)

    def _accepts(self, commit: str | None) -> bool:
        """Return True if a policy's commit is the one of the settings; an unknown one is not."""
        if self.revision is None or self.revision == commit:
            return True
        return commit is not None and find_commit(self.path, self.revision) == commit


def check_model(name: str) -> None:
    """Check that a name is a directory with a model, or has the form of a Hub id. Raises UserError otherwise."""
    path = Path(name)
    hint = "Name a directory that save_pretrained wrote, or a Hub id such as Qwen/Qwen2.5-VL-7B-Instruct."
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no model: there is no config.json.", hint=hint)
    elif path.is_absolute() or name.count("/") != 1 or path.exists():
        raise UserError(f"There is no model directory {name}.", hint=hint)


def locate_checkpoint(path: str) -> Path:
    """Return the directory of a checkpoint. Raises UserError where there is no model in it."""
    directory = Path(path)
    if not (directory / "config.json").is_file():
        hint = "Name a directory with config.json and model.safetensors."
        raise UserError(f"There is no checkpoint in {path}.", hint=hint)
    return directory


@dataclass(frozen=True)
class Base:
    """A base model: `name` is a Hub id, or identifies the content of `directory`."""

    name: str
    revision: str | None = None
    directory: str | None = None

    def checked(self, state: Mapping[str, Any]) -> Self:
        """Return itself. Raises UserError if a policy with this state (state.json) was trained on another base."""
        recorded = state["base"]
        if (self.name, self.revision) != (recorded["name"], recorded["revision"]):
            trained, own = ("@".join(filter(None, (base["name"], base["revision"]))) for base in (recorded, vars(self)))
            raise UserError(f"The policy was trained on {trained}, not on {own}.")
        return self

    def locate(self) -> Path:
        """Return its directory, after a download if it has none.

        Raises UserError if it can't be loaded, and where its commit can't be known.
        """
        if self.directory is not None:
            if not Path(self.directory, "config.json").is_file():
                raise UserError(f"{self.directory} holds no model: there is no config.json.")
            return Path(self.directory)
        commit = require_commit(self.name, self.revision)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.name, revision=commit, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            detail = shorten(str(error))
            raise UserError(
                f"The base model {self.name} can't be loaded: {detail}",
                hint="Check that it is a Hub id and that the Hub can be reached.",
            ) from error
