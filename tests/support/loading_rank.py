"""Process of a sharded trainer that loads a policy and says how much memory that took; spawned by name."""

import ctypes
import gc
import json
import os
import re
from pathlib import Path

from thinkimg.models.base import Base
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer.forward.fsdp import get_local
from thinkimg.trainer.worker import Worker


def read_memory(name: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)[1])


def loading_rank(rank: int, port: int, directory: str, base: str) -> None:
    """Load a base in full and under an adapter, sharded over two processes; write figures to memory-<rank>.json."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    worker, figures = Worker(Path(directory), 2), {}
    job = {"kind": "warmstart", "seed": 0}
    for adaptation in ("full", "lora"):
        config = ModelConfig(dtype="float32", adaptation=adaptation)
        worker._load(job, config, Base("base", directory=base))  # what libraries take at first is not the model's
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = read_memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        policy = worker._load(job, config, Base("base", directory=base))
        peak = read_memory("VmHWM") - before
        parameters = dict(policy.model.named_parameters())
        figures[adaptation] = {
            "peak": peak,
            "model": sum(parameter.nbytes for parameter in parameters.values()),
            "whole": [name for name, parameter in parameters.items() if get_local(parameter).shape == parameter.shape],
        }
    (Path(directory) / f"memory-{rank}.json").write_text(json.dumps(figures))
    worker.ranks.gather(None)  # else the first takes the store with it
    os._exit(0)  # without taking the process group apart, of which the other may have left already
