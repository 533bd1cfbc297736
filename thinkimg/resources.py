"""Resources that a loop keeps: a vLLM engine, a second one for a teacher, and a trainer.

    stages ──► Resources ─┬─► engine(policy, limits) ──► Servers (own) or engine.urls ──► EngineClient
                          ├─► teacher(first, limits) ──► a second Server
                          ├─► trainer ──► Trainer, a process of its own
                          └─► encoder(settings) ──► CLIP, in this process

Each is started with its first use, from `where` alone. An engine whose limits are too narrow for a stage is started
again. A loop that finds everything cached starts none.
"""

import asyncio
import contextlib
import functools
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from thinkimg import closure, process
from thinkimg.console import note
from thinkimg.disk import writing
from thinkimg.engine.client import EngineClient
from thinkimg.engine.server import Server, ServerSettings, server_command, server_environment
from thinkimg.engine.servers import Servers
from thinkimg.engine.settings import EngineConfig, EngineSettings
from thinkimg.engine.users import Users
from thinkimg.errors import UserError
from thinkimg.importing import importing
from thinkimg.models import clip
from thinkimg.models.base import Base, BaseSource
from thinkimg.resource_settings import ResourcesConfig
from thinkimg.store import files
from thinkimg.store.kinds import Clip, Policy
from thinkimg.trainer.client import Trainer

Name = Literal["engine", "teacher", "trainer"]
Device = Callable[[Callable[[], None]], contextlib.AbstractContextManager]
"""Makes the context in which a run has the machine's device to itself; called with a function that ends the wait by
raising."""


