"""A disk that crashes: stops the file layer at its n-th event, and forgets what was never synced."""

import os
import shutil
from pathlib import Path

from thinkimg.store import files


class Crash(BaseException):
    """Not an Exception, so that nothing handles it: what is on disk is what a kill leaves."""


class Disk:
    """Watches the file layer, stops it at its n-th event, and then forgets what was never synced, as a power cut may.

    Pessimistic: an unsynced file is torn, and an unsynced name or rename is undone, each with probability `loss`.
    """

    def __init__(self, monkeypatch, stop_at=None, error=None):
        self.events, self.stop_at, self.error = 0, stop_at, error
        self.torn: dict[Path, int] = {}  # file -> bytes that are safe
        self.names: list[tuple[Path, ...]] = []  # (created,) or (source, target)
        self.replaced: dict[Path, bytes] = {}  # what a rename has hidden
        monkeypatch.setattr(files, "hook", self)
        monkeypatch.setattr(os, "fsync", self.fsync)  # simulated, so not waited for

    def fsync(self, descriptor):
        self.asked = True

    def __call__(self, event, *paths):
        self.watch(event, *paths)
        self.events += 1
        if self.events == self.stop_at:
            raise self.error or Crash(event, *paths)

    def watch(self, event, path, target=None):
        if event == "before sync":
            self.asked = False
        elif event == "after write":
            tree = [path, *path.rglob("*")]
            self.torn |= {file: 0 for file in tree if file.is_file()}
            self.names += [(entry,) for entry in tree]
        elif event == "after make":
            self.names.append((path,))
        elif event == "before append":
            self.torn[path] = path.stat().st_size
        elif event == "after sync" and path.is_dir():
            assert self.asked
            self.names = [name for name in self.names if name[-1].parent != path]
        elif event == "after sync":
            assert self.asked
            self.torn.pop(path, None)
        elif event == "before rename":
            self.replaced.pop(target, None)
            if target.is_file():
                self.replaced[target] = target.read_bytes()
        elif event == "after rename":

            def moved(entry):
                return target / entry.relative_to(path) if entry.is_relative_to(path) else entry

            self.torn = {moved(entry): safe for entry, safe in self.torn.items()}
            self.names = [tuple(map(moved, name)) for name in self.names if name != (path,)] + [(path, target)]

    def cut_power(self, rng, loss):
        """What is left afterwards has outlived it, and is safe."""
        for file, safe in self.torn.items():
            if file.exists() and rng.random() < loss:
                os.truncate(file, (safe + file.stat().st_size) // 2)
        for name in reversed(self.names):
            if name[-1].exists() and rng.random() < loss:
                if len(name) == 2 and not name[0].exists():
                    name[1].rename(name[0])
                    if name[1] in self.replaced:
                        name[1].write_bytes(self.replaced[name[1]])
                else:
                    shutil.rmtree(name[-1]) if name[-1].is_dir() else name[-1].unlink()
        self.torn, self.names = {}, []
