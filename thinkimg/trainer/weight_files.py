"""Safetensors files of a policy: which holds which parameter, and each process's part of it.

checkpoint.load(device=meta) ──> fsdp.shard ──> fill: reads the rows of each parameter that this process holds
checksums ──> locate: compares what is in memory with what is in the files
"""

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.trainer.forward.fsdp import get_local, is_shard
from thinkimg.trainer.forward.modules import unwrap
from thinkimg.trainer.policy import PolicyModel

ADAPTER_PREFIX = "base_model.model."


class Source(NamedTuple):
    """Safetensors file that a parameter was read from, and the tensor's key in it."""

    path: Path
    key: str


def fill(policy: PolicyModel, names: Container[str] | None = None) -> None:
    """Copy from the files what this process holds of each parameter, and read no more. A new adapter is left alone.

    names: of the parameters that are copied; None: all.

    Raises UserError if a parameter is in no file, or has another shape there.
    """
    parameters = list_floating(policy)
    for name, source in locate(policy, names).items():
        parameter = parameters[name]
        with safe_open(source.path, framework="pt") as file, torch.no_grad():
            part = file.get_slice(source.key)
            if tuple(part.get_shape()) != tuple(parameter.shape):
                raise UserError(
                    f"{source.key} in {source.path} has the shape {part.get_shape()}, not {list(parameter.shape)}.",
                    hint="Are config.json and the weights of one model?",
                )
            first, rows = find_rows(parameter)
            get_local(parameter).copy_(part[first : first + rows] if parameter.dim() else part[:])


@contextmanager
def hold(policy: PolicyModel, directory: Path) -> Iterator[None]:
    """Hold the trained weights of another policy of the same kind within this context. All processes enter it.

    directory: of the other policy. Its own weights are kept in host memory meanwhile.
    """
    lora = policy.config.adaptation == "lora"
    parameters = {name: p for name, p in list_floating(policy).items() if not lora or "lora_" in name}
    own = {name: get_local(p).detach().to("cpu", copy=True) for name, p in parameters.items()}
    if lora:
        other = replace(policy, adapter_file=directory / "adapter" / "adapter_model.safetensors")
    else:
        other = replace(policy, weights_directory=directory / "model")
    try:
        fill(other, parameters)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                get_local(parameter).copy_(own[name])


def find_rows(parameter: Tensor) -> tuple[int, int]:
    """Return (first, number) of the rows of a parameter that this process holds."""
    if not is_shard(parameter):
        return 0, len(parameter) if parameter.dim() else 1
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], shape[0]


def list_floating(policy: PolicyModel) -> dict[str, Tensor]:
    """Return the parameters by name, each once; without those in 4 bits, which are held as integers."""
    return {name: p for name, p in unwrap(policy.model).named_parameters() if p.is_floating_point()}


def locate(policy: PolicyModel, wanted: Container[str] | None = None) -> dict[str, Source]:
    """Return the source of each parameter of `list_floating`, or of some of them, except a new adapter's.

    Keys are renamed as transformers does it when it loads. A tied parameter may be in the file by any of its names.
    Raises UserError if a parameter is in no file.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = unwrap(policy.model)
    aliases: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name.replace(".base_layer.", "."))
    names = {name: name for group in aliases.values() for name in group}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    sources: dict[str, Source] = {}
    for source in list_tensors(list_weight_files(policy.weights_directory)):
        name, converter = rename_source_key(source.key, renamings, converters, model.base_model_prefix, names)
        if name not in names and source.key in names:  # as transformers: a name of today that looks like an old one
            name, converter = source.key, None
        if converter is None:  # else the tensor is but a piece of a parameter
            sources[name] = source
    if policy.adapter_file is not None:
        sources |= {source.key.removeprefix(ADAPTER_PREFIX): source for source in list_tensors([policy.adapter_file])}

    located, missing = {}, []
    for name, parameter in list_floating(policy).items():
        if "lora_" in name and policy.adapter_file is None or wanted is not None and name not in wanted:
            continue
        keys = [alias.replace(".default.", ".") if "lora_" in alias else alias for alias in aliases[parameter]]
        source = next((sources[key] for key in keys if key in sources), None)
        if source is None:
            missing.append(name)
        else:
            located[name] = source
    if missing:
        raise UserError(
            f"{len(missing)} parameters of the model in {policy.weights_directory} are in none of its safetensors "
            f"files; the first is {missing[0]}.",
            hint="Several processes check what they have loaded: save the model as safetensors.",
        )
    return located


def list_weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files from which transformers loads the model in a directory, none if it has none."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import get_checkpoint_shard_files

    if (directory / SAFE_WEIGHTS_NAME).is_file():
        return [directory / SAFE_WEIGHTS_NAME]
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    return [Path(path) for path in get_checkpoint_shard_files(directory, str(index))[0]]


def list_tensors(paths: Iterable[Path]) -> list[Source]:
    """Return all tensors in safetensors files."""
    sources = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            sources += [Source(path, key) for key in file.keys()]  # noqa: SIM118  it is no mapping
    return sources
