"""The command line's own manners."""

import subprocess
import sys

import pytest
import yaml
from paths import REPOSITORY

from thinkimg.stages.names import stage_names


@pytest.mark.parametrize("code", ["import triton._C.libtriton", "gc.collect()", "raise UserError('No.', hint='Yes.')"])
def test_a_command_leaves_without_a_word_of_its_libraries(code):
    """triton's bindings complain about each object that the interpreter has not freed."""
    script = f"""
import gc
from thinkimg.exit import run_guarded
from thinkimg.errors import UserError
def command():
    {code}
run_guarded(command)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    mistake = code.startswith("raise")
    assert (done.returncode, done.stdout) == (2 if mistake else 0, "")
    assert done.stderr == ("thinkimg: No. Hint: Yes.\n" if mistake else "")


def test_the_deployments_are_those_that_the_command_makes():
    """After a change of a stage or of flows/_deployments.py: `thinkimg deployments > prefect.yaml`."""
    command = [sys.executable, "-m", "thinkimg", "deployments"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert made == (REPOSITORY / "prefect.yaml").read_text(encoding="utf-8")
    deployments = yaml.safe_load(made)["deployments"]
    assert [one["name"] for one in deployments] == ["loop", *stage_names()]
    needing = {one["name"] for one in deployments if "device" in one["tags"]}
    assert needing == {"warmstart", "rollout", "score", "train", "evaluate"}
