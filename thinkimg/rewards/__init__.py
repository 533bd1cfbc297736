"""The rewards: every module of this package that does not begin with "_" is one component, named like its file.

Such a module defines NAME and `score(batch) -> list[Score]`: one for each trajectory, in order, pure, with values in
[0, 1]. One that judges processed images defines `identity` and `judge` besides (see _bench.Judge): what models find, by
content, from which `score` then only reads. A user's own functions join them by import path.
"""

import hashlib
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from thinkimg.errors import UserError
from thinkimg.rewards._base import Batch, Score, Status

if TYPE_CHECKING:
    from thinkimg.config import RewardsConfig
    from thinkimg.rewards._bench import Judge
    from thinkimg.rewards_config import ImageConfig

__all__ = ["COMPONENTS", "JUDGES", "Batch", "Component", "Score", "Status", "components", "sources"]

Component = Callable[[Batch], list[Score]]

RESERVED = ("trajectory_id", "sample_id", "group_id", "total", "image")
"""Names that mean something else wherever scores are stored or shown."""


def components(config: "RewardsConfig", image: "ImageConfig") -> dict[str, Component]:
    """All components by name: those of this package in alphabetical order (of the image rewards those of image.types),
    then the user's functions as configured.

    Raises UserError for a function that cannot be loaded or whose name is taken. Cheap: call it before a long run.
    """
    found = {name: score for name, score in COMPONENTS.items() if name not in JUDGES or name in image.types}
    for path in config.functions:
        function = _user_function(path)
        taken = [*COMPONENTS, *found, *RESERVED]
        if function.name in taken:
            raise UserError(
                f"The reward function {path} cannot be called '{function.name}': the name is taken.",
                hint=f"Rename it; taken are {', '.join(dict.fromkeys(taken))}.",
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


def _discover() -> dict[str, ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    for name, module in modules.items():
        assert name == module.NAME, f"the reward in {name}.py must be called {name}, not {module.NAME}"
    return modules


_MODULES = _discover()
COMPONENTS: dict[str, Component] = {name: module.score for name, module in _MODULES.items()}
"""The components of this package by name, in alphabetical order."""
JUDGES: "dict[str, Judge]" = {name: module for name, module in _MODULES.items() if hasattr(module, "judge")}
"""Those of them that judge processed images."""
