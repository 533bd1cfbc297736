"""Models that are made in threads beside each other are those that are made one after the other."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from chat_codecs import CORPUS
from PIL import Image

from thinkimg.models.clip import train_tiny
from thinkimg.models.seeding import seeded
from thinkimg.models.settings import TinyModel
from thinkimg.models.tiny import create_tiny

TINY = TinyModel(
    vocab_size=320, hidden_size=64, layers=2, heads=2, vision_layers=1, vision_hidden_size=32, vision_heads=2
)


def test_each_thread_draws_what_it_would_draw_alone():
    def draw(seed: int) -> list[float]:
        with seeded(seed):
            return [float(torch.randn(64).sum()) for _ in range(200)]

    before = torch.random.get_rng_state()
    alone = [draw(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, range(8))) == alone
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_small_clip_and_a_tiny_model(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    triples = [("Which?", *map(Image.fromarray, pixels))] * 4

    def tiny(folder: Path) -> str:
        create_tiny(folder, TINY, CORPUS, seed=1)
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    def clip(folder: Path) -> str:
        train_tiny(folder, triples, seed=1, steps=1)
        return hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()

    makers = [tiny, clip, tiny, clip]
    alone = [maker(tmp_path / f"alone-{i}") for i, maker in enumerate(makers)]
    with ThreadPoolExecutor(4) as pool:
        together = [pool.submit(maker, tmp_path / f"together-{i}") for i, maker in enumerate(makers)]
        assert [future.result() for future in together] == alone
    assert alone[:2] == alone[2:]
