"""Stages run in threads, and the first one of each kind imports its libraries there."""

import subprocess
import sys

import pytest

RACE = """
import sys, threading
from importlib.abc import MetaPathFinder

from thinkimg.errors import UserError

begun, raised = threading.Event(), []

class Slow(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "transformers.utils" and not begun.is_set():
            begun.set()  # transformers is half imported
            threading.Event().wait(1)

sys.meta_path.insert(0, Slow())

def clip():
    from thinkimg.models.clip import load_encoder
    load_encoder("RN50", "nowhere")

def tiny():
    from thinkimg.models.family import load_family
    from thinkimg.models.settings import TinyModel
    names = ("<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tiny = TinyModel()
    load_family(tiny.family).make_config(tiny, {name: number for number, name in enumerate(names)})

def merged():
    from pathlib import Path
    from types import SimpleNamespace
    from thinkimg.config.load import load_config
    from thinkimg.models.base import BaseSource
    from thinkimg.resources import Resources
    policy = SimpleNamespace(is_full=False, digest="d", directory=Path("nowhere"))
    with Resources(load_config("tiny", []).where) as resources:
        resources.weights(policy, BaseSource(path="x", revision=None, tiny=False))

def codec():
    from thinkimg.conversation.codec import Codec
    Codec.load("/nowhere")

def run(function):
    try:
        function()
    except (UserError, OSError, ValueError):  # there is no such CLIP, policy or tokenizer
        pass
    except BaseException as error:
        raised.append(error)

first, second = (threading.Thread(target=run, args=[globals()[name]]) for name in sys.argv[1:])
first.start()
assert begun.wait(60)
second.start()
first.join()
second.join()
assert not raised, raised
if "clip" in sys.argv:
    import open_clip.hf_model
    assert open_clip.hf_model.transformers is not None, "open_clip does without it"
"""

OTHERS = ("tiny merged", "merged clip", "clip tiny")


@pytest.mark.parametrize("pair", ["clip codec", *(pytest.param(p, marks=pytest.mark.long) for p in OTHERS)])
def test_two_threads_that_need_transformers_first_both_get_it(pair):
    ended = subprocess.run([sys.executable, "-c", RACE, *pair.split()], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
