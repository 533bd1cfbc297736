"""What a soak test measures, in a process of its own: `rollouts ROOT MODEL` or `rows ROOT`; prints JSON."""

import ctypes
import gc
import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pyarrow as pa
from single_stage import build_stage

from thinkimg.config.load import load_config
from thinkimg.stages.prepare import prepare
from thinkimg.stages.rollout import rollout
from thinkimg.stages.score import score
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe

TEXT_ONLY = ["image.types=[]", "where.tracking.enabled=false"]
ROUNDS, SAMPLES, SIZE = 8, 32, 8


def memory(field: str) -> float:
    """RssAnon or VmHWM (the peak) of this process in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def held() -> dict:
    gc.collect()
    pa.default_memory_pool().release_unused()  # Arrow's own allocator, which the next line does not reach
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return {
        "memory": memory("RssAnon"),
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "temporary": sum(len(names) for _, *entries in os.walk(tempfile.gettempdir()) for names in entries),
    }


def rollouts(root: Path, model: Path) -> None:
    """ROUNDS iterations of SAMPLES x SIZE conversations with one policy, played and scored; what is held after each."""
    store = Store(root / "store")

    def fill(work):
        with work.part("policy") as path:
            shutil.copytree(model, path / "model")

    policy, _ = store.build("policy", Recipe("warmstart", 1, 1, {}), fill)
    print(json.dumps({"policy": policy.digest}), flush=True)
    url = sys.stdin.readline().strip()
    config = load_config(
        "tiny",
        [
            *TEXT_ONLY, f"where.store={store.root}", f"where.engine.urls=[{url}]",
            f"data.train={ROUNDS * SAMPLES}", "data.held_out=2",
            f"rollout.samples={SAMPLES}", f"rollout.group_size={SIZE}", "warmstart.pairs=0",
        ],
    )  # fmt: skip
    dataset, _ = build_stage(prepare, config, store)
    for iteration in range(1, ROUNDS + 1):
        played, _ = build_stage(rollout, config, store, dataset=dataset, policy=policy, iteration=iteration)
        scores, _ = build_stage(score, config, store, dataset=dataset, rollouts=played)
        print(json.dumps(held() | played.metrics | scores.metrics), flush=True)


def rows(root: Path) -> None:
    """List the store, open its rollouts, score them; the peak of memory after each."""
    store = Store(root)
    peaks = {"start": memory("VmHWM")}
    by_kind = {artifact.kind: artifact for artifact in store.list()}
    peaks["list"] = memory("VmHWM")
    played = store.resolve(by_kind["rollouts"].reference)
    counted = sum(batch.num_rows for batch in played.batches("trajectories", ["trajectory_id"]))
    peaks["open"] = memory("VmHWM")
    scores, _ = build_stage(score, load_config("tiny", TEXT_ONLY), store, dataset=by_kind["dataset"], rollouts=played)
    peaks["score"] = memory("VmHWM")
    print(json.dumps(peaks | {"rows": counted, "scored": sum(entry["rows"] for entry in scores.files.values())}))


if __name__ == "__main__":
    {"rollouts": rollouts, "rows": rows}[sys.argv[1]](*map(Path, sys.argv[2:]))
