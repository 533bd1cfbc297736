"""Extension points: the entries of one kind by name, shipped with the package or a user's own."""

import functools
import hashlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from thinkimg.errors import UserError


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
        except Exception as error:  # a user's module may raise anything
            if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
                raise UserError(
                    f"There is no '{name}' among the {self.kind}.",
                    hint=f"There are {', '.join(self)}; a module of your own goes by its import path, such as "
                    f"my_project.{self.kind}.mine.",
                ) from error
            raise UserError(f"The module {path} can't be imported: {type(error).__name__}: {error}") from error
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
        """Return name -> sha256 of the module's file for the user's own among `names`, for a stage's fingerprint."""
        return {name: source_digest(self[name]) for name in names if name not in self.shipped}


@functools.cache
def source_digest(module: ModuleType) -> str:
    """Return the sha256 of a module's file at the first call, which is when the module is imported."""
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() if module.__file__ else ""


def short_name(name: str) -> str:
    """Return the name of an entry for people: the last part of an import path."""
    return name.rpartition(".")[2]
