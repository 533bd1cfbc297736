"""Seeding of torch's global generator, one thread at a time: stages run side by side in a process and share it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generator for a block, one block at a time in this process; then restore its state."""
    import torch

    with _lock, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
