"""What import-linter cannot see.

Imports within functions, modules found by name, code in packages, patches, start-up.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache

from paths import REPOSITORY

LATE = {
    "torch": "two seconds", "transformers": "imports torch", "vllm": "four seconds, and not on every machine",
    "mlflow": "two seconds", "open_clip": "imports torch", "datasets": "a second", "scipy": "half a second",
    "openai": "a second", "peft": "imports torch", "safetensors.torch": "imports torch",
    "huggingface_hub": "a third of a second", "sympy": "half a second", "math_verify": "imports sympy",
    "inspect_ai": "an extra of its own",
    "prefect_dask": "an extra of its own", "sqlalchemy": "a quarter of a second, and with MLflow only",
}  # fmt: skip
"""Libraries that may be imported where they are used, and why."""
PATCHED = {"thinkimg.engine.serve": "vllm", "thinkimg.rewards.maths_worker": "sympy"}
"""Files that replace something in a library when a program of ours starts, and which library."""
NOT_FOR_HELP = {*LATE, "numpy", "PIL", "prefect", "pyarrow", "pydantic", "rich"} - {"safetensors.torch"}
LOOKED_UP = {("thinkimg.models", "thinkimg.families")}
"""(package, registry) of entries in a folder of their own above the base class by which they are looked up."""
CONTRACTS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
LAYERS = [set(layer.split(" | ")) for contract in CONTRACTS for layer in contract.get("layers", ())]


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name -> tree of each of our files."""
    files = [path for folder in ("thinkimg", "flows") for path in (REPOSITORY / folder).rglob("*.py")]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in files]
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in sorted(zip(names, files, strict=True))}


def imported(node: ast.AST) -> list[str]:
    """Dotted names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in modules() else str(node.module) for name in names]
    return []


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported; those of `if TYPE_CHECKING` don't."""
    todo = list(tree.body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.If):
            todo[:0] = [*([] if ast.unparse(node.test) == "TYPE_CHECKING" else node.body), *node.orelse]
        else:
            yield node


def late(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of what functions import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for inner in ast.walk(node):
                yield from ((inner.lineno, name) for name in imported(inner))


@cache
def is_heavy(name: str) -> bool:
    """Tell whether it is a library of LATE, or a module of ours that imports one when it is imported."""
    if name in modules():
        return any(is_heavy(other) for node in at_import(modules()[name]) for other in imported(node))
    return any(f"{name}.".startswith(f"{library}.") for library in LATE)


def test_functions_import_heavy_libraries_alone():
    """The command line starts everything, and imports it where it starts it."""
    wrong = {
        f"{module}:{line} imports {name}"
        for module, tree in modules().items()
        for line, name in late(tree)
        if not module.startswith("thinkimg.cli.") and not is_heavy(name)
    }
    assert not wrong


def test_packages_hold_no_code():
    packages = [path.parent for folder in ("thinkimg", "flows") for path in (REPOSITORY / folder).rglob("__init__.py")]
    wrong = []
    for package in packages:
        name = ".".join(package.relative_to(REPOSITORY).parts)
        docstring, *code = modules()[name].body
        assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant), name
        if code and name != "thinkimg":  # it has a version, and imports what users take from it late: docs/test_api.py
            wrong.append(name)
    assert len(packages) > 20 and not wrong


def test_nothing_is_handed_around_by_context_variables():
    names = {
        module
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == "ContextVar")
        or (isinstance(node, ast.Attribute) and node.attr == "ContextVar")
        or (isinstance(node, ast.alias) and node.name == "ContextVar")
    }
    assert not names


def patches(tree: ast.Module) -> Iterator[str]:
    """Yield the attributes of imported modules and classes that a module assigns."""
    bound = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in bound - {"sys"}:  # whose streams are everybody's
                yield ast.unparse(node)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "setattr"
            and ast.unparse(node.args[0]) in bound - {"sys"}
        ):
            yield ast.unparse(node)


def test_what_belongs_to_others_is_replaced_in_one_file_a_library():
    """And only where an assertion has looked at what is replaced."""
    replaced = {module: found for module, tree in modules().items() if (found := set(patches(tree)))}
    assert replaced.keys() == PATCHED.keys() and len(set(PATCHED.values())) == len(PATCHED), replaced
    for module in PATCHED:
        assert any(isinstance(node, ast.Assert) for node in ast.walk(modules()[module])), module


