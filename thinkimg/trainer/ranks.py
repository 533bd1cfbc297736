"""Processes of a trainer, and the collectives that its jobs need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from thinkimg.errors import UserError

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True)
class Ranks:
    """The processes of a job. Models are not wrapped: gradients are summed here, so uneven work is no trouble."""

    rank: int = 0
    count: int = 1

    def share(self, rows: Sequence[int], lengths: Sequence[int] | Mapping[int, int]) -> list[int]:
        """Return this process's share of rows, which index lengths: dealt by length, for about equal work."""
        return sorted(rows, key=lambda i: (lengths[i], i))[self.rank :: self.count]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors in place over the processes."""
        if self.count > 1:
            for work in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def merge(self, mapping: dict[K, T]) -> dict[K, T]:
        """Return the union of every process's mapping."""
        return {key: value for part in self.gather(mapping) for key, value in part.items()}

    def together(self, function: Callable[[], T]) -> T:
        """Call a function in every process; if it fails in one, it fails in all, so that none waits for another.

        Raises its own error here. Elsewhere a UserError is raised as it is, any other error as a RuntimeError.
        """
        result, error = None, None
        try:
            result = function()
        except Exception as caught:  # raised again below, in every process
            error = caught
        report = error if error is None or isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        failures = [failure for failure in self.gather(report) if failure is not None]
        if failures:
            first = failures[0]
            raise error or (first if isinstance(first, UserError) else RuntimeError(f"in another process: {first}"))
        return result
