"""The hook declares torchvision's operators where they are missing on a CPU torch, and nowhere else; shown with stand-ins."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[1] / "requirements"

TORCH = """
class version: cuda = {cuda!r}
class ops:
    class torchvision: pass
class library:
    def define(name, signature): declared.append(name)
declared = []
"""
PROGRAM = """
import json, site, sys
site.addsitedir(sys.argv[1])
before = "torch" in sys.modules
import torchvision
import torch
print(json.dumps([before, torch.declared]))
"""


@pytest.mark.parametrize(
    ("cuda", "has_ops", "declared"),
    [
        (None, False, ["torchvision::nms", "torchvision::qnms"]),
        (None, True, []),  # a CPU torchvision
        ("13.0", False, []),  # a GPU machine with a broken torchvision: not ours to hide
        ("13.0", True, []),
    ],
)
def test_operators_are_declared_only_where_missing(tmp_path, cuda, has_ops, declared):
    (tmp_path / "torch.py").write_text(TORCH.format(cuda=cuda))
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("from . import extension")
    (tmp_path / "torchvision" / "extension.py").write_text(f"def _has_ops(): return {has_ops}")
    for suffix in (".py", ".pth"):
        shutil.copy(REQUIREMENTS / f"torchvision_hook{suffix}", tmp_path / f"_thinkimg_torchvision_hook{suffix}")
    argv = [sys.executable, "-I", "-S", "-c", PROGRAM, str(tmp_path)]
    told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == [False, declared]
