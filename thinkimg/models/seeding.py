"""torch's global generator, for one thread at a time: stages run side by side, and it is the process's."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generator of the CPU for a block, alone in this process; afterwards it is as it was."""
    import torch

    with _lock, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
