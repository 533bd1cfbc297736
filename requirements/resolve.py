"""Makes and checks the pinned closures: `python requirements/resolve.py NAME [--check]`, with pip 26 or newer.

NAME: cpu, gpu, test, evaluators, inspect, verifiers. A closure is what pip resolves for this project's own
requirements, one `name==version` a line. `--check` resolves the file itself: pip refuses pins that contradict each
other's metadata, and whatever it would add is missing. Nothing is installed.
"""

import datetime
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = {
    # They exist as CUDA builds only and stop `import transformers` beside a CPU torch.
    "cpu": {"torchaudio", "torchcodec"},
    "gpu": set(),
    "test": {"torchaudio", "torchcodec"},
    "evaluators": {"torchaudio", "torchcodec"},
    "inspect": {"torchaudio", "torchcodec"},
    "verifiers": {"torchaudio", "torchcodec"},
}
BESIDE_CPU: dict[str, set[str]] = {
    "test": set(),
    "evaluators": {"filelock", "protobuf"},
    "inspect": {"fsspec"},
    "verifiers": {"mcp", "mcp-types", "openai"},
}
"""Closures that are installed beside cpu.txt -> its packages of which they hold another version."""
HEADERS = {
    "cpu": "Everything that thinkimg needs on a machine without a GPU (Linux, x86-64, Python 3.11), as one "
    "resolve gave it.\n"
    "# Without torchaudio and torchcodec: they exist as CUDA builds only and stop `import transformers` beside a "
    "CPU torch.",
    "gpu": "Everything that thinkimg needs on a machine with NVIDIA GPUs (Linux, x86-64, Python 3.11), as one "
    "resolve gave it.\n"
    "# Resolved, but not run: no GPU machine on which it could be installed was to be had.",
    "test": "What the tests need beside cpu.txt or gpu.txt.",
    "evaluators": "What lmms-eval needs beside cpu.txt, in an environment over .venv (extra.sh): it wants older "
    "versions of filelock and protobuf.",
    "inspect": "What `thinkimg view` needs beside cpu.txt, in an environment over .venv (extra.sh): Inspect wants an "
    "older fsspec.",
    "verifiers": "What thinkimg_env needs beside cpu.txt, in an environment over .venv (extra.sh): verifiers wants "
    "older\n# versions of mcp and openai.",
}


def main() -> int:
    name = sys.argv[1]
    path = HERE / f"{name}.txt"
    if "--check" in sys.argv:
        beside = pins(HERE / "cpu.txt") if name in BESIDE_CPU else {}
        return check(name, beside | pins(path))
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    if name in BESIDE_CPU:
        cpu = {key: pin for key, pin in pins(HERE / "cpu.txt").items() if key not in BESIDE_CPU[name]}
        wanted = [f"{key}=={version}" for key, version in cpu.items()] + extras[name]
        resolved = {key: version for key, version in resolve(wanted).items() if key not in cpu}
    else:
        resolved = resolve([*project["dependencies"], *extras[name]])
    resolved = {key: version for key, version in resolved.items() if key not in LEFT_OUT[name]}
    lines = "".join(f"{key}=={version}\n" for key, version in sorted(resolved.items()))
    path.write_text(f"# {HEADERS[name]}\n# Resolved on {datetime.date.today()} by resolve.py.\n{lines}")
    return 0


def check(name: str, pinned: dict[str, str]) -> int:
    """Print what is wrong with a closure; 0 if nothing is."""
    resolved = resolve([f"{key}=={version}" for key, version in pinned.items()])
    missing = sorted(set(resolved) - set(pinned) - LEFT_OUT[name])
    for key in missing:
        print(f"{name}.txt lacks {key} (pip would take {resolved[key]})")
    return 1 if missing else 0


def resolve(requirements: list[str]) -> dict[str, str]:
    """Name -> version of all that pip would install into an empty environment.

    Exits with pip's words where it can't.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder, "wanted.txt"), Path(folder, "report.json")
        wanted.write_text("\n".join(requirements))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        if subprocess.run([*pip, "--report", str(report), "-r", str(wanted)]).returncode:
            sys.exit(1)
        installed = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return {canonical(entry["name"]): entry["version"] for entry in installed}


def pins(path: Path) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return {canonical(key): version for key, _, version in (line.partition("==") for line in lines if line)}


def canonical(name: str) -> str:
    """As PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
