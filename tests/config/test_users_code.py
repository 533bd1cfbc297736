"""A user's code is its module and all of its own that it imports: whatever changes there changes the fingerprint."""

import importlib
import os
import shutil
import subprocess
import sys
import textwrap
import types
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkimg.conversation.protocol import PROTOCOLS
from thinkimg.data.settings import SOURCES
from thinkimg.grpo.settings import LOSSES
from thinkimg.images.toolbox import TOOLS
from thinkimg.rewards.settings import JUDGES, RULES
from thinkimg.source_code import code_digest

REGISTRIES = {registry.kind: registry for registry in (TOOLS, RULES, JUDGES, SOURCES, LOSSES, PROTOCOLS)}
IMPORTS = [
    "import {name}",
    "import {name} as other",
    "from {name} import VALUE",
    "from {name} import *",
    "from {package} import {last}",
    "def late():\n    from {name} import VALUE\n    return VALUE",
    "try:\n    import {name}\nexcept ImportError:\n    pass",
    "import importlib\ndef late(): return importlib.import_module('{name}')",
    "from importlib import import_module\nother = lambda: import_module('{name}').VALUE",
    "def late(): return __import__('{name}')",
    "class A:\n    def b(self):\n        import {name}, json, no_such_module_anywhere",
]
RELATIVE = ["from .{last} import VALUE", "from . import {last}", "from . import {last} as x", "from .{last} import *"]
NAMES = ["{0}_a", "{0}_b", "{0}_pack", "{0}_pack.c", "{0}_pack.d", "{0}_pack.deep", "{0}_pack.deep.e", "{0}_space.f",
         "{0}_space.g", "{0}_space.more.h"]  # fmt: skip


def path_of(name: str, prefix: str) -> Path:
    own = name.removeprefix(prefix)
    path = Path(*name.split("."))
    return path / "__init__.py" if own in ("_pack", "_pack.deep") else path.with_suffix(".py")


@st.composite
def projects(draw):
    """(edges, a form of import for each edge) over NAMES; circles are as good as trees."""
    count = len(NAMES)
    edges = draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=14))
    return {edge: draw(st.integers(0, 99)) for edge in sorted(edges)}


