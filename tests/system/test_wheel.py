"""The wheel, installed outside the clone: it holds all that a run needs."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from paths import REPOSITORY

SMALL = [
    "iterations=1", "data.train=8", "data.held_out=4", "warmstart.steps=2", "warmstart.pairs=8", "rollout.samples=2",
    "rollout.group_size=2", "evaluate.samples=2", "evaluate.samples_ends=2", "evaluate.k=1", "image.types=[]",
    "mix={answer: 1.0}",
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(REPOSITORY)], check=True, capture_output=True
    )
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def outside(wheel, tmp_path_factory):
    """Runs `thinkimg` from the wheel in an empty folder, and returns what it printed.

    The environment is new and holds the wheel alone; the packages that it needs are those of this environment, which
    comes without its editable thinkimg and without its torchvision hook, as `.pth` files count in site-packages only.
    """
    home = tmp_path_factory.mktemp("outside")
    venv.create(home / "env", with_pip=False)
    python = home / "env" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home / "env")}))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = home / "empty"
    folder.mkdir()
    env = {"PATH": os.defpath, "HOME": str(home), "OMP_NUM_THREADS": "1"}

    def run(*argv: str, program: str = "thinkimg") -> str:
        argv = [str(home / "env" / "bin" / program), *argv]
        done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = folder
    return run


def test_it_holds_the_packages_with_their_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    command = ["git", "ls-files", "-co", "--exclude-standard", "thinkimg", "flows"]
    tracked = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    expected = {name for name in tracked.stdout.split() if (REPOSITORY / name).is_file()}
    assert len(expected) > 100 and expected <= names
    hook = {"_thinkimg_cpu_torch_hook.py", "_thinkimg_cpu_torch_hook.pth"}
    assert {name for name in names - expected if ".dist-info/" not in name} == hook


def test_it_runs_outside_of_the_clone(outside):
    where = outside("-c", "import thinkimg, flows; print(thinkimg.__file__, flows.__file__)", program="python")
    assert str(REPOSITORY) not in where and where.count(str(outside.folder.parent)) == 2
    accelerate = "where.trainer={processes: 2, accelerate_config: fsdp2}"
    assert "accelerate_config: fsdp2" in outside("run", "--preset", "tiny", "--dry-run", "--set", accelerate)
    outside("-c", "import torchvision, transformers; transformers.Qwen2VLImageProcessor", program="python")
    assert list(outside.folder.iterdir()) == []


@pytest.mark.long
def test_it_runs_an_iteration_in_an_empty_folder(outside):
    said = outside("run", "--preset", "tiny", *(word for one in SMALL for word in ("--set", one)))
    assert "accuracy" in said
    kinds = {path.name for path in (outside.folder / "artifacts").iterdir() if path.is_dir()}
    assert {"dataset", "rollouts", "scores", "policy", "evaluation"} <= kinds
