"""Loading of a policy in all processes of a trainer.

    each its own copy    load ─────────────────────────────────────────┐
    sharded (FSDP2)      load without weights ─► fsdp.shard ─► fill ───┴─► checksums.verify, if there are several

So no process of a sharded trainer holds more than its part, neither on its GPU nor in the host's memory.
"""

from collections.abc import Callable

import torch

from thinkimg.trainer import checksums, weight_files
from thinkimg.trainer.forward import fsdp
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.ranks import Ranks


def load_together(
    load: Callable[[torch.device], PolicyModel], ranks: Ranks, device: torch.device, *, sharded: bool
) -> PolicyModel:
    """Return the policy that `load` reads onto a device, spread over the processes if `sharded`. All call it.

    Raises UserError in every process if it can't be loaded in one, or if one holds other weights than the files.
    """
    policy = ranks.together(lambda: load(torch.device("meta") if sharded else device))
    if ranks.count == 1:
        return policy
    references = checksums.compute_expected(policy, ranks)
    if sharded:
        fsdp.shard(policy.model, device)
        policy.sharded = True
        ranks.together(lambda: weight_files.fill(policy))
    checksums.verify(policy, references, ranks)
    return policy
