"""Extension points: the entries of one kind by name, shipped with the package or a user's own."""

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from thinkimg.errors import UserError, shorten
from thinkimg.source_code import code_digest


@dataclass(frozen=True)
class Registry(Mapping[str, ModuleType]):
    """The modules of a package folder that holds nothing else, and a user's own modules.

    A user's module has an entry point of the group `thinkimg.<kind>`, whose name is the entry's, or goes by its import
    path: `registry["my_project.tools.magnify"]`. Iteration yields the shipped names and those of entry points, sorted,
    and imports no module.
    """

    kind: str
    """Plural noun, as in `tools`: last part of the entry points' group, and the word in error messages."""
    package: str
    """The folder, as in `thinkimg.images.tools`."""

    @functools.cached_property
    def shipped(self) -> tuple[str, ...]:
        """Names of the package's own entries, sorted."""
        spec = importlib.util.find_spec(self.package)
        assert spec is not None, self.package
        return tuple(sorted(module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)))

    @functools.cached_property
    def _installed(self) -> dict[str, str]:
        """Name -> module of each entry point. Raises UserError if two entries have the same name."""
        modules: dict[str, str] = {}
        for entry in entry_points(group=f"thinkimg.{self.kind}"):
            if entry.name in self.shipped or modules.setdefault(entry.name, entry.module) != entry.module:
                raise UserError(
                    f"The entry point '{entry.name}' of the group thinkimg.{self.kind} has a name that is taken.",
                    hint=f"Rename it in the package that has {entry.module}, or uninstall that package.",
                )
        return modules

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self.shipped, *self._installed}))

    def __len__(self) -> int:
        return len({*self.shipped, *self._installed})

    def __getitem__(self, name: str) -> ModuleType:
        """Return the entry's module. Raises UserError if there is none, or if a user's module can't be imported."""
        if name in self.shipped:
            return importlib.import_module(f"{self.package}.{name}")
        path = self._installed.get(name, name)
        try:
            if not all(part.isidentifier() for part in path.split(".")):
                raise ModuleNotFoundError(name=path)
            module = importlib.import_module(path)
        except (Exception, SystemExit) as error:  # a user's module may raise anything
            if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
                raise UserError(
                    f"There is no '{shorten(path)}' among the {self.kind}: no module {shorten(error.name or path)} can "
                    "be imported.",
                    hint=f"There are {', '.join(self)}. A module of your own goes by its import path, such as "
                    f"my_project.{self.kind}.mine, and has to be installed, or lie below the working directory.",
                ) from error
            cause = f"{type(error).__name__}: {shorten(str(error))}"
            raise UserError(f"The module {path} can't be imported: {cause}") from error
        source_digest(module)
        return module

    def member(self, name: str, attribute: str) -> Any:
        """Return an attribute of an entry's module. Raises UserError if there is no such entry or attribute."""
        module = self[name]
        if not hasattr(module, attribute):
            raise UserError(
                f"The module {module.__name__} is none of the {self.kind}: it defines no {attribute}.",
                hint=f"There are {', '.join(self)}.",
            )
        return getattr(module, attribute)

    def sources(self, names: Iterable[str]) -> dict[str, str]:
        """Return name -> `source_digest` for the user's own among `names`, for a stage's fingerprint."""
        return {name: source_digest(self[name]) for name in names if name not in self.shipped}


def allow_user_modules(in_command: bool = False) -> None:
    """Let a user's own modules be imported from the working directory, after all that is installed.

    Ahead of it a file such as random.py or flows.py would be imported in place of the real one.
    in_command: the process is a command of ours, so that `python -m` is not to put the directory first.
    Raises UserError if there is no working directory any more.
    """
    try:
        directory = os.getcwd()
    except OSError as error:
        raise UserError(f"The working directory can't be used: {error.strerror}.", hint="Change to another.") from None
    if in_command and sys.path[0] in ("", directory):
        del sys.path[0]
    if directory not in sys.path:
        sys.path.append(directory)


@functools.cache
def source_digest(module: ModuleType) -> str:
    """Return `code_digest` of a module at the first call, which is when the module is imported."""
    return code_digest(module)


def short_name(name: str) -> str:
    """Return the name of an entry for people: the last part of an import path."""
    return name.rpartition(".")[2]
