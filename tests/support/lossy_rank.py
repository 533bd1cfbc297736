"""Process of a trainer that loses a part of its weights; a module, as a spawned process imports it by name."""

import json
import os
from pathlib import Path

from grpo_world import FULL

from thinkimg.models.base import Base
from thinkimg.trainer import checksums, weight_files
from thinkimg.trainer.worker import Worker

LOST = "model.language_model.layers.1.mlp.up_proj.weight"


def lossy_rank(rank: int, port: int, spool: str, job: dict) -> None:
    """A worker of two whose second process loses its part of one parameter; see the test."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    from thinkimg.trainer.forward import fsdp

    worker = Worker(Path(spool), 2)
    policy = worker._load(job, FULL, Base(**job["base"]))
    values = {
        "expected": checksums.compute_expected(policy, worker.ranks),
        "actual": checksums.measure(weight_files.list_floating(policy), worker.ranks),
    }
    (Path(spool) / f"sums-{rank}.json").write_text(json.dumps(values))
    fill = weight_files.fill

    def lossy(policy) -> None:
        fill(policy)
        if rank == 1:
            fsdp.get_local(policy.model.get_parameter(LOST)).data.zero_()

    weight_files.fill = lossy
    answer = worker._answer

    def kept(job: dict, lines: Path) -> dict:
        result = answer(job, lines)
        (Path(spool) / f"answer-{rank}.json").write_text(json.dumps(result))
        return result

    worker._answer = kept
    worker.serve()
