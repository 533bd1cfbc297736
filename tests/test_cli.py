"""The command line's own manners."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("code", ["import triton._C.libtriton", "gc.collect()", "raise UserError('No.', hint='Yes.')"])
def test_a_command_leaves_without_a_word_of_its_libraries(code):
    """triton's bindings complain about each object that the interpreter has not freed."""
    script = f"""
import gc
from thinkimg.exit import guarded
from thinkimg.errors import UserError
def command():
    {code}
guarded(command)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    mistake = code.startswith("raise")
    assert (done.returncode, done.stdout) == (2 if mistake else 0, "")
    assert done.stderr == ("thinkimg: No. Hint: Yes.\n" if mistake else "")
