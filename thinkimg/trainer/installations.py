"""Comparison of the machines of a trainer: what they run, with which settings, and what they see of the store.

Another version computes other numbers, and a store that is not shared holds other files, or none.
"""

import hashlib
import os
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from thinkimg import __version__
from thinkimg.errors import UserError
from thinkimg.grpo.settings import LOSSES
from thinkimg.trainer.ranks import Ranks

PACKAGES = (
    "torch", "triton", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow", "flash-linear-attention",
)  # fmt: skip
LAUNCHER = ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "OMP_NUM_THREADS")  # by which a process is told its config
PACKAGE = Path(__file__).parents[1]


def compare_installations(ranks: Ranks) -> None:
    """Compare code, package versions and the launcher's settings with the first process's. All processes call it.

    Raises UserError in every process, with the first difference.
    """
    if ranks.count > 1:
        compare(ranks, describe_installation(), hint="Install the same commit on every machine, by `make setup`.")


def describe_installation() -> dict[str, str]:
    """Return a digest of this code, the versions of packages that define the output, and the launcher's settings."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    settings = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    versions = {package: find_version(package) for package in PACKAGES}
    return {"thinkimg's code": f"{__version__}, {digest.hexdigest()[:12]}"} | versions | settings


def find_version(package: str) -> str:
    """Return the version of an installed package, "none" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def compare_inputs(ranks: Ranks, job: Mapping) -> None:
    """Compare a job's input files, by name and size, and the user's loss with the first process's. All call it.

    The job itself, settings and all, is what the first process sent.

    Raises UserError in every process, with the first difference.
    """
    if ranks.count > 1:
        tables = (job.get("images") or {}).get("tables", [])
        policies = [(job.get(role) or {}).get("directory") for role in ("policy", "player")]
        directories = [*policies, job.get("reference"), job.get("rollouts"), *tables]
        files = {}
        for directory in filter(None, directories):  # of a base the weights are compared (checksums.py)
            paths = [path for path in Path(directory).rglob("*") if path.is_file()]
            files |= {str(path): f"{path.stat().st_size} bytes" for path in paths}
        hint = "Every machine has to see the store under the same path (where.store), and your own code likewise."
        compare(ranks, files | describe_loss(job), hint=hint)


def describe_loss(job: Mapping) -> dict[str, str]:
    """Return a digest of the code of a job's loss if it is the user's, or why there is none; {} for one of ours."""
    name = job.get("train", {}).get("loss", {}).get("loss_type")
    if name is None:
        return {}
    try:
        digests = LOSSES.sources([name])
    except UserError as error:
        return {f"the loss {name}": error.message}
    return {f"the loss {name}": digest[:12] for digest in digests.values()}


def compare(ranks: Ranks, facts: dict[str, str], hint: str) -> None:
    """Raise UserError in every process if one's facts differ from the first process's."""
    gathered = ranks.gather((socket.gethostname(), facts))
    _, expected = gathered[0]
    for rank, (host, actual) in enumerate(gathered):
        for name in sorted(expected.keys() | actual.keys()):
            if expected.get(name) != actual.get(name):
                raise UserError(
                    f"Process {rank} of the trainer, on {host}, has {name} {actual.get(name, 'not at all')}, and the "
                    f"first process {expected.get(name, 'not at all')}.",
                    hint=hint,
                )
