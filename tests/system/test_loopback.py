"""A whole loop in a hostile shell and folder: it gets through, and all its processes talk to this machine alone."""

import os
import subprocess
import sys

import pytest
from hostile import CANARY, GOOD, SHELL, deep_folder, read_addresses, record_addresses, shadow

from thinkimg.environment import is_loopback
from thinkimg.store.artifacts import Store

SETTINGS = """
extends: tiny
iterations: 1
data: {train: 8, held_out: 4}
conversation: {max_turns: 3, max_turn_tokens: 24}
warmstart: {steps: 2, batch: 4, pairs: 0}
image: {types: [self, teacher, attention]}
rollout: {samples: 2, group_size: 4}
rewards: {functions: ["my_rewards:brevity"]}
mix: {format: 0.2, tool: 0.3, answer: 0.5, brevity: 1.0, image: 0.2}
train: {steps: 1}
evaluate: {samples: 2, samples_ends: 4, k: 1}
where: {engine: {cpu_kvcache_gib: 1, max_num_seqs: 32}, tracking: {traces: 1}}
"""
REWARD = "def brevity(completions, **_):\n    return [1.0 / (1 + len(str(text))) for text in completions]\n"


@pytest.mark.long
def test_a_loop_in_a_hostile_shell_gets_through_and_talks_to_this_machine_alone(tmp_path):
    place = shadow(tmp_path / "folder")
    for name in ("sitecustomize", "thinkimg", "typing"):  # with -m Python itself imports these from there
        (place / f"{name}.py").unlink()
    (place / "nano.yaml").write_text(SETTINGS)
    (place / "my_rewards.py").write_text(REWARD)
    log = tmp_path / "addresses"
    environment = os.environ | SHELL | GOOD | record_addresses(log)
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "TMPDIR": str(deep_folder(tmp_path))}
    command = [sys.executable, "-m", "thinkimg", "run", "--preset", "nano.yaml"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert list(Store(place / "artifacts").list("scores"))
    seen = read_addresses(log)
    assert ("connect", "127.0.0.1") in seen and ("bind", "127.0.0.1") in seen
    assert not [(call, host) for call, host in seen if not is_loopback(host)], seen
    written = [path for path in (place / "artifacts").rglob("*") if path.suffix in (".json", ".log") and path.is_file()]
    assert written and not [path for path in written if CANARY in path.read_text(errors="replace")]
