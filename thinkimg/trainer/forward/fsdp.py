"""FSDP2: each process holds a shard of every decoder layer, and gathers the layers one at a time.

Embeddings, head, final norm and vision tower stay unsharded (a tenth of a 7B): the trainer calls them one by one,
without the wrapper's forward. Gradients are summed, as without FSDP2, since the loss is normalised over the step.
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
    """Return True if a tensor is spread over the processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard, or an unsharded tensor itself."""
    return tensor.to_local() if is_shard(tensor) else tensor


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return an unsharded tensor on the parameter's device, sharded as the parameter is."""
    value = value.to(parameter.device)
    if not is_shard(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def gather_all(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return tensors unsharded, detached and on the CPU; every process must call.

    keep: False: each is gathered for the other processes and dropped here, and the result is empty.
    """
    gathered = {}
    for name, tensor in tensors.items():
        value = (tensor.full_tensor() if is_shard(tensor) else tensor).detach().cpu().contiguous()
        if keep:
            gathered[name] = value
    return gathered


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Clip the norm of sharded and unsharded gradients together; return the norm before clipping.

    torch.nn.utils.clip_grad_norm_ takes the two kinds only apart.
    """
    grads = [parameter.grad for parameter in parameters]
    shards = [local(grad) for grad in grads if is_shard(grad)]
    square = sum((shard.float().square().sum() for shard in shards), torch.zeros((), device=grads[0].device))
    torch.distributed.all_reduce(square)
    square = square + sum(grad.float().square().sum() for grad in grads if not is_shard(grad))
    norm = float(square.sqrt())
    scale = min(1.0, max_norm / (norm + 1e-6))
    for grad in grads:
        local(grad).mul_(scale)
    return norm
