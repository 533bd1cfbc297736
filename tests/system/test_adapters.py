"""Adapters served by vLLM beside their base, as on a GPU: a whole loop with LoRA on a CPU, where this is slow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from thinkimg.store.artifacts import Store

PRESET = """
extends: tiny
iterations: 3
model: {tiny: null, path: BASE, dtype: float32, adaptation: lora, lora_rank: 8, lora_alpha: 16}
data: {train: 8, held_out: 4}
conversation: {max_turns: 4, max_turn_tokens: 192, max_tokens: 2048}
warmstart: {steps: 2, batch: 4, pairs: 0}
image: {types: []}
rollout: {samples: 2, group_size: 4}
mix: {format: 0.3, tool: 0.3, answer: 0.4}
train: {steps: 1, min_std: 0.0, learning_rate: 1.0e-2}
evaluate: {samples: 2, samples_ends: 2, k: 0}
where: {engine: {adapters: always, cpu_kvcache_gib: 1, max_num_seqs: 8}, tracking: {traces: 0}}
"""


@pytest.mark.long
def test_every_policy_is_served_as_its_own_adapter(tmp_path: Path, tiny_models: tuple[Path, Path]):
    (tmp_path / "lora.yaml").write_text(PRESET.replace("BASE", str(tiny_models[0])))
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "prefect")}
    command = [sys.executable, "-m", "thinkimg", "run", "--preset", "lora.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    store = Store(tmp_path / "artifacts")
    policies = sorted(store.list("policy"), key=lambda artifact: artifact.manifest["finished"])
    rollouts = sorted(store.list("rollouts"), key=lambda artifact: artifact.manifest["finished"])
    assert len(policies) == 4 and len(rollouts) == 3
    for policy, played in zip(policies, rollouts, strict=False):
        weights = played.table("trajectories", ["weights"]).column("weights").to_pylist()
        assert set(weights) == {policy.digest}, "the name that the server says it used"
    for policy in policies[1:]:
        metrics = policy.manifest["metrics"]
        if "parity/mean_abs" in metrics:
            assert metrics["parity/mean_abs"] < 1e-4
    assert policies[-1].manifest["metrics"]["parity/slope"] == pytest.approx(1, abs=0.05)
    log = (tmp_path / "artifacts" / "logs" / "engine.log").read_text()
    assert "--enable-lora" in log or "enable_lora" in log
