"""User's own reward functions by import path, with the identity of their code."""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkimg.errors import UserError, describe_error
from thinkimg.source_code import code_digest

FORM = "Write it as def name(completions, **columns) -> list[float]."


@dataclass(frozen=True)
class UserFunction:
    """Loaded reward function."""

    path: str
    name: str
    function: Callable[..., Any]
    digest: str
    """`code_digest` of the module that defines it, and of the one that names it."""


@functools.cache
def load_function(path: str) -> UserFunction:
    """Return the function at `package.module:function`. Raises UserError if it can't be used.

    Cached as the import is: a file that is changed later is neither run nor recorded by this process.
    """
    module_name, _, name = path.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"The reward '{path}' is no import path.", hint="Write it as package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        message = f"The module of the reward function {path} cannot be imported: {describe_error(error)}"
        raise UserError(message, hint="It must be installed, or its folder be on PYTHONPATH.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"There is no function '{name}' in {module_name}.")
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise UserError(f"The reward function {path} does not take all columns.", hint=FORM)
    try:
        Path(inspect.getsourcefile(inspect.unwrap(function)) or "").read_bytes()
    except (TypeError, OSError):
        raise UserError(f"The reward function {path} has no source that could be recorded.", hint=FORM) from None
    defining = inspect.getmodule(inspect.unwrap(function)) or module
    return UserFunction(path, name, function, code_digest(defining, module))
