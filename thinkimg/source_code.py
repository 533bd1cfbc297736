"""Identity of a user's code: the files of a module and of all that it imports, however indirectly, of the user's own.

What is installed is left out, and so are Python's own modules and thinkimg. Nothing is run: imports are read from the
source, those inside functions included. Names that are made while it runs can't be seen, nor can files of data.
"""

import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

INSTALLED = ("site-packages", "dist-packages")
PARSE_ATTEMPTS = 20
IMPORTERS = ("import_module", "__import__")


def code_digest(*modules: ModuleType) -> str:
    """Return the sha256 of the modules and of all of the user's own that they import, "" where they have no files.

    Names and bytes count, and not the place. It is the hash of the file where there is but one.
    """
    digests = {spec.name: hashlib.sha256(data).hexdigest() for spec, data in _closure(modules)}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest() if digests else ""


def _closure(modules: tuple[ModuleType, ...]) -> Iterator[tuple[ModuleSpec, bytes]]:
    """Yield (spec, content) of the modules, and of what they import that is the user's own."""
    roots = {module.__name__: _spec_of(module) for module in modules}
    packages = {name.partition(".")[0] for name in roots}
    todo, seen = [spec for spec in roots.values() if spec is not None], set(roots)
    while todo:
        spec = todo.pop()
        data = _content(spec)
        if data is not None:
            yield spec, data
        for name in _names(spec, data or b""):
            # An import of a.b.c runs a and a.b, too. One that can't be found is left to the import itself.
            if name not in seen:
                seen.add(name)
                found = _find(name)
                if found is not None and _is_own(found, packages):
                    todo.append(found)


def _names(spec: ModuleSpec, data: bytes) -> Iterator[str]:
    """Yield the absolute names of modules that a module may import, and of the packages that they lie in."""
    names = [spec.name]
    for node in ast.walk(_parse(data)):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom():
                base = _absolute("." * node.level + (node.module or ""), spec)
                names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(str(text)), *_]):
                names += [_absolute(text, spec)] if called in IMPORTERS else []
    for name in names:
        parts = name.split(".")
        if all(part.isidentifier() for part in parts):
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _parse(data: bytes) -> ast.AST:
    """Return the syntax tree of a source, an empty one where there is none."""
    for attempt in range(PARSE_ATTEMPTS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its syntax: the import has said them
                return ast.parse(data)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # compiled, or broken
            break
        except SystemError:  # Python 3.11, where another thread parses, too (python/cpython#106905)
            if attempt == PARSE_ATTEMPTS - 1:
                raise
    return ast.Module([], [])


def _absolute(name: str, spec: ModuleSpec) -> str:
    """Return an absolute name for one that may begin with dots; "" where it leads out of the package."""
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    package = spec.name if spec.submodule_search_locations is not None else spec.parent or ""
    parts = package.split(".")
    kept = parts[: len(parts) - level + 1]
    return ".".join([*kept, name[level:]]).rstrip(".") if package and kept else ""


def _find(name: str) -> ModuleSpec | None:
    """Return the spec of a module, None if there is none; a loaded module's own, as this is the one that runs."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        return _spec_of(loaded)
    parent, _, _ = name.rpartition(".")
    path = None
    if parent:
        above = _find(parent)
        if above is None or above.submodule_search_locations is None:
            return None
        path = _locations(above)
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except Exception:  # a finder of a user's own may raise anything
            continue
        if spec is not None:
            return spec
    return None


def _spec_of(module: ModuleType) -> ModuleSpec | None:
    """Return the spec of a loaded module, made from its file where it has none."""
    spec, file = getattr(module, "__spec__", None), getattr(module, "__file__", None)
    if isinstance(spec, ModuleSpec) or not isinstance(file, str):
        return spec if isinstance(spec, ModuleSpec) else None
    return ModuleSpec(module.__name__, None, origin=file, is_package=hasattr(module, "__path__"))


def _locations(spec: ModuleSpec) -> list[str]:
    """Return the folders of a package; those of a namespace package as they were found, if its parent isn't loaded."""
    locations = spec.submodule_search_locations
    try:
        return list(locations or ())
    except KeyError:  # Python looks for the loaded parent
        return list(getattr(locations, "_path", ()))


def _content(spec: ModuleSpec) -> bytes | None:
    """Return the bytes of a module's file, None if it has none, as a namespace package or a builtin."""
    if not spec.origin:
        return None
    try:
        return Path(spec.origin).read_bytes()
    except OSError:
        try:
            return spec.loader.get_data(spec.origin)  # type: ignore[union-attr]  # in a zip
        except (OSError, AttributeError):
            return None


def _is_own(spec: ModuleSpec, packages: set[str]) -> bool:
    """Return True for a user's own module: one that is not installed, or that is of one of these packages."""
    name = spec.name.partition(".")[0]
    if name == __name__.partition(".")[0] or name in sys.stdlib_module_names:
        return False
    if name in packages:
        return True
    places = [spec.origin] if spec.origin else _locations(spec)
    return not any(_is_installed(Path(place)) for place in places)


def _is_installed(path: Path) -> bool:
    """Return True for a path among the installed packages or Python's own modules."""
    own = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return any(part in INSTALLED for part in path.parts) or any(path.is_relative_to(place) for place in own)
