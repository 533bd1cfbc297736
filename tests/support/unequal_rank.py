"""Process of a sharded trainer that has another number of micro-batches than its peer; spawned by name."""

import json
import os
import pickle
from pathlib import Path

from grpo_world import BANNED, FULL, World

from thinkimg.trainer.forward.fsdp import is_shard
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.passes import Passes
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import read_rows
from thinkimg.trainer.stepper import checkpoint_activations

SHARES = ((0, 1, 2), (3,))


def build_passes(world: World, policy: PolicyModel, ranks: Ranks) -> Passes:
    """Passes over the world's rows, each a micro-batch of its own."""
    rows = read_rows(world.artifact, world.image_token)
    pixels = world.patches()
    scorer = Scorer(policy.model, pixels, temperature=0.9, banned=BANNED, features=None)
    return Passes(policy, ranks, scorer, pixels, rows, token_budget=1, packed=False)


def add_gradients(passes: Passes, share: tuple[int, ...]) -> None:
    """Add the gradients of the sum of a share's log-probabilities."""
    for batch in passes.micro_batches(share):
        logps, _ = passes.scorer(passes.conversations([share[k] for k in batch.rows]))
        logps.sum().backward()


def unequal_rank(rank: int, port: int, directory: str, large: int) -> None:
    """Score and differentiate a share, the rank `large` three rows and the other one; write figures."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    import torch

    from thinkimg.trainer.worker import Worker

    world, worker = pickle.loads((Path(directory) / "world.pkl").read_bytes()), Worker(Path(directory), 2)
    policy = worker._load(world.job(f"unequal-{rank}", model=FULL), FULL, None)
    passes, share = build_passes(world, policy, worker.ranks), SHARES[rank != large]
    logps, _ = passes.score(share)
    policy.model.zero_grad()
    with checkpoint_activations(policy.model, 1):  # one of two layers is gathered once more
        add_gradients(passes, share)
    norms = {}
    for name, parameter in policy.model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and is_shard(gradient):
            norms[name] = float(gradient.full_tensor().norm())
        elif gradient is not None:
            torch.distributed.all_reduce(gradient)
            norms[name] = float(gradient.norm())
    figures = {"logps": {str(i): values.tolist() for i, values in logps.items()}, "norms": norms}
    (Path(directory) / f"unequal-{rank}.json").write_text(json.dumps(figures))
    worker.ranks.gather(None)
    os._exit(0)
