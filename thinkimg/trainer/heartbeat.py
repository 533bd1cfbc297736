"""Heartbeat of a trainer's processes, by which they learn that one of them is gone.

A process that dies closes its connections. A machine that stops closes nothing, and a collective would wait for it for
half an hour. So each process counts in the store of the process group, in a thread and over a connection of its own.
The first process watches the others, and they watch the first.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

BEAT_S = 2.0
SILENCE_S = 30.0  # a process that computes beats all the same; loading a file may hold a thread up for seconds


def connect_store():
    """Return a connection of its own to the store of the process group, which lies on the first node."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=SILENCE_S))


class Heartbeat(threading.Thread):
    """Thread that beats and watches from its creation on.

    `lost` is called once, with a sentence, and has to end the process.
    """

    def __init__(self, rank: int, count: int, lost: Callable[[str], None]):
        super().__init__(name="heartbeat", daemon=True)
        self._rank, self._lost = rank, lost
        self._watched = range(1, count) if rank == 0 else range(1)
        self._store = connect_store()
        self.start()

    def run(self) -> None:
        """Beat, and watch the other processes, until one is gone."""
        number, seen = 0, dict.fromkeys(self._watched, ("", time.monotonic()))
        while True:
            number += 1
            try:
                self._store.set(f"pulse/{self._rank}", f"{number} {socket.gethostname()}")
                for rank in self._watched:
                    beat = self._store.get(f"pulse/{rank}").decode() if self._store.check([f"pulse/{rank}"]) else ""
                    if beat != seen[rank][0]:
                        seen[rank] = beat, time.monotonic()
            except RuntimeError:  # the store lives on the first node
                self._lost("the trainer's first node has ended or can't be reached")
                return
            for rank, (beat, since) in seen.items():
                if time.monotonic() - since > SILENCE_S:
                    host = beat.partition(" ")[2] or "another node"
                    lost = f"process {rank} of the trainer, on {host}, has ended or can't be reached"
                    self._lost(f"{lost}; its own log may say why")
                    return
            time.sleep(BEAT_S)
