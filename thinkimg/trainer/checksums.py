"""Checksums of a loaded policy against the safetensors files that it was read from.

A process with zeros in place of weights trains on without an error, and so does a machine with other files. So several
processes compare each parameter's number of elements, sum and sum of squares with its file's after every load.

    Worker._run ──> expected(policy)             before sharding; the reading is spread over the processes
                └─> fsdp.shard ──> verify(policy, expected)        sums are reduced over the shards
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.trainer.forward.fsdp import is_shard, local
from thinkimg.trainer.forward.logprobs import unwrap
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.ranks import Ranks

CHUNK = 2**24  # elements that are widened to float64 at a time: 128 MiB
TOLERANCE = 1e-9  # relative; sums in another order differ by less than 1e-12, one row of zeros in 152,064 by some 1e-5
ADAPTER_PREFIX = "base_model.model."


class Checksum(NamedTuple):
    """Number of a tensor's elements, their sum and the sum of their squares."""

    count: float
    total: float
    square: float

    def agrees(self, other: "Checksum") -> bool:
        """Return True if both may be of one tensor, summed in different orders. NaN agrees with nothing."""
        spread = (self.count * self.square) ** 0.5  # no sum of absolute values is larger
        return (
            self.count == other.count
            and abs(self.square - other.square) <= TOLERANCE * self.square
            and abs(self.total - other.total) <= TOLERANCE * spread
        )


class Source(NamedTuple):
    """Safetensors file that a parameter was read from, and the tensor's key in it."""

    path: Path
    key: str


def expected(policy: PolicyModel, ranks: Ranks) -> dict[str, Checksum]:
    """Return the checksum that each parameter has to have, by its name in the model below peft's wrappers.

    All processes call it, before layers are sharded. Each reads every n-th tensor, in the parameter's dtype.
    A new adapter is in no file: the first process's counts. Parameters in 4 bits are left out.
    Raises UserError in every process if a parameter is in no file.
    """
    parameters = floating(policy)
    new = {name for name in parameters if "lora_" in name and policy.adapter_file is None}

    def read() -> dict[str, Tensor]:
        located = locate(policy)
        own = sorted(located)[ranks.rank :: ranks.count]
        return {name: read_sums(located[name], parameters[name]) for name in own}

    from_files = ranks.merge(to_checksums(ranks.together(read)))
    of_new = to_checksums({name: sums(parameters[name]) for name in new})
    return from_files | ranks.gather(of_new)[0]


def verify(policy: PolicyModel, references: Mapping[str, Checksum], ranks: Ranks) -> None:
    """Compare the parameters in memory with `expected`'s result. All processes call it, after sharding.

    Raises UserError in every process if one's parameters are others.
    """
    actual = measure(floating(policy), ranks)
    wrong = [name for name, reference in references.items() if not reference.agrees(actual[name])]
    for rank, names in enumerate(ranks.gather(wrong)):
        if names:
            raise UserError(
                f"In process {rank} of the trainer {len(names)} of {len(references)} parameters differ from the files "
                f"in {policy.weights_directory}; the first is {names[0]}.",
                hint="Nothing was trained. See that every node has the same files, and that nothing writes to them.",
            )


def measure(parameters: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Checksum]:
    """Return the checksums of parameters in memory. All processes call it: sums of DTensors go over all of them."""
    values = {name: sums(local(parameter)) for name, parameter in parameters.items()}
    parts = [name for name, parameter in parameters.items() if is_shard(parameter)]
    if parts:
        stacked = torch.stack([values[name] for name in parts])
        ranks.sum([stacked])
        values |= zip(parts, stacked, strict=True)
    return to_checksums(values)


def floating(policy: PolicyModel) -> dict[str, Tensor]:
    """Return the parameters by name, each once; without those in 4 bits, which are held as integers."""
    return {name: p for name, p in unwrap(policy.model).named_parameters() if p.is_floating_point()}


def locate(policy: PolicyModel) -> dict[str, Source]:
    """Return the source of each parameter of `floating`, except a new adapter's.

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
    for source in tensors(list_weight_files(policy.weights_directory)):
        name, converter = rename_source_key(source.key, renamings, converters, model.base_model_prefix, names)
        if name not in names and source.key in names:  # as transformers: a name of today that looks like an old one
            name, converter = source.key, None
        if converter is None:  # else the tensor is but a piece of a parameter
            sources[name] = source
    if policy.adapter_file is not None:
        sources |= {source.key.removeprefix(ADAPTER_PREFIX): source for source in tensors([policy.adapter_file])}

    located, missing = {}, []
    for name, parameter in floating(policy).items():
        if "lora_" in name and policy.adapter_file is None:
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


def tensors(paths: Iterable[Path]) -> list[Source]:
    """Return all tensors in safetensors files."""
    sources = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            sources += [Source(path, key) for key in file.keys()]  # noqa: SIM118  it is no mapping
    return sources


def read_sums(source: Source, parameter: Tensor) -> Tensor:
    """Return the `sums` of a tensor in a file, in the parameter's dtype and on its device."""
    with safe_open(source.path, framework="pt") as file:
        return sums(file.get_tensor(source.key), like=parameter)


def sums(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return (3,) float64: number of elements, sum, sum of squares.

    like: first cast to its dtype, on its device. Summed in chunks of CHUNK elements.
    """
    like = tensor if like is None else like
    result = torch.zeros(3, dtype=torch.float64, device=like.device)
    for chunk in tensor.detach().reshape(-1).split(CHUNK):
        wide = chunk.to(like.device).to(like.dtype).double()
        result += torch.stack([result.new_tensor(wide.numel()), wide.sum(), wide @ wide])
    return result


def to_checksums(values: Mapping[str, Tensor]) -> dict[str, Checksum]:
    """Return `sums` as Checksums, by name."""
    return {name: Checksum(*value.tolist()) for name, value in values.items()}
