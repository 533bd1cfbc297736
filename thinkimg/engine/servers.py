"""Servers of one model on this machine, one for each part of the GPUs or cores that the engine has."""

import contextlib
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from thinkimg import closure
from thinkimg.engine.server import Server, ServerSettings

T = TypeVar("T")
CLOSING_S = 0.1


class Servers:
    """Servers with the same weights and limits, started and ended together.

    model, version, progress: as for Server. log: name of a server -> its log. settings: of all; its `engine` is split.
    name: of a single server; several are numbered from 1.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        log: Callable[[str], Path],
        version: str,
        settings: ServerSettings,
        progress: Callable[[str], None],
        name: str,
    ):
        self.settings, self.progress, self.name = settings, progress, name
        engines = settings.engine.split(cpu=closure.on_cpu())
        names = [name] if len(engines) == 1 else [f"{name}-{number + 1}" for number in range(len(engines))]
        self.each = [
            Server(
                model,
                log_path=log(name),
                version=version,
                settings=replace(settings, engine=engine),
                progress=progress,
                name=name,
            )
            for name, engine in zip(names, engines, strict=True)
        ]

    @property
    def urls(self) -> list[str]:
        """Addresses of the servers."""
        return [server.url for server in self.each]

    @property
    def alive(self) -> bool:
        """True while all of them run."""
        return all(server.alive for server in self.each)

    def start(self) -> None:
        """Start all at a time and wait until they are ready. Raises what Server.start does; then none is left."""
        if len(self.each) == 1:
            return self.each[0].start()
        with ThreadPoolExecutor(len(self.each), thread_name_prefix="server") as pool:
            starts = [pool.submit(server.start) for server in self.each]
            try:
                wait(starts, return_when=FIRST_EXCEPTION)
                for start in starts:
                    if start.done():
                        start.result()
            except BaseException as error:
                if not isinstance(error, Exception):  # a signal
                    with contextlib.suppress(OSError):  # of a stderr that nobody reads
                        self.progress(f"{self.name}: stopping")
                self.stop()
                while wait(starts, timeout=CLOSING_S).not_done:
                    self.stop()  # one that had no process yet
                raise

    def stop(self) -> None:
        """End all that run; any thread may call this."""
        for server in self.each:
            server.stop()

    def sleep(self) -> None:
        """Have all free their GPUs' memory, as Server.sleep."""
        self._at_once(Server.sleep)

    def wake(self) -> None:
        """Have all take their GPUs' memory again."""
        self._at_once(Server.wake)

    def _at_once(self, act: Callable[[Server], None]) -> None:
        """Let every server act, at the same time: an 8B sleeps in ten seconds."""
        with ThreadPoolExecutor(len(self.each)) as pool:
            list(pool.map(act, self.each))
