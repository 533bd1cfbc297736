"""Identity of a user's code: the files of a module and of all that it imports, however indirectly, of the user's own.

What is installed is left out, and so are Python's own modules and thinkimg. Nothing is run: imports are read from the
source, those inside functions included. Names that are made while it runs can't be seen, nor can files of data. What
sys.modules holds after an import is no help, as it depends on what was imported before.
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
ARGUMENTS = {"import_module": ("name", "package"), "__import__": ("name", "globals", "locals", "fromlist", "level")}
LAZY = ("__getattr__", "attach")  # a package's own function, and lazy_loader's


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
                spec_of_name = _find(name)
                if spec_of_name is not None and _is_own(spec_of_name, packages):
                    todo.append(spec_of_name)


def _names(spec: ModuleSpec, data: bytes) -> Iterator[str]:
    """Yield the absolute names of modules that a module may import, and of the packages that they lie in."""
    names, tree = [spec.name], _parse(data)
    importers = {name: name for name in ARGUMENTS}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            importers |= {alias.asname: alias.name for alias in node.names if alias.asname and alias.name in ARGUMENTS}
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom():
                base = _absolute("." * node.level + (node.module or ""), _package_of(spec))
                names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
                if any(alias.name == "*" for alias in node.names):
                    names += [f"{base}.{name}" for name in _export_names(base)]
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called)) if called in importers:
                names += _call_names(node, importers[called], spec)
    if spec.submodule_search_locations is not None and _is_lazy(tree):
        names += [f"{spec.name}.{text.lstrip('.')}" for text in _texts(tree)]
    for name in names:
        parts = name.split(".")
        if all(part.isidentifier() for part in parts):
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _call_names(call: ast.Call, importer: str, spec: ModuleSpec) -> list[str]:
    """Return the names that a call of one of the ARGUMENTS imports, none where its name is no text."""
    arguments = dict(zip(ARGUMENTS[importer], call.args, strict=False))
    arguments |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    match arguments.get("name"), arguments.get("level"):
        case ast.Constant(str(text)), ast.Constant(int(level)):
            text = "." * level + text
        case ast.Constant(str(text)), _:
            pass
        case _:
            return []
    match arguments.get("package"):
        case ast.Constant(str(package)):
            pass
        case ast.Name("__name__"):
            package = spec.name
        case _:
            package = _package_of(spec)
    base = _absolute(text, package)
    return [base, *(f"{base}.{name}" for name in _texts(arguments.get("fromlist")))]


def _export_names(name: str) -> list[str]:
    """Return the texts of a module's `__all__`, among which a package may have submodules."""
    spec = _find(name) if all(part.isidentifier() for part in name.split(".")) else None
    texts: list[str] = []
    for node in ast.walk(_parse(spec and _content(spec) or b"")):
        match node:
            case ast.Assign(targets=[ast.Name("__all__")]) | ast.AugAssign(ast.Name("__all__")):
                texts += _texts(node.value)
            case ast.AnnAssign(ast.Name("__all__")):
                texts += _texts(node.value)
            case ast.Call(func=ast.Attribute(value=ast.Name("__all__"))):  # append, extend
                texts += _texts(node)
    return texts


def _is_lazy(tree: ast.AST) -> bool:
    """Return True for a package that imports its submodules when somebody asks for their names."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name) | ast.Call(func=ast.Name(name) | ast.Attribute(attr=name)) if name in LAZY:
                return True
    return False


def _texts(node: ast.AST | None) -> list[str]:
    """Return every text in a tree."""
    nodes = ast.walk(node) if node else ()
    return [part.value for part in nodes if isinstance(part, ast.Constant) and isinstance(part.value, str)]


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


def _package_of(spec: ModuleSpec) -> str:
    """Return the package from which a module's relative imports start."""
    return spec.name if spec.submodule_search_locations is not None else spec.parent or ""


def _absolute(name: str, package: str) -> str:
    """Return an absolute name for one that may begin with dots; "" where it leads out of the package."""
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
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
    # Python's finder needs a loaded parent for a namespace package within another one.
    folders = [str(Path(folder, name[len(parent) + 1 :])) for folder in path or ()]
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [folder for folder in folders if Path(folder).is_dir()]
    return spec if spec.submodule_search_locations else None


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
