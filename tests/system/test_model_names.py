"""Nothing outside thinkimg/families asks for a model's name, or for the patch of one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import REPOSITORY

from thinkimg.images.settings import ImagesConfig, ViewLimits
from thinkimg.models.settings import ModelConfig, TinyModel
from thinkimg.rewards.judges import teacher

NAME = re.compile(r"qwen[-_./]?v?l?[-_.]?\d", re.IGNORECASE)
ALLOWED = {
    "thinkimg/models/settings.py": (TinyModel().family, ModelConfig().path),
    "thinkimg/models/base.py": (ModelConfig().path,),
    "thinkimg/models/tiny.py": ("Qwen2VLImageProcessor",),
    "thinkimg/rewards/judges/teacher.py": (teacher.Settings().model,),
}
"""File -> defaults of settings, an example in a hint, and the preprocessing that all families have."""
SIDES = (14, 28)
"""Pixels of a patch's and of a token's side in Qwen2.5-VL."""
OTHERS = {
    "thinkimg/data/hub/snapshot.py": "2**28 bytes",
    "thinkimg/data/survey/checks.py": "the smallest token of all families, for a warning about data for any of them",
    "thinkimg/images/metadata.py": "bytes of a JPEG's marker",
    "thinkimg/images/settings.py": "what manifests of earlier versions mean, and a number of pixels",
    "thinkimg/models/clip.py": "of a CLIP of our own",
    "thinkimg/puzzles/geometry.py": "what manifests of earlier versions mean",
    "thinkimg/records.py": "what version 1 of the tables means",
    "thinkimg/rewards/rules/tool.py": "squares by which two pictures are compared",
}
"""File -> what a 14 or a 28 is there."""
READERS = ("images/", "families/", "trainer/", "models/", "puzzles/geometry.py", "conversation/picture.py")
"""Parts of thinkimg that may read an image's grid; all else has the sizes that a trajectory stores."""


def trees() -> Iterator[tuple[str, ast.Module]]:
    """Yield (path, tree) of our files outside thinkimg/families."""
    files = [path for folder in ("thinkimg", "flows") for path in (REPOSITORY / folder).rglob("*.py")]
    for path in sorted(files):
        name = path.relative_to(REPOSITORY).as_posix()
        if not name.startswith("thinkimg/families/"):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the names and strings of a module, docstrings left out."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        for field in ("id", "attr", "name", "module", "asname", "arg"):
            if isinstance(text := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), text


def names(tree: ast.Module, allowed: tuple[str, ...] = ()) -> list[str]:
    """Return "line text" of where a module names a model."""
    found = []
    for line, text in words(tree):
        for name in allowed:
            text = text.replace(name, "")
        if NAME.search(text) or re.fullmatch(r"thinkimg\.families\.\w+", text):
            found.append(f"{line} {text[:60]}")
    return found


def sides(tree: ast.Module) -> list[int]:
    """Return the lines that have a side of Qwen2.5-VL's grid as a number."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in SIDES
    ]


def test_no_module_outside_the_families_names_a_model():
    assert {name: found for name, tree in trees() if (found := names(tree, ALLOWED.get(name, ())))} == {}
    assert {name for name, tree in trees() if names(tree)} == ALLOWED.keys(), "exceptions that none needs"


def test_a_side_of_one_familys_grid_is_written_where_it_is_no_models():
    assert {name for name, tree in trees() if sides(tree)} == OTHERS.keys()
    assert (ViewLimits.model_fields["patch"].default, ViewLimits.model_fields["merge"].default) == (14, 2)
    assert "patch" not in ImagesConfig.model_fields, "no setting of a user's"


def test_nobody_but_the_model_reads_a_grid():
    """A reader of a trajectory takes the size that is stored with each image."""
    attributes = {"patch", "merge", "token_side", "count_patches", "patch_values"}
    readers = {
        name.removeprefix("thinkimg/")
        for name, tree in trees()
        if any(isinstance(node, ast.Attribute) and node.attr in attributes for node in ast.walk(tree))
    }
    # The stages lay out puzzles on a model's grid, the forecast counts tokens, and the engine has a limit of pixels.
    also = {"stages/prepare.py", "analysis/forecast.py", "engine/server.py"}
    assert not {name for name in readers - also if not name.startswith(READERS)}
    assert not also - readers, "exceptions that none needs"


@pytest.mark.parametrize(
    "code",
    [
        'kind == "qwen2_5_vl"',
        'kind == "qwen3_vl"',
        'name.startswith("Qwen/Qwen3.5-")',
        "from transformers import Qwen3VLConfig",
        "from transformers import Qwen2_5_VLForConditionalGeneration as Model",
        "from thinkimg.families.qwen3_vl import FAMILY",
        "import thinkimg.families.mine",
        "model.qwen3_vl_layers",
        "def is_qwen25(model): pass",
        "load(family=1, qwen3=2)",
    ],
)
def test_each_way_to_name_a_model_is_seen(code):
    assert names(ast.parse(code))


@pytest.mark.parametrize("code", ['"""Say how Qwen3-VL works."""', "PROTOCOL = QwenXml()", 'form = "qwen_xml"'])
def test_what_names_no_model_is_not(code):
    assert not names(ast.parse(code))


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(REPOSITORY, "thinkimg/families").glob("[a-z]*.py")))
def test_a_family_is_found_by_its_model_type_alone(name):
    from thinkimg.models.family import find_family, load_family

    family = load_family(name)
    assert family.name == name and all(find_family(kind) is family for kind in family.model_types)
