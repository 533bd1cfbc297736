"""The rewards: every module of this package that does not begin with "_" is one component, named like its file.

Such a module defines NAME and `score(batch) -> list[Score]`: one for each trajectory, in order, pure, with values in
[0, 1]. A user's own functions join them by import path.
"""

import hashlib
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from thinkimg.errors import UserError
from thinkimg.rewards._base import Batch, Score, Status

if TYPE_CHECKING:
    from thinkimg.config import RewardsConfig

__all__ = ["COMPONENTS", "Batch", "Component", "Score", "Status", "components", "sources"]

Component = Callable[[Batch], list[Score]]

RESERVED = ("trajectory_id", "sample_id", "group_id", "total")
"""Names that mean something else wherever scores are stored or shown."""


def components(config: "RewardsConfig") -> dict[str, Component]:
    """All components by name: those of this package in alphabetical order, then the user's functions as configured.

    Raises UserError for a function that cannot be loaded or whose name is taken. Cheap: call it before a long run.
    """
    found = dict(COMPONENTS)
    for path in config.functions:
        function = _user_function(path)
        if function.name in found or function.name in RESERVED:
            raise UserError(
                f"The reward function {path} cannot be called '{function.name}': the name is taken.",
                hint=f"Rename it; taken are {', '.join([*found, *RESERVED])}.",
            )
        found[function.name] = function.score
    return found


def sources(config: "RewardsConfig") -> dict[str, str]:
    """Import path of each user function -> sha256 of the file that defines it, for a stage's recipe.

    The whole file, so that a changed helper beside the function counts as well.
    """
    return {path: hashlib.sha256(_user_function(path).source).hexdigest() for path in config.functions}


def _user_function(path: str):
    from thinkimg.rewards._functions import load

    return load(path)


def _discover() -> dict[str, Component]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    for name, module in modules.items():
        assert name == module.NAME, f"the reward in {name}.py must be called {name}, not {module.NAME}"
    return {name: module.score for name, module in modules.items()}


COMPONENTS: dict[str, Component] = _discover()
"""The components of this package by name, in alphabetical order."""
