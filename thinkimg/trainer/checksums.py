"""Checksums of a loaded policy against the safetensors files that it was read from.

A process with zeros in place of weights trains on without an error, and so does a machine with other files. So several
processes compare each parameter's number of elements, sum and sum of squares with its file's after every load.

    loading.load_together ──> compute_expected(policy)         before sharding; the reading is spread over the processes
                          └─> shard, fill ──> verify(policy, expected)          sums are reduced over the shards
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from thinkimg.errors import UserError
from thinkimg.trainer.forward.fsdp import get_local, is_shard
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.weight_files import Source, list_floating, locate

CHUNK = 2**20  # elements that are widened to float64 at a time: 8 MiB
TOLERANCE = 1e-9  # relative; sums in another order differ by less than 1e-12, one row of zeros in 152,064 by some 1e-5


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


def compute_expected(policy: PolicyModel, ranks: Ranks) -> dict[str, Checksum]:
    """Return the checksum that each parameter has to have, by its name in the model below peft's wrappers.

    All processes call it, before layers are sharded. Each reads every n-th tensor, in the parameter's dtype.
    A new adapter is in no file: the first process's counts. Parameters in 4 bits are left out.
    Raises UserError in every process if a parameter is in no file.
    """
    parameters = list_floating(policy)
    new = {name for name in parameters if "lora_" in name and policy.adapter_file is None}

    def read() -> dict[str, Tensor]:
        located = locate(policy)
        own = sorted(located)[ranks.rank :: ranks.count]
        return {name: read_sums(located[name], parameters[name]) for name in own}

    from_files = ranks.merge(to_checksums(ranks.together(read)))
    of_new = to_checksums({name: compute_sums(parameters[name]) for name in new})
    return from_files | ranks.gather(of_new)[0]


def verify(policy: PolicyModel, references: Mapping[str, Checksum], ranks: Ranks) -> None:
    """Compare the parameters in memory with the result of `compute_expected`. All processes call it, after sharding.

    Raises UserError in every process if one's parameters are others.
    """
    actual = measure(list_floating(policy), ranks)
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
    values = {name: compute_sums(get_local(parameter)) for name, parameter in parameters.items()}
    parts = [name for name, parameter in parameters.items() if is_shard(parameter)]
    if parts:
        stacked = torch.stack([values[name] for name in parts])
        ranks.sum([stacked])
        values |= zip(parts, stacked, strict=True)
    return to_checksums(values)


def read_sums(source: Source, parameter: Tensor) -> Tensor:
    """Return the sums of a tensor in a file, in the parameter's dtype and on its device; meta: on the CPU."""
    with safe_open(source.path, framework="pt") as file:
        part = file.get_slice(source.key)
        rows = max(1, CHUNK // math.prod(part.get_shape()[1:]))  # never the whole tensor at once
        starts = range(0, part.get_shape()[0], rows)
        return torch.stack([compute_sums(part[start : start + rows], like=parameter) for start in starts]).sum(0)


def compute_sums(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return (3,) float64: number of elements, sum, sum of squares.

    like: first cast to its dtype, on its device. Summed in chunks of CHUNK elements.
    """
    like = tensor if like is None else like
    device = "cpu" if like.is_meta else like.device
    result = torch.zeros(3, dtype=torch.float64, device=device)
    for chunk in tensor.detach().reshape(-1).split(CHUNK):
        wide = chunk.to(device).to(like.dtype).double()
        result += torch.stack([result.new_tensor(wide.numel()), wide.sum(), wide @ wide])
    return result


def to_checksums(values: Mapping[str, Tensor]) -> dict[str, Checksum]:
    """Return `sums` as Checksums, by name."""
    return {name: Checksum(*value.tolist()) for name, value in values.items()}
