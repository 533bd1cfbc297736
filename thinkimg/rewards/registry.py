"""The components of a reward by name: those of rules/ and judges/, and a user's own functions."""

import hashlib
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from thinkimg.errors import UserError
from thinkimg.rewards import judges, rules
from thinkimg.rewards.batch import Batch, Score

if TYPE_CHECKING:
    from thinkimg.config import RewardsConfig
    from thinkimg.rewards.context import Judge
    from thinkimg.rewards.settings import ImageConfig

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
    from thinkimg.rewards.functions import load

    return load(path)


def _discover() -> dict[str, ModuleType]:
    modules = {}
    for package in (judges, rules):
        for found in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{found.name}")
            assert found.name == module.NAME, f"the reward in {found.name}.py must be called so, not {module.NAME}"
            modules[found.name] = module
    return dict(sorted(modules.items()))


_MODULES = _discover()
COMPONENTS: dict[str, Component] = {name: module.score for name, module in _MODULES.items()}
"""The components of this package by name, in alphabetical order."""
JUDGES: "dict[str, Judge]" = {name: module for name, module in _MODULES.items() if hasattr(module, "judge")}
"""Those of them that judge processed images."""
