"""Sampler of vLLM's Model Runner V2, which GPUs run, against the trainer's log-probabilities."""

import json
import subprocess
import sys

from paths import SUPPORT


def test_its_log_probabilities_are_the_trainers_and_it_samples_no_banned_token():
    done = subprocess.run([sys.executable, str(SUPPORT / "sampler_v2.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"1.0", "0.7"}
    for one in found.values():
        assert one["again"] and one["different"] > 4 and one["banned"] == []
        assert one["difference"] < 2e-6
