"""Trace of a pass by decoder layers: its peak of memory for each number of layers that recompute their activations.

One pass that recomputes nothing tells the peaks of all numbers. The first layers recompute: their activations would be
held the longest, and what they compute again comes when those of the others are gone.

    forward     before | layer 0 | … | layer L-1 | head | (end of autocast) head
    backward    head | layer L-1 | … | layer 0, and the rest

A layer that recomputes keeps its input alone, and makes the rest again where its backward pass begins. Casts of its
weights stay in autocast's cache until that ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from thinkimg.trainer.forward.lora import FoldedLinear
from thinkimg.trainer.live_storages import LiveStorages


class LayerTrace:
    """Record of the bytes alive at the bounds of decoder layers and at most between these, of one pass."""

    def __init__(self, live: LiveStorages, layers: Sequence[torch.nn.Module]):
        self._live, self._layers = live, layers
        self._starts: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self._inputs: list[int] = []  # bytes of each layer's input
        self._held: object = ()  # what the first layer is given: it may recompute, and is the last to do so
        self._part = "before"

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the pass that is made within this context."""
        hooks = []
        for number, layer in enumerate(self._layers):
            hooks.append(layer.register_forward_pre_hook(self._entering(number), with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._leaving(number)))
        try:
            yield
        finally:
            self.begin("end")
            self._held = ()
            for hook in hooks:
                hook.remove()

    def begin(self, part: str) -> None:
        """End a part of the pass and begin another; "computed" is what follows autocast."""
        live = self._live
        self._peaks[self._part] = max(live.peak, self._peaks.get(self._part, 0))
        self._starts[part] = live.peak = live.now
        self._part = part

    def peaks(self, *, cached: bool) -> tuple[int, ...]:
        """Return the most bytes alive if none of the layers, the first, the first two, …, all of them recompute.

        cached: True if autocast keeps casts of trained weights until it ends.
        """
        starts, peaks, count = self._starts, self._peaks, len(self._layers)
        enters = [starts[f"forward {i}"] for i in range(count)] + [starts["head"]]
        kept = [0, *accumulate(self._inputs)]
        saved = [enter - enters[0] - inputs for enter, inputs in zip(enters, kept, strict=True)]
        casts = [0, *accumulate(cached * count_cast_bytes(layer) for layer in self._layers)]
        alike = [peaks["before"]]  # whatever the number
        highest = []
        for number in range(count + 1):
            under_autocast = [
                peaks[f"forward {i}"] - saved[min(i, number)] + casts[min(i, number)] for i in range(count)
            ]
            under_autocast.append(peaks["head"] - saved[number] + casts[number])
            after = [peaks["computed"] - saved[number]]
            after += [peaks[f"backward {i}"] - saved[min(i, number)] for i in range(count)]
            again = [starts[f"backward {i}"] - saved[i + 1] + peaks[f"forward {i}"] - enters[i] for i in range(number)]
            highest.append(max(alike + under_autocast + after + again))
        return tuple(highest)

    def _entering(self, number: int):
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], options: dict[str, object]) -> None:
            self._held = self._held or (inputs, options)
            self._inputs.append(inputs[0].untyped_storage().nbytes())
            self.begin(f"forward {number}")

        return hook

    def _leaving(self, number: int):
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda _: self.begin(f"backward {number}"))
            if number == len(self._layers) - 1:
                self.begin("head")

        return hook


def count_cast_bytes(layer: torch.nn.Module) -> int:
    """Return the bytes of the casts to 16 bits that autocast caches of a layer's weights; of folded adapters none."""
    folded = {p for part in layer.modules() if isinstance(part, FoldedLinear) for p in part.parameters()}
    cast = [p for p in layer.parameters() if p.requires_grad and p.dtype == torch.float32 and p not in folded]
    return sum(2 * p.numel() for p in cast)
