"""GPUs and cores of a machine: how settings name them, and how a child process is placed on them."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated

from pydantic import AfterValidator, Field

from thinkimg import closure
from thinkimg.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
UUID = re.compile(r"(GPU|MIG)-[\w/-]+")


def check_devices(devices: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the devices. Raises ValueError unless each is named once, all by number or all by UUID."""
    numbers = all(isinstance(device, int) and device >= 0 for device in devices)
    shown = f"[{', '.join(map(str, devices))}]"
    if not devices or not (numbers or all(UUID.fullmatch(str(device)) for device in devices)):
        raise ValueError(f"devices {shown} are no GPUs: name them all by number, from 0, or all by UUID (GPU-…, MIG-…)")
    if len(set(devices)) < len(devices):
        raise ValueError(f"devices {shown} name a GPU twice")
    return devices


Devices = Annotated[tuple[int | str, ...], AfterValidator(check_devices)]
"""GPUs by number, or by UUID as CUDA_VISIBLE_DEVICES takes them."""
OneDevice = Annotated[tuple[int | str], AfterValidator(check_devices)]
"""A single one of them."""
Cores = Annotated[str, Field(pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$")]
"""Cores as 1 or 0,2-3."""


def overlap(some: Sequence[int | str], others: Sequence[int | str]) -> bool:
    """Tell whether devices have one in common; numbers and UUIDs can't be compared, and count as if."""
    alike = {type(device) for device in [*some, *others]}
    return len(alike) > 1 or not set(some).isdisjoint(others)


def select_gpus(setting: str, devices: Sequence[int | str] | None, base: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that shows a child these GPUs and no others; {} for None.

    setting: that names them, for errors. base: the caller's environment. Numbers count the GPUs that the caller sees:
    0 is the first of its CUDA_VISIBLE_DEVICES. Raises UserError where there is no such GPU.
    """
    if devices is None:
        return {}
    if closure.on_cpu():
        raise UserError(
            f"{setting} names GPUs, and the installed packages are those for a CPU.",
            hint="Name cores by cpu_threads_bind, or install the others with `make setup CLOSURE=gpu`.",
        )
    shown = base.get(VISIBLE)
    if shown is None:
        listed = [str(number) for number in range(closure.visible_gpus())]
    else:
        listed = [] if shown in closure.HIDING else [name.strip() for name in shown.split(",")]
    if isinstance(devices[0], int):
        if (highest := max(map(int, devices))) >= len(listed):
            raise UserError(
                f"{setting} names GPU {highest}, and {len(listed)} are visible here, counted from 0.",
                hint=f"`nvidia-smi -L` lists them. Numbers count those of {VISIBLE}, where it is set.",
            )
        return {VISIBLE: ",".join(listed[int(device)] for device in devices)}
    return {VISIBLE: ",".join(map(str, devices))}


@contextmanager
def bound_to_cores(setting: str, cores: str | None) -> Iterator[None]:
    """Bind this thread to cores, and with it the processes that it starts; None binds nothing.

    setting: that names them, for errors. Raises UserError where this process may not use all of them.
    """
    if cores is None:
        yield
        return
    before, wanted = os.sched_getaffinity(0), parse_cores(cores)
    try:
        try:
            os.sched_setaffinity(0, wanted)
        except OSError:  # none of them is there
            usable = set()
        else:
            usable = os.sched_getaffinity(0)
        if usable != wanted:
            raise UserError(
                f"{setting} names the cores {cores}, and this process can't use all of them.",
                hint="`nproc --all` counts them, from 0; a container may have some of them only.",
            )
        yield
    finally:
        os.sched_setaffinity(0, before)


def parse_cores(text: str) -> set[int]:
    """Return the cores of a text such as 0,2-3."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