def write_project(folder: Path, prefix: str, edges: dict, changed: int | None = None):
    names = [name.format(prefix) for name in NAMES]
    for number, name in enumerate(names):
        lines = [f"VALUE = {number if number != changed else -1}"]
        for (source, target), form in edges.items():
            if source != number:
                continue
            package, _, last = names[target].rpartition(".")
            forms = [text for text in IMPORTS if package or "{package}" not in text]
            here = name if path_of(name, prefix).name == "__init__.py" else name.rpartition(".")[0]
            if package and here == package:
                forms = forms + RELATIVE * 3
            lines.append(forms[form % len(forms)].format(name=names[target], package=package, last=last))
        path = folder / path_of(name, prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def reachable(edges: dict) -> set[int]:
    """Modules that importing the first one may import; with each come the packages around it."""
    found, todo = set(), [0]
    while todo:
        number = todo.pop()
        if number in found:
            continue
        found.add(number)
        todo += [target for source, target in edges if source == number]
        todo += [other for other, name in enumerate(NAMES) if NAMES[number].startswith(f"{name}.")]
    return found


def digest_at(folder: Path, name: str) -> str:
    """The digest of a module that is not run, found as Python would find it there."""
    module = types.ModuleType(name)
    module.__file__ = str(folder / f"{name}.py")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return code_digest(module)
    finally:
        sys.path.remove(str(folder))


@settings(max_examples=60)
@given(projects(), st.integers(0, len(NAMES) - 1))
def test_a_change_counts_if_the_module_can_reach_it_and_the_place_never_does(tmp_path_factory, edges, changed):
    root = tmp_path_factory.mktemp("p")
    prefix = f"own{root.name.replace('-', '_')}"
    digests = []
    for place, change in (("one", None), ("a/nother place", None), ("one", changed)):
        shutil.rmtree(root / place, ignore_errors=True)
        write_project(root / place, prefix, edges, change)
        digests.append(digest_at(root / place, f"{prefix}_a"))
    assert digests[0] == digests[1]
    assert (digests[0] != digests[2]) == (changed in reachable(edges))


@pytest.mark.parametrize("form", [*IMPORTS, *RELATIVE])
def test_every_form_of_import_is_followed(tmp_path, form):
    prefix = f"form{tmp_path.name.rpartition('followed')[2].strip('_')}"
    (tmp_path / f"{prefix}_pack").mkdir()
    (tmp_path / f"{prefix}_a.py").write_text(f"import {prefix}_pack.c")
    (tmp_path / f"{prefix}_pack/c.py").write_text(
        form.format(name=f"{prefix}_pack.d", package=f"{prefix}_pack", last="d")
    )
    digests = []
    for value in (1, 2):
        (tmp_path / f"{prefix}_pack/d.py").write_text(f"VALUE = {value}")
        digests.append(digest_at(tmp_path, f"{prefix}_a"))
    assert digests[0] != digests[1]


HIDDEN = {
    "a star and __all__": ("from {p} import *", '__all__ = ["h"]'),
    "a star and a longer __all__": ("from {p} import *", '__all__: list = []\n__all__ += ("h",)\n__all__.append("x")'),
    "a keyword": ("import importlib\nimportlib.import_module(name='{p}.h')", ""),
    "a package": ("import importlib\nimportlib.import_module('.h', '{p}')", ""),
    "a package by keyword": ("import importlib\nimportlib.import_module('.h', package='{p}')", ""),
    "another name": ("from importlib import import_module as im\nim('{p}.h')", ""),
    "a list": ("__import__('{p}', fromlist=['h'])", ""),
    "a list at its place": ("__import__('{p}', globals(), locals(), ('h',), 0)", ""),
    "its own name": ("import {p}", "from importlib import import_module\nimport_module('.h', __name__)"),
    "a level": ("import {p}", "__import__('h', globals(), None, ['x'], 1)"),
    "a lazy package": ("from {p} import x", "PARTS = {{'x': '.h'}}\ndef __getattr__(name): return get(PARTS[name])"),
    "a lazy loader": ("from {p} import x", "import lazy\nget, _, __all__ = lazy.attach(__name__, {{'h': ['x']}})"),
}


@pytest.mark.parametrize("form", HIDDEN)
def test_imports_that_the_text_shows_are_followed(tmp_path, form):
    package = f"hidden{list(HIDDEN).index(form)}"
    (tmp_path / package).mkdir()
    user, init = (text.format(p=package) for text in HIDDEN[form])
    (tmp_path / f"{package}_user.py").write_text(user)
    (tmp_path / package / "__init__.py").write_text(init)
    digests = []
    for value in (1, 2):
        (tmp_path / package / "h.py").write_text(f"VALUE = {value}")
        digests.append(digest_at(tmp_path, f"{package}_user"))
    (tmp_path / package / "other.py").write_text("")
    assert digests[0] != digests[1] == digest_at(tmp_path, f"{package}_user")


def run_sources(folder: Path, program: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


FUNCTION = "from thinkimg.rewards.settings import RewardsConfig; print(RewardsConfig(functions=('{}',)).sources())"


def test_a_changed_helper_of_a_reward_function_is_another_source(tmp_path):
    (tmp_path / "my_reward.py").write_text(
        "from my_helper import value\ndef mine(completions, **columns): return [value] * len(completions)\n"
    )
    seen = []
    for value in ("0.0", "1.0", "0.0"):
        (tmp_path / "my_helper.py").write_text(f"value = {value}\n")
        seen.append(run_sources(tmp_path, FUNCTION.format("my_reward:mine")))
    assert seen[0] == seen[2] != seen[1]


def test_what_a_package_hands_on_and_what_wraps_it_count(tmp_path):
    """The function is named by one module, defined in a second, wrapped by a third."""
    files = {
        "own/__init__.py": "from own.inner import mine\n",
        "own/inner.py": "from wrap import around\n@around\ndef mine(completions, **columns): return [1]\n",
        "wrap.py": "from functools import wraps\ndef around(f):\n    return wraps(f)(lambda *a, **k: f(*a, **k))\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    seen = [run_sources(tmp_path, FUNCTION.format("own:mine"))]
    for name, text in files.items():
        (tmp_path / name).write_text(text + "# changed\n")
        seen.append(run_sources(tmp_path, FUNCTION.format("own:mine")))
    assert len(set(seen)) == 4


def test_an_installed_package_counts_for_its_own_function_alone(tmp_path):
    """Of what is installed the function's own package counts: its version may stay as it is."""
    site, project = tmp_path / "site-packages", tmp_path / "project"
    for folder in (site / "mine", site / "theirs", project):
        folder.mkdir(parents=True)
    (site / "mine/__init__.py").write_text("")
    (site / "mine/rewards.py").write_text("import theirs\nfrom mine.part import a\ndef f(completions, **c): return a\n")
    (project / "local.py").write_text("import theirs\ndef f(completions, **columns): return []\n")

    def sources(name: str) -> str:
        program = f"import sys; sys.path.append({str(site)!r}); " + FUNCTION.format(name)
        return run_sources(project, program)

    seen = {}
    for part, other in ((1, 1), (2, 1), (2, 2)):
        (site / "mine/part.py").write_text(f"a = [{part}]")
        (site / "theirs/__init__.py").write_text(f"b = {other}")
        seen[part, other] = (sources("mine.rewards:f"), sources("local:f"))
    assert seen[1, 1][0] != seen[2, 1][0] == seen[2, 2][0]
    assert seen[1, 1][1] == seen[2, 1][1] == seen[2, 2][1]


@pytest.mark.parametrize("kind", REGISTRIES)
def test_a_changed_helper_counts_at_every_extension_point(tmp_path, kind):
    package = f"own_{kind}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "entry.py").write_text("def score(batch):\n    from .part import VALUE\n    return VALUE\n")
    program = textwrap.dedent(f"""
        from importlib import import_module
        from thinkimg.registry import Registry
        registry = Registry({kind!r}, {REGISTRIES[kind].package!r})
        print(registry.sources([{package + ".entry"!r}, registry.shipped[0]]))
    """)
    seen = []
    for value in (0, 1, 0):
        (tmp_path / package / "part.py").write_text(f"VALUE = {value}\n")
        seen.append(run_sources(tmp_path, program))
    assert (
        seen[0] == seen[2] != seen[1] and f"{package}.entry" in seen[0] and REGISTRIES[kind].shipped[0] not in seen[0]
    )


def test_one_that_imports_nothing_of_the_users_has_the_hash_of_its_file(tmp_path):
    import hashlib

    text = "import json, numpy.linalg, thinkimg.records, os.path as p\nfrom thinkimg.errors import UserError\n"
    (tmp_path / "alone_one.py").write_text(text)
    assert digest_at(tmp_path, "alone_one") == hashlib.sha256(text.encode()).hexdigest()


ODD = {
    "no Python": b"this is ( no Python",
    "nul": b"import odd_part\0",
    "latin-1": "# -*- coding: latin-1 -*-\n# \xfc\nimport odd_part\n".encode("latin-1"),
    "out of the package": b"from ..... import x\nfrom .. import y\nimport odd_part\n",
    "of no identifier": b"import importlib as i\ni.import_module('a-b.c')\ni.import_module('')\nimport odd_part\n",
    "itself": b"import odd_one, odd_part\nfrom odd_one import x\n",
    "nested deeply": b"x = " + b"(" * 150 + b"1" + b")" * 150 + b"\nimport odd_part\n",
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_module_stops_nothing(tmp_path, kind):
    (tmp_path / "odd_one.py").write_bytes(ODD[kind])
    digests = []
    for value in (1, 2):
        (tmp_path / "odd_part.py").write_text(f"a = {value}")
        digests.append(digest_at(tmp_path, "odd_one"))
    assert (digests[0] != digests[1]) == (kind not in ("no Python", "nul")) and all(digests)


def test_a_module_in_a_zip_counts(tmp_path):
    (tmp_path / "zip_user.py").write_text("import zip_part")
    digests = []
    for value in (1, 2):
        with zipfile.ZipFile(tmp_path / "parts.zip", "w") as archive:
            archive.writestr("zip_part.py", f"a = {value}")
        program = f"import sys; sys.path.append({str(tmp_path / 'parts.zip')!r}); import zip_user; "
        program += "from thinkimg.source_code import code_digest; print(code_digest(zip_user))"
        digests.append(run_sources(tmp_path, program))
    assert digests[0] != digests[1]


def test_a_finder_that_fails_is_passed_over(tmp_path, monkeypatch):
    class Broken:
        def find_spec(self, *_):
            raise RuntimeError("no")

    (tmp_path / "found_one.py").write_text("import found_part")
    (tmp_path / "found_part.py").write_text("a = 1")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    before = digest_at(tmp_path, "found_one")
    (tmp_path / "found_part.py").write_text("a = 2")
    assert digest_at(tmp_path, "found_one") != before
