"""Memory of a recurrent layer's way through a sequence, measured on a few chunks and extrapolated to all.

transformers' reference goes chunk by chunk: through 24 layers and 8,000 tokens without data that takes minutes. It
takes as much more memory for each further chunk, so that two lengths tell that of all.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from thinkimg.models.family import Family
from thinkimg.trainer.live_storages import LiveStorages

CHUNK = 64  # tokens
FEW, MORE = 2, 4  # chunks that are measured


class Cost(NamedTuple):
    """Bytes that a pass takes, beside its inputs and its output."""

    kept: int
    """From forward to backward."""
    forward: int
    """Beside what is kept, at most."""
    backward: int
    """Beside what is kept, at most, the gradients of the inputs included."""


class Stand(torch.autograd.Function):
    """Function that takes the memory of a pass and computes nothing."""

    @staticmethod
    def forward(ctx, cost: Cost, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        kept = query.new_empty(cost.kept, dtype=torch.uint8)
        query.new_empty(cost.forward, dtype=torch.uint8)  # and is gone
        ctx.save_for_backward(kept)  # not an attribute: a checkpoint has it dropped and made again
        ctx.cost, ctx.inputs = cost, [(x.shape, x.dtype) for x in (query, key, value, g, beta)]
        return torch.empty_like(value, dtype=query.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (kept,) = ctx.saved_tensors
        grads = [grad.new_empty(shape, dtype=dtype) for shape, dtype in ctx.inputs]
        grad.new_empty(max(0, ctx.cost.backward - sum(x.nbytes for x in grads)), dtype=torch.uint8)
        del kept
        return None, *grads


@contextmanager
def extrapolate(family: Family) -> Iterator[None]:
    """Let the recurrent layers of a family's models, on tensors without data, measure a few chunks only.

    With the torch reference, also where a GPU's kernels are installed, which take less: then it is an upper bound.
    """
    if family.recurrence is None:
        yield
        return
    module = importlib.import_module(family.recurrence.module)
    names = (family.recurrence.rule, family.recurrence.convolution)
    own = {name: getattr(module, name) for name in names}
    rule, convolution = (inspect.unwrap(function) for function in own.values())
    setattr(module, names[0], Recurrence(rule))
    setattr(module, names[1], convolution)
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(module, name, function)


class Recurrence:
    """Stand-in for transformers' torch_chunk_gated_delta_rule."""

    def __init__(self, rule: Callable):
        self.rule, self._costs = rule, {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **options: object
    ) -> tuple[Tensor, None]:
        """Return an output of the right shape and of no values, and no state."""
        inputs = (query, key, value, g, beta)
        shape = tuple((x.shape, x.dtype) for x in inputs)
        if shape not in self._costs:
            chunks = -(-query.shape[1] // CHUNK)
            few, more = (self.measure(inputs, count, **options) for count in (FEW, MORE))
            self._costs[shape] = Cost(
                *(a + (b - a) * (chunks - FEW) // (MORE - FEW) for a, b in zip(few, more, strict=True))
            )
        return Stand.apply(self._costs[shape], *inputs), None

    def measure(self, inputs: tuple[Tensor, ...], chunks: int, **options: object) -> Cost:
        """Return what the rule takes for inputs as these, of so many chunks."""
        identity = saved_tensors_hooks(lambda x: x, lambda x: x)  # else a checkpoint drops what is kept
        with torch.enable_grad(), identity:
            own = [x.new_empty(len(x), CHUNK * chunks, *x.shape[2:], dtype=x.dtype).requires_grad_() for x in inputs]
            query, key, value, g, beta = own
            with LiveStorages(own) as live:
                out, _ = self.rule(query, key, value, g=g, beta=beta, **options)
                forward, kept = live.peak, live.now - out.nbytes
                start = live.peak = live.now
                with torch.autocast("cpu", enabled=False):  # as where gradients are computed
                    grads = torch.autograd.grad(out, own, torch.empty_like(out))
                backward = live.peak - start - out.nbytes  # of its gradient, which the caller has
                del grads
        return Cost(kept, forward - kept - out.nbytes, backward)
