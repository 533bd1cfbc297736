"""A workflow pipeline that teaches a vision-language model to think with images."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_MODULES = {
    "Artifact": "thinkimg.store.manifest",
    "Config": "thinkimg.config.tree",
    "Dataset": "thinkimg.store.kinds",
    "Evaluation": "thinkimg.store.kinds",
    "Policy": "thinkimg.store.kinds",
    "Rollouts": "thinkimg.store.kinds",
    "Sample": "thinkimg.records",
    "Scores": "thinkimg.store.kinds",
    "Store": "thinkimg.store.artifacts",
    "Trajectory": "thinkimg.records",
    "Turn": "thinkimg.records",
    "UserError": "thinkimg.errors",
    "load_config": "thinkimg.config.load",
}
__all__ = list(_MODULES)  # docs/api.md; each is imported with its first use, for the command line answers at once


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'thinkimg' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