class Resources:
    """Engine, teacher, trainer and CLIP for several threads; leaving the context ends all that it started.

    say: takes lines about slow starts. device: entered before anything is started, left after all has ended.
    """

    def __init__(
        self, where: ResourcesConfig, say: Callable[[str], None] = note, device: Device = contextlib.nullcontext
    ):
        self.where, self.say, self._device = where, say, device
        self._stack = contextlib.ExitStack()
        self._lock, self._users = threading.RLock(), Users()
        self._loading = threading.Lock()
        names: tuple[Name, ...] = ("engine", "teacher", "trainer")
        single = threading.RLock()
        # Held while one is started, and taken before `_lock`; a single one where that has to be one after the other.
        self._starts = {name: threading.RLock() if self.start_apart else single for name in names}
        self._scratch: Path | None = None
        self._starting: set[Servers] = set()
        self._holds_device = self._closed = False
        self._servers: dict[str, Servers] = {}
        self._trainer: Trainer | None = None
        self._encoder: tuple[tuple[str, str | None], clip.Encoder] | None = None
        self._frozen: str | None = None  # digest of the teacher's weights

    def __enter__(self) -> "Resources":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End everything; later requests are refused."""
        self._closed = True
        with contextlib.ExitStack() as locks:
            for lock in (*self._starts.values(), self._lock):
                while not lock.acquire(timeout=0.1):
                    for servers in tuple(self._starting):
                        servers.stop()  # the thread that starts them holds the lock, and sees that they ended
                locks.callback(lock.release)
            self._stack.close()

    def _begin(self) -> None:
        with self._lock:
            self._check()
            if not self._holds_device:
                self.where.check_devices()  # before hours are spent, not after
                self._stack.enter_context(self._device(self._check))
                self._holds_device = True

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("the resources have been closed")

    @property
    def trainer(self) -> Trainer:
        """The trainer, started with its first use."""
        with self._starts["trainer"]:
            self._begin()
            self._make_room("trainer")
            if self._trainer is None:
                closure.check_closure()
                config = self.where.trainer
                config = config.model_copy(update={"keep": config.keep or self.where.apart})
                self._trainer = self._stack.enter_context(Trainer(config, log_path=self.log("trainer")))
            return self._trainer

    def _make_room(self, wanted: Name) -> None:
        """Put the servers that share a GPU with `wanted` to sleep, or end those that can't, where they take turns."""
        if not self.where.engine.keep:
            for name, servers in self._servers.items():
                if name != wanted and self.where.share_device(name, wanted):
                    if servers.settings.sleeps:
                        servers.sleep()
                    else:
                        servers.stop()

    @property
    def start_apart(self) -> bool:
        """True where they may be started at the same time: vLLM measures what is free on a GPU, and takes its share."""
        apart = self.where.apart and not self.where.share_device("engine", "teacher")
        return self.where.engine.keep and (closure.on_cpu() or apart)

    @property
    def _sleeps(self) -> bool:
        """True where servers sleep while the memory is another's: those on a GPU can."""
        return not self.where.engine.keep and not closure.on_cpu()

    async def engine(self, policy: Policy, settings: EngineSettings, base: BaseSource) -> EngineClient:
        """Return a client whose servers hold `policy`.

        Starts our own server, or loads into those of `engine.urls`. The client's context is left in the same event
        loop. Adapters are served beside the base model, each version under a new name, or are merged and loaded in
        place (where.engine.adapters). Waits while others of our clients use the servers with other weights, or within
        limits that are too narrow for these settings.
        """
        where = self.where.engine
        adapter = None if policy.is_full or not await self._serves_adapters() else policy.digest
        if adapter is not None:
            Base(**base.entry(policy)).checked(policy.json("policy/state.json"))
        user = object()
        while not self._users.join(user, "adapters" if adapter else policy.digest, lambda: self._fits(settings)):
            self._check()
            await asyncio.sleep(0.1)
        leave = functools.partial(self._users.leave, user)
        # Our own server reads images from our scratch folder; others may not share the disk, or not admit the folder.
        media = "data" if where.urls else "file"
        try:
            urls = where.urls or self.servers(policy, adapter, settings, base).urls
            client = EngineClient(
                urls, media=media, concurrency=where.concurrency, timeout_s=where.timeout_s, on_close=leave
            )
        except BaseException:
            leave()
            raise
        try:
            await client.leave_out_dead()
            if adapter is not None:
                await client.load_adapter(adapter, policy.adapter_directory)
            else:
                while not self._loading.acquire(blocking=False):  # two stages may ask for one policy at a time
                    self._check()
                    await asyncio.sleep(0.1)
                try:
                    if set((await client.versions()).values()) != {policy.digest}:
                        await client.load_weights(self.weights(policy, base), policy.digest)
                    client.version = policy.digest
                finally:
                    self._loading.release()
        except BaseException:
            await client.__aexit__()
            raise
        return client

    def _fits(self, settings: EngineSettings) -> bool:
        """Tell whether the servers serve these settings as they are."""
        servers = self._servers.get("engine")
        return bool(self.where.engine.urls) or (
            servers is not None and servers.alive and servers.settings.limits.covers(settings)
        )

    async def _serves_adapters(self) -> bool:
        where = self.where.engine
        if where.adapters != "auto" or not where.urls:
            return serves_adapters(where)
        async with EngineClient(where.urls, media="data") as client:
            await client.leave_out_dead()
            return await client.takes_adapters()

    def servers(self, policy: Policy, adapter: str | None, settings: EngineSettings, base: BaseSource) -> Servers:
        """Return our own servers within these limits, with the weights of their start or those loaded since."""
        rank = policy.adapter_rank if adapter else None
        asked = ServerSettings(settings, self.where.engine, rank, self._sleeps)

        def model() -> Path:
            return locate_base(base, policy) if adapter else self.weights(policy, base)

        return self._serve("engine", asked, model, "base" if adapter else policy.digest)

    def teacher(self, first: Policy, settings: EngineSettings, base: BaseSource) -> Server:
        """Return the second server, which holds the frozen first policy and judges the images of later ones."""
        where, engine = self.where.teacher, self.where.engine
        share = {
            "max_num_seqs": where.concurrency,
            "tensor_parallel_size": 1,
            "devices": where.devices or engine.devices and engine.devices[:1],
            "gpu_memory_utilization": where.gpu_memory_utilization,
            "cpu_kvcache_gib": 1,
            "cpu_threads_bind": where.cpu_threads_bind,
        }
        asked = ServerSettings(settings, engine.model_copy(update=share), None, self._sleeps)
        with self._lock:
            self._frozen = first.digest
        return self._serve("teacher", asked, lambda: self.weights(first, base), first.digest).each[0]

    def _serve(
        self, name: Literal["engine", "teacher"], asked: ServerSettings, model: Callable[[], Path], version: str
    ) -> Servers:
        """Return the kept servers of this name, started (again) where none run with limits as wide as these."""
        with self._starts[name]:
            self._begin()
            self._make_room(name)
            servers = self._servers.get(name)
            if servers is not None:
                limits = servers.settings.limits
                if not (limits.covers(asked.limits) and servers.alive):
                    servers.stop()
                asked = replace(asked, limits=limits.widened(asked.limits))
            if servers is None or not servers.alive:
                closure.check_closure()
                if name == "engine":
                    asked = replace(asked, media_dir=self.media)
                servers = Servers(model(), log=self.log, version=version, settings=asked, progress=self.say, name=name)
                self._stack.callback(servers.stop)  # of servers that were stopped it does nothing
                self._starting.add(servers)
                try:
                    servers.start()
                finally:
                    self._starting.remove(servers)
                self._servers[name] = servers
            servers.wake()
            return servers

    def encoder(self, settings: clip.ClipName, own: Clip | None) -> clip.Encoder:
        """Return the CLIP of these settings, or of the artifact `own`; it is kept until another one is asked for."""
        with self._lock:
            source = clip.locate_clip(settings, own)
            if self._encoder is None or self._encoder[0] != source:
                self._encoder = source, clip.load_encoder(*source)
            return self._encoder[1]

    def release_encoder(self) -> None:
        """Free the CLIP and its memory, where engine and trainer need that."""
        with self._lock:
            if self._encoder is not None and self.where.takes_turns:
                import torch

                self._encoder = None
                torch.cuda.empty_cache()

    @property
    def scratch(self) -> Path:
        """Temporary directory, removed with the resources."""
        with self._lock:
            if self._scratch is None:
                self._scratch = self._stack.enter_context(process.scratch())
            return self._scratch

    @property
    def media(self) -> Path:
        """Folder in which the engine finds the images of running conversations."""
        folder = self.scratch / "media"
        with writing(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def weights(self, policy: Policy, base: BaseSource) -> Path:
        """Return a complete model directory: the policy's, or the base model's with the adapter merged (in scratch).

        Beside the teacher's there is one merged model, of the last policy that was asked for.
        """
        if policy.is_full:
            return policy.model_directory
        with importing:
            import peft  # noqa: F401  it imports transformers, and export_merged imports it

            from thinkimg.trainer.checkpoint import export_merged

        with self._lock:  # two judges may ask for two policies at a time
            merged = self.scratch / f"merged-{policy.digest[:16]}"
            if not merged.exists():
                frozen = self._frozen and f"merged-{self._frozen[:16]}"
                # While the teacher's is made, the engine may be starting with the other one.
                for old in self.scratch.glob("merged-*") if merged.name != frozen else ():
                    if old.name != frozen:
                        shutil.rmtree(old)
                half = self.scratch / "half-merged"
                shutil.rmtree(half, ignore_errors=True)
                with writing(half):
                    export_merged(policy.directory / "policy", half, base=Base(**base.entry(policy)))
                    half.rename(merged)
        return merged

    def log(self, name: str) -> Path:
        """Return the path of a process's log."""
        folder = Path(self.where.store) / "logs"
        files.make_directory(folder)
        return folder / f"{name}.log"


def serves_adapters(engine: EngineConfig) -> bool:
    """Tell whether a server of ours serves adapters beside the base model."""
    return engine.adapters == "always" or engine.adapters == "auto" and not closure.on_cpu()


def exec_server(server: ServerSettings, base: BaseSource, policy: Policy | None, *, host: str, port: int) -> NoReturn:
    """Replace this process by a server for the `engine.urls` of loops.

    It starts with the weights of a full policy, else with those of the base model. Its clients load what they need:
    adapters under names of their own, full weights in place.
    """
    closure.check_closure()
    if len(parts := server.engine.split(cpu=closure.on_cpu())) > 1:
        raise UserError(
            f"`thinkimg serve` is one server, and where.engine places {len(parts)}.",
            hint="Raise where.engine.tensor_parallel_size, or start a server for each part.",
        )
    if policy is not None and policy.is_full:
        model = policy.model_directory
    elif base.tiny:
        raise UserError("The tiny preset has no model before its warm start.", hint="Name a policy: --policy …")
    else:
        model = locate_base(base, policy)
    argv = server_command(str(model), port, server, host)
    os.execvpe(argv[0], argv, server_environment(os.environ, str(model), server))


def locate_base(base: BaseSource, policy: Policy | None = None) -> Path:
    """Return the directory of the base model, of a policy's own if one is given; it is downloaded if need be."""
    return Base(**base.entry(policy)).locate()