def layer(module: str) -> int | None:
    """The number of its layer from the top, None where the contract has none for it."""
    names = [".".join(module.split(".")[: i + 1]) for i in range(module.count(".") + 1)]
    return next((i for i, entries in enumerate(LAYERS) if entries & set(names)), None)


def test_every_module_has_a_layer():
    without = {name for name in modules() if layer(name) is None} - {"thinkimg"}
    assert len(LAYERS) > 20 and not without
    assert not [contract["name"] for contract in CONTRACTS if "ignore_imports" in contract]


def discovered(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of our modules that strings name: registries, `-m`, lazy commands, package data."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            match = re.match(r"(thinkimg|flows)(\.\w+)+|flows(?=\.$)", node.value)
            name = match[0] if match else ""
            while "." in name and name not in modules():
                name = name.rpartition(".")[0]
            if name in modules() and name != "thinkimg":
                yield node.lineno, name


def test_what_is_found_by_name_lies_below():
    """An entry of a registry, a program, a lazy command: each is an import that no tool sees."""
    below = {module: tree for module, tree in modules().items() if module != "thinkimg"}  # which is above all
    names = {(module, line, name) for module, tree in below.items() for line, name in discovered(tree)}
    targets = {name for _, _, name in names}
    kinds = {"thinkimg.images.tools", "thinkimg.rewards.judges", "thinkimg.grpo.losses", "thinkimg.data.sources"}
    assert targets >= kinds | {"thinkimg.trainer.worker", "thinkimg.engine.serve", "thinkimg.cli.artifacts", "flows"}
    upward = [
        f"{module}:{line} finds {name}"
        for module, line, name in names
        if layer(name) < layer(module) or (layer(name) == layer(module) and top(name) != top(module))
        if (top(module), name) not in LOOKED_UP
    ]
    assert not upward


def top(module: str) -> str:
    """The entry of the contract that a module belongs to: `thinkimg.rewards`, or `flows`."""
    return ".".join(module.split(".")[: 2 - module.startswith("flows")])


def test_prefect_is_imported_after_the_settings_that_it_reads():
    wrong = []
    for module, tree in modules().items():
        names = [name for node in at_import(tree) for name in imported(node)]
        prefects = [i for i, name in enumerate(names) if name.partition(".")[0] == "prefect"]
        if prefects and "flows._environment" not in names[: prefects[0]]:
            wrong.append(module)
    assert not wrong


def test_help_waits_for_nothing_heavy():
    """`thinkimg --help` answers in 0.3 s."""
    command = [sys.executable, "-X", "importtime", "-c", "import thinkimg.cli.main"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stderr
    names = {line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import time:")}
    assert "thinkimg.cli.main" in names
    assert not {name for name in names if name.partition(".")[0] in NOT_FOR_HELP}


IMPORTING = {"transformers", "peft", "open_clip"}
"""Libraries that import transformers, which no two threads may do at a time (importing.py)."""
ALONE = ("thinkimg.trainer.", "thinkimg.environments.", "thinkimg.engine.worker", "thinkimg.analysis.", "thinkimg.cli.")
"""Files that run in processes without stages in threads."""


@cache
def imports_transformers(name: str) -> bool:
    """Tell whether it is such a library, or a module of ours that imports one when it is imported."""
    if name in modules():
        return any(imports_transformers(other) for node in at_import(modules()[name]) for other in imported(node))
    return name.partition(".")[0] in IMPORTING


def unguarded(node: ast.AST, guarded: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of imports of transformers that are not within `with importing`."""
    guarded |= isinstance(node, ast.With) and any(ast.unparse(item) == "importing" for item in node.items)
    for child in ast.iter_child_nodes(node):
        yield from ((child.lineno, name) for name in imported(child) if not guarded and imports_transformers(name))
        yield from unguarded(child, guarded)


def test_where_stages_run_in_threads_one_imports_transformers_at_a_time():
    found = [
        f"{name}:{line} imports {other}"
        for name, tree in modules().items()
        if not name.startswith(ALONE)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for line, other in unguarded(function)
    ]
    assert found == [], "\n".join(found)
