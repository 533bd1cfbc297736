"""The model that training starts from: a directory, a Hub id, or a tiny one that is made on the spot."""

from pathlib import Path

from thinkimg.config import Config
from thinkimg.errors import UserError
from thinkimg.store.artifacts import Reference, directory_digest


def base_reference(config: Config) -> Reference:
    """A directory by its digest, a Hub model by its id and revision. UserError where `model.path` is neither."""
    path = Path(config.model.path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            hint = "name a directory that save_pretrained wrote"
            raise UserError(f"{path} holds no model: there is no config.json", hint=hint)
        return Reference("base", directory_digest(path))
    if path.is_absolute() or config.model.path.count("/") != 1 or path.exists():
        hint = "name a directory that save_pretrained wrote, or a Hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
        raise UserError(f"there is no model directory {config.model.path}", hint=hint)
    return Reference("base", f"{config.model.path}@{config.model.revision or 'main'}")


def base_entry(config: Config) -> dict[str, str | None]:
    """The base model as jobs and adapters name it (trainer.checkpoint.Base): never by a path, which may change."""
    if config.model.tiny is not None:
        return {"name": "tiny", "revision": None, "directory": None}
    reference, path = base_reference(config), Path(config.model.path)
    if path.is_dir():
        return {"name": f"model/{reference.digest}", "revision": None, "directory": str(path.resolve())}
    return {"name": config.model.path, "revision": config.model.revision, "directory": None}
