"""FSDP2: each process holds a part of every decoder layer, and sees whole layers one at a time.

Embeddings, head, final norm and vision tower stay whole in each process (a tenth of a 7B): the trainer calls them one by
one, without the wrapper's forward. Gradients are summed, as without FSDP2, since the loss is normalised over the step.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinkimg.trainer.forward.logprobs import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: "PreTrainedModel", device: torch.device) -> None:
    """Shard the decoder layers in place over all processes; parameters keep their names and become DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    language = base_model(model).language_model
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    inside = {parameter for layer in language.layers for parameter in layer.parameters()}
    for layer in language.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)  # gloo can't multiply as it sums
    fully_shard(language, mesh=mesh, ignored_params={p for p in language.parameters() if p not in inside})


def is_shard(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, detached and on the CPU; every process has to ask."""
    return (tensor.full_tensor() if is_shard(tensor) else tensor).detach().cpu().contiguous()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the parameter is held."""
    value = value.to(parameter.device)
    if not is_shard(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def wholes(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """All of them, one after the other, where `keep`; elsewhere each is gathered and let go."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            found[name] = value
    return found


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> float:
    """As torch.nn.utils.clip_grad_norm_, over parts and whole tensors; returns the norm before."""
    grads = [parameter.grad for parameter in parameters]
    parts = [local(grad) for grad in grads if is_shard(grad)]
    square = sum((part.float().square().sum() for part in parts), torch.zeros((), device=grads[0].device))
    torch.distributed.all_reduce(square)
    square = square + sum(grad.float().square().sum() for grad in grads if not is_shard(grad))
    norm = float(square.sqrt())
    scale = min(1.0, max_norm / (norm + 1e-6))
    for grad in grads:
        local(grad).mul_(scale)
    return norm
