"""What docs/api.md promises is what there is."""

import importlib.util
import inspect
import re
import subprocess
import sys

import pytest
from cyclopts import App
from paths import REPOSITORY

import thinkimg
from thinkimg import records
from thinkimg.cli.main import app
from thinkimg.conversation.protocol import PROTOCOLS
from thinkimg.data.settings import SCHEMAS, SOURCES
from thinkimg.grpo.settings import LOSSES
from thinkimg.images.toolbox import TOOLS
from thinkimg.models.settings import FAMILIES
from thinkimg.rewards.settings import JUDGES, RULES
from thinkimg.store.kinds import IDENTITY, KINDS

API = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
REGISTRIES = (TOOLS, LOSSES, SOURCES, SCHEMAS, PROTOCOLS, RULES, JUDGES, FAMILIES)
HEAVY = {"torch", "transformers", "vllm", "mlflow", "prefect", "numpy", "pyarrow", "pydantic", "PIL"}


def section(title: str) -> str:
    """The text below a headline of the second order."""
    return re.split(r"^## ", API.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def listed(text: str) -> list[str]:
    """What the first column of a table names in code style, without the heading."""
    return [name for row in re.findall(r"^\| (.+?) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)]


def verbs(app: App, path: str = "") -> list[str]:
    """The commands below one, with their groups' names."""
    found = []
    for name in app:
        if not name.startswith("-"):
            inner = verbs(app[name], f"{path}{name} ")
            found += inner or [f"{path}{name}"]
    return found


@pytest.mark.parametrize("name", thinkimg.__all__)
def test_a_public_name_is_there_and_says_what_it_is(name):
    value = getattr(thinkimg, name)
    assert inspect.getdoc(value) and name in dir(thinkimg)
    assert inspect.isclass(value) or inspect.isfunction(value)


def test_public_names_are_those_of_the_docs():
    assert sorted(thinkimg.__all__) == list(thinkimg.__all__) == listed(section("Python"))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        thinkimg.nonsense  # noqa: B018


def test_importing_it_imports_nothing_heavy():
    """And it hands out a name without what that name does not need."""
    code = "import sys, thinkimg; thinkimg.UserError; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code]
    names = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.split()
    assert "thinkimg" in names and not HEAVY & set(names)


def test_verbs_are_those_of_the_docs():
    assert sorted(listed(section("Commands"))) == sorted(verbs(app))


def test_modules_of_extension_points_are_there():
    text = section("Extension points")
    assert listed(text) == [registry.kind for registry in REGISTRIES]
    modules = re.findall(r"`(thinkimg(?:\.\w+)+)`", text)
    assert len(modules) >= len(REGISTRIES) and all(map(importlib.util.find_spec, modules))


def test_tables_are_those_of_the_docs():
    page = (REPOSITORY / "artifacts" / "README.md").read_text(encoding="utf-8")
    rows = {name: set(re.findall(r"`(\w+)`", row)) for name, row in re.findall(r"^\| `(\w+)`.*?\|(.*)$", page, re.M)}
    trajectories, score = records.trajectory_schema(), records.score_schema(["answer"])
    columns = {
        "samples": records.sample_schema().names,
        "images": records.image_schema().names,
        "trajectories": trajectories.names,
        "turns": [field.name for field in trajectories.field("turns").type.value_type],
        "judgements": records.judgement_schema().names,
    }
    columns["scores"] = [*IDENTITY, *(field.name for field in score.field("answer").type)]
    assert KINDS.keys() <= rows.keys()
    assert {table: set(names) - rows[table] for table, names in columns.items()} == dict.fromkeys(columns, set())


def test_the_changelog_begins_with_this_version():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = [name for name in re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE) if name != "Unreleased"]
    assert versions[0] == thinkimg.__version__ and versions == sorted(versions, reverse=True)
