"""FSDP2: each process holds a shard of the language model, and gathers a part of it where it is used.

    decoder layers      one at a time, by FSDP2's hooks
    embeddings, head    once per pass, by `gather`: the trainer calls them directly, the head once for each slice

The final norm stays whole, and so does the vision tower (a twelfth of a 7B): it runs for a process's new images alone.
Gradients are summed, as without FSDP2, since the loss is normalised over the step.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinkimg.trainer.forward.modules import get_base_model, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: "PreTrainedModel", device: torch.device) -> None:
    """Spread a model on the meta device over all processes, in place; its parameters are then on `device` and empty.

    Parameters keep their names; sharded ones become DTensors. An adapter that is on the CPU keeps its values.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, empty

    language = get_base_model(model).language_model
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in language.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)  # gloo can't multiply as it sums
    tables = [language.embed_tokens, unwrap(model).lm_head]
    shards = {
        weight: torch.nn.Parameter(
            empty(weight.shape, dtype=weight.dtype, device_mesh=mesh, placements=[Shard(0)]), weight.requires_grad
        )
        for weight in {table.weight: None for table in tables}  # one if they are tied
    }
    for table in tables:
        table.weight = shards[table.weight]
    inside = {parameter for layer in language.layers for parameter in layer.parameters()}
    fully_shard(language, mesh=mesh, ignored_params={p for p in language.parameters() if p not in inside})
    computed = [module for module in model.modules() if any(buffer.is_meta for buffer in module.buffers(recurse=False))]
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for module in computed:
        unwrap(model)._init_weights(module)  # the frequencies of rotary positions, which are in no file


def gather(weight: Tensor) -> Tensor:
    """Return a sharded weight whole, or an unsharded one itself. Processes' gradients of it are summed."""
    if not is_shard(weight):
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial()])


def is_shard(tensor: Tensor) -> bool:
    """Return True if a tensor is spread over the processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def get_local(tensor: Tensor) -> Tensor:
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
    shards = [get_local(grad) for grad in grads if is_shard(grad)]
    square = sum((shard.float().square().sum() for shard in shards), torch.zeros((), device=grads[0].device))
    torch.distributed.all_reduce(square)
    square = square + sum(grad.float().square().sum() for grad in grads if not is_shard(grad))
    norm = float(square.sqrt())
    scale = min(1.0, max_norm / (norm + 1e-6))
    for grad in grads:
        get_local(grad).mul_(scale)
    return norm
