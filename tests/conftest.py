"""Fixtures that are dear to make and so are made once: tiny models, and one vLLM server for all tests that need one."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

CORPUS = [
    "<think>The stripes at 63, 27 are too fine to see. I crop the image there.</think>",
    '<tool>{"name": "crop_image", "args": {"x": 56, "y": 20, "width": 28, "height": 28}}</tool>',
    "You are shown an image. Which way do the stripes run? The image is 112 x 84 pixels. <answer>vertical</answer>",
]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> tuple[Path, Path]:
    """Directories of two Qwen2.5-VL of half a million parameters that differ in their random weights only."""
    from thinkimg.config import TinyModel
    from thinkimg.tiny import create_tiny

    tiny = TinyModel(
        vocab_size=512, hidden_size=128, layers=2, heads=2, vision_layers=2, vision_hidden_size=64, vision_heads=2
    )
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        create_tiny(root / str(seed), tiny, CORPUS, seed=seed)
    return root / "0", root / "1"


@pytest.fixture(scope="session")
def media_dir(tmp_path_factory) -> Path:
    """The folder from which the server of `engine` reads images."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def engine(tiny_models, media_dir, tmp_path_factory):
    """A running Server with the first tiny model, version "v0". Who loads other weights loads these again when done."""
    from thinkimg.engine.server import Server, ServerSettings

    log_path = tmp_path_factory.mktemp("engine") / "engine.log"
    settings = ServerSettings(max_model_len=2048, cpu_kvcache_gib=1)
    with Server(tiny_models[0], log_path=log_path, version="v0", settings=settings, media_dir=media_dir) as server:
        yield server
