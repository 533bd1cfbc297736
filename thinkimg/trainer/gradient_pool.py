"""Gradients of a step's micro-batches: one after another, or for a small model side by side on a CPU's cores.

The operations of a tiny model are too small to be spread over cores: a second thread within them saved 5 % of a step.
Micro-batches side by side, a core each, saved 40 % (docs/design.md, 2026-11-27). Each is computed by one thread and
gradients are added in the order of the batches, so that results are bit-equal.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import torch
from torch import Tensor

from thinkimg.trainer.policy import PolicyModel

T = TypeVar("T")
SMALL = 64 * 2**20  # bytes of parameters: every micro-batch under way holds a gradient as large
CORE_TOKENS = 1024  # padded tokens of a micro-batch that keep one core busy


class GradientPool:
    """Threads, a core each, that compute gradients side by side if the model is small; a context.

    parameters: those that are trained, each with a `grad`. shared_features: the features of images are kept for all
    batches; then one batch follows the other, as an image's features depend on those that are made together with it.
    """

    def __init__(self, policy: PolicyModel, parameters: Iterable[torch.nn.Parameter], *, shared_features: bool):
        self._parameters: Sequence[torch.nn.Parameter] = list(parameters)
        small = is_small(policy) and not shared_features
        self.threads = torch.get_num_threads() if small else 1
        """Micro-batches that are computed at a time."""
        self._pool: ThreadPoolExecutor | None = None
        if small:
            self._pool = ThreadPoolExecutor(self.threads, "gradients", torch.set_num_threads, (1,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self.threads)  # threads that begin later would have one, too

    def limit(self, token_budget: int) -> int:
        """Return the tokens of a micro-batch, so that those under way are within the budget together."""
        return token_budget if self._pool is None else max(1, min(CORE_TOKENS, token_budget // self.threads))

    def accumulate(self, compute_loss: Callable[[T], Tensor], batches: Iterable[T]) -> list[float]:
        """Add the gradient of each batch's loss to the parameters', in order; return the losses."""
        if self._pool is None:
            return [add_gradient(compute_loss(batch)) for batch in batches]

        def differentiate(batch: T) -> tuple[float, Sequence[Tensor | None]]:
            loss = compute_loss(batch)
            return float(loss.detach()), torch.autograd.grad(loss, self._parameters, allow_unused=True)

        losses = []
        for loss, gradients in self._pool.map(differentiate, list(batches)):
            losses.append(loss)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                if gradient is not None:
                    assert parameter.grad is not None, "set to 0 before the step"
                    parameter.grad.add_(gradient)
        return losses


def is_small(policy: PolicyModel) -> bool:
    """Tell whether a model on a CPU is too small to keep several cores busy by one micro-batch."""
    size = sum(parameter.nbytes for parameter in policy.model.parameters())
    return policy.device.type == "cpu" and not policy.sharded and size <= SMALL


def add_gradient(loss: Tensor) -> float:
    """Add a loss's gradient to its parameters'; return the loss."""
    loss.backward()
    return float(loss.detach())
