"""The hook mends what CUDA builds break beside a CPU torch, and nothing else; shown with stand-ins for the packages."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY

REQUIREMENTS = REPOSITORY / "requirements"

TORCH = """
class version: cuda = {cuda!r}
class ops:
    class torchvision: pass
class library:
    def define(name, signature): declared.append(name)
declared = []
"""
OPERATORS = """
before = "torch" in sys.modules
import torchvision
import torch
print(json.dumps([before, torch.declared]))
"""
AUDIO = """
from importlib.util import find_spec
print(json.dumps([name for name in ("torchaudio", "torchcodec") if find_spec(name) is not None]))
"""


def run(site: Path, program: str):
    """What a program prints as JSON in a Python that has nothing but the hook and the packages in `site`."""
    for suffix in (".py", ".pth"):
        shutil.copy(REQUIREMENTS / f"cpu_torch_hook{suffix}", site / f"_thinkimg_cpu_torch_hook{suffix}")
    start = "import json, site, sys\nsite.addsitedir(sys.argv[1])\n"
    argv = [sys.executable, "-I", "-S", "-c", start + program, str(site)]
    return json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


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
    assert run(tmp_path, OPERATORS) == [False, declared]


@pytest.mark.parametrize(
    ("torch", "audio", "found"),
    [
        ("2.13.0+cpu", "2.11.0", []),
        ("2.13.0+cpu", "2.11.0+cpu", ["torchaudio", "torchcodec"]),
        ("2.13.0", "2.11.0", ["torchaudio", "torchcodec"]),
        ("2.13.0+cu130", "2.11.0", ["torchaudio", "torchcodec"]),
        (None, "2.11.0", ["torchaudio", "torchcodec"]),
        ("2.13.0+cpu", None, []),
    ],
)
def test_audio_packages_of_another_build_are_not_found(tmp_path, torch, audio, found):
    for name, version in (("torch", torch), ("torchaudio", audio), ("torchcodec", audio)):
        if version is not None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise OSError('could not load this library')")
            (tmp_path / f"{name}-{version}.dist-info").mkdir()
            (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    assert run(tmp_path, AUDIO) == found
