"""One optimizer step over any number of micro-batches and processes, shared by GRPO and the warm start."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from thinkimg.trainer.forward.fsdp import clip_gradients, is_shard
from thinkimg.trainer.forward.modules import get_base_model
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.settings import Recomputation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[dict], None]
"""Receiver of each step's metrics."""


class Stepper:
    """Accumulates gradients and steps AdamW. Parameters without a gradient in a step count as gradient 0."""

    def __init__(
        self,
        policy: PolicyModel,
        parameters: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.AdamW,
        ranks: Ranks,
        max_grad_norm: float,
    ):
        self.policy, self.ranks, self.max_grad_norm = policy, ranks, max_grad_norm
        self.parameters, self.optimizer = list(parameters.values()), optimizer
        self.clear()

    def clear(self) -> None:
        """Set the gradients to 0."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    def step(self, learning_rate: float) -> float:
        """Sum the gradients over processes, clip, update, clear; return the norm before clipping.

        Raises ArithmeticError if that is not finite; the weights are then unchanged.
        """
        grads = [parameter.grad for parameter in self.parameters]
        self.ranks.sum([grad for grad in grads if not is_shard(grad)])  # FSDP2 has summed the others
        if self.policy.sharded:
            norm = clip_gradients(self.parameters, self.max_grad_norm)
        else:
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if not np.isfinite(norm):
            raise ArithmeticError(f"the gradient's norm is {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.clear()
        return norm

    def release(self) -> None:
        """Give the gradients' memory back."""
        for parameter in self.parameters:
            parameter.grad = None


@contextmanager
def checkpoint_activations(model: "PreTrainedModel", layers: int | Recomputation = True) -> Iterator[None]:
    """Compute the activations of the first decoder layers again in the backward pass, within this context.

    layers: their number, or the setting where none has been chosen: all, if it is not False.
    transformers does so in training mode only.
    """
    language_model = get_base_model(model).language_model
    number = len(language_model.layers) if layers is True or layers == "auto" else int(layers)
    if number:
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        language_model.disable_input_require_grads()  # of the embeddings, which only a reentrant checkpoint wants
        for layer in language_model.layers[number:]:
            layer.gradient_checkpointing = False
        model.train()
    try:
        yield
    finally:
        if number:
            language_model.gradient_checkpointing_disable()
            model.eval()


def peak_memory_mb(device: torch.device) -> float:
    """Return the highest memory in MB: of a GPU since the job began, else of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Stopwatch that waits for the device's queue."""

    def __init__(self, device: torch.device):
        self._device, self._last = device, time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        last, self._last = self._last, time.perf_counter()
        return self._last - last
