"""Resources that a loop keeps: a vLLM engine, a second one for a teacher, and a trainer, each from its first use on.

They are made from `where` alone. A stage asks with its own settings: a kept engine that runs otherwise is started again.
A loop that finds everything cached starts none.
"""

import asyncio
import contextlib
import functools
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from thinkimg import closure, process
from thinkimg.engine.client import EngineClient
from thinkimg.engine.server import Server, ServerSettings, server_command, server_environment
from thinkimg.engine.settings import EngineSettings
from thinkimg.errors import UserError
from thinkimg.models import clip
from thinkimg.models.base import Base, BaseSource
from thinkimg.models.importing import importing
from thinkimg.resource_settings import ResourcesConfig
from thinkimg.store.kinds import Clip, Policy
from thinkimg.trainer.client import Trainer

Device = Callable[[Callable[[], None]], contextlib.AbstractContextManager]
"""A queue for the machine's device, where several runs share it; given a function that raises once nobody waits any more."""


class Resources:
    """Context manager, for several threads; ends everything that it started.

    say: takes lines about slow starts. device: entered before anything is started, left after all has ended.
    """

    def __init__(
        self, where: ResourcesConfig, say: Callable[[str], None] = print, device: Device = contextlib.nullcontext
    ):
        self.where, self.say, self._device = where, say, device
        self._stack = contextlib.ExitStack()
        self._lock, self._loading = threading.RLock(), threading.Lock()
        self._starting: Server | None = None
        self._holds_device = self._closed = False
        self._servers: dict[str, Server] = {}
        self._settings: dict[str, EngineSettings] = {}
        self._trainer: Trainer | None = None
        self._encoder: tuple[tuple[str, str | None], clip.Encoder] | None = None
        self._frozen: str | None = None  # digest of the teacher's weights

    def __enter__(self) -> "Resources":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """End everything; what is asked for afterwards is refused."""
        self._closed = True
        while not self._lock.acquire(timeout=0.1):
            if (starting := self._starting) is not None:
                starting.stop()  # whoever starts it holds the lock, and learns that it ended
        try:
            self._stack.close()
        finally:
            self._lock.release()

    @property
    def exclusive(self) -> bool:
        """Whether engine and trainer take turns in the memory."""
        return not (self.where.engine.keep and self.where.trainer.keep)

    def _begin(self) -> None:
        self._check()
        if not self._holds_device:
            self._stack.enter_context(self._device(self._check))
            self._holds_device = True

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("the resources have been closed")

    @property
    def trainer(self) -> Trainer:
        """The kept worker, started by the first job."""
        with self._lock:
            self._begin()
            self._make_room()
            if self._trainer is None:
                closure.check_closure()
                self._trainer = self._stack.enter_context(Trainer(self.where.trainer, log_path=self.log("trainer")))
            return self._trainer

    def _make_room(self, wanted: str | None = None) -> None:
        """Where one of them at a time fits into the memory: put the other servers to sleep, or end those that can't."""
        if not self.where.engine.keep:
            for name, server in self._servers.items():
                if name != wanted and server.settings.sleeps:
                    server.sleep()
                elif name != wanted:
                    server.stop()

    @property
    def _sleeps(self) -> bool:
        """Whether servers sleep while it is another's turn: a GPU's can."""
        return not self.where.engine.keep and not closure.on_cpu()

    async def engine(
        self, policy: Policy, settings: EngineSettings, base: BaseSource
    ) -> tuple[EngineClient, str | None]:
        """A client whose servers hold `policy`, and the adapter's name where it is one: starts our own server, or loads into
        those of `engine.urls`. Leave the client's context in the same event loop.

        On a GPU adapters are served beside the base model, under a new name for each version; on a CPU, where vLLM's
        adapters are 46 times slower, merged weights are loaded in place.
        """
        where = self.where.engine
        adapter = None if policy.is_full or closure.on_cpu() else policy.digest
        if adapter is not None:
            Base(**base.entry()).checked(policy.json("policy/state.json"))
        with self._lock:
            urls = where.urls or [self.server(policy, adapter, settings, base).url]
        # Our own server reads the pictures of our scratch folder; others may neither share the disk nor admit the folder.
        media = "data" if where.urls else "file"
        client = EngineClient(urls, media=media, concurrency=where.concurrency, timeout_s=where.timeout_s)
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
                finally:
                    self._loading.release()
        except BaseException:
            await client.__aexit__()
            raise
        return client, adapter

    def server(self, policy: Policy, adapter: str | None, settings: EngineSettings, base: BaseSource) -> Server:
        """Our own server, running as `settings` ask for; with the weights that it was started with, or was given since."""

        def vllm(settings: EngineSettings) -> ServerSettings:
            rank = policy.adapter_rank if adapter else None
            return server_settings(self.where, settings, lora_rank=rank, sleeps=self._sleeps)

        def model() -> Path:
            return base_directory(base) if adapter else self.weights(policy, base)

        return self._serve("engine", settings, vllm, model, "base" if adapter else policy.digest)

    def teacher(self, first: Policy, settings: EngineSettings, base: BaseSource) -> Server:
        """The second server, with the frozen first policy, which judges what later ones make."""
        where = self.where.teacher

        def vllm(settings: EngineSettings) -> ServerSettings:
            engine = self.where.engine.model_copy(
                update={
                    "max_num_seqs": where.concurrency,
                    "tensor_parallel_size": 1,
                    "gpu_memory_utilization": where.gpu_memory_utilization,
                    "cpu_kvcache_gib": 1,
                    "cpu_threads_bind": where.cpu_threads_bind,
                }
            )
            place = self.where.model_copy(update={"engine": engine})
            return server_settings(place, settings, lora_rank=None, sleeps=self._sleeps)

        with self._lock:
            self._frozen = first.digest
        return self._serve("teacher", settings, vllm, lambda: self.weights(first, base), first.digest)

    def _serve(
        self,
        name: str,
        settings: EngineSettings,
        vllm: Callable[[EngineSettings], ServerSettings],
        model: Callable[[], Path],
        version: str,
    ) -> Server:
        """The kept server of this name, started (again) where it is not there or does not run as `settings` ask for."""
        with self._lock:
            self._begin()
            self._make_room(name)
            server = self._servers.get(name)
            if server is not None:
                if not self._settings[name].covers(settings):
                    server.stop()
                settings = self._settings[name].widened(settings)
            if server is None or not server.alive:
                closure.check_closure()
                media = self.media if name == "engine" else None
                self._starting = server = Server(
                    model(), log_path=self.log(name), version=version, settings=vllm(settings),
                    media_dir=media, progress=self.say, name=name,
                )  # fmt: skip
                try:
                    self._stack.enter_context(server)  # leaving a server that was stopped does nothing
                finally:
                    self._starting = None
                self._servers[name], self._settings[name] = server, settings
            server.wake()
            return server

    def encoder(self, settings: clip.ClipName, own: Clip | None) -> clip.Encoder:
        """The CLIP of these settings, or of the artifact `own`; kept until another one is asked for."""
        with self._lock:
            source = clip.source(settings, own)
            if self._encoder is None or self._encoder[0] != source:
                self._encoder = source, clip.load(*source)
            return self._encoder[1]

    def release_encoder(self) -> None:
        """Let go of the CLIP, and of its memory on a GPU, where engine or trainer want it next."""
        if self._encoder is not None and self.exclusive:
            import torch

            self._encoder = None
            torch.cuda.empty_cache()

    @functools.cached_property
    def scratch(self) -> Path:
        """A directory that goes with the resources."""
        with self._lock:
            return self._stack.enter_context(process.scratch())

    @property
    def media(self) -> Path:
        """Folder in which the engine finds the pictures of running conversations."""
        folder = self.scratch / "media"
        folder.mkdir(exist_ok=True)
        return folder

    def weights(self, policy: Policy, base: BaseSource) -> Path:
        """A complete model directory: the policy's own, or for adapters the base model with them merged in (in scratch)."""
        if policy.is_full:
            return policy.model_directory
        with importing:
            import peft  # noqa: F401  it imports transformers, and export_merged imports it

            from thinkimg.trainer.checkpoint import export_merged

        with self._lock:  # judges ask for two policies' at a time
            merged = self.scratch / f"merged-{policy.digest[:16]}"
            if not merged.exists():
                for old in self.scratch.glob("merged-*"):
                    if self._frozen is None or old.name != f"merged-{self._frozen[:16]}":
                        shutil.rmtree(old)
                half = self.scratch / "half-merged"
                shutil.rmtree(half, ignore_errors=True)
                export_merged(policy.directory / "policy", half, base=Base(**base.entry()))
                half.rename(merged)
        return merged

    def log(self, name: str) -> Path:
        folder = Path(self.where.store) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"


def server_settings(
    where: ResourcesConfig, settings: EngineSettings, *, lora_rank: int | None, sleeps: bool = False
) -> ServerSettings:
    """How a server runs that does what `settings` ask for; lora_rank: it serves adapters of this rank beside the base model."""
    engine = where.engine
    return ServerSettings(
        max_model_len=settings.max_tokens,
        max_images=settings.max_images,
        max_num_seqs=engine.max_num_seqs,
        max_lora_rank=lora_rank,
        dtype=settings.dtype,
        max_pixels=max(settings.max_pixels, ServerSettings.max_pixels),
        tensor_parallel_size=engine.tensor_parallel_size,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        cpu_kvcache_gib=engine.cpu_kvcache_gib,
        cpu_threads_bind=engine.cpu_threads_bind,
        sleeps=sleeps,
    )


def serve(
    where: ResourcesConfig,
    settings: EngineSettings,
    base: BaseSource,
    policy: Policy | None,
    lora_rank: int | None,
    *,
    host: str,
    port: int,
) -> NoReturn:
    """Become a server for the `engine.urls` of loops: with a whole policy's weights, else with the base model's.

    Whoever uses it loads what he needs: adapters under names of their own, whole weights in place.
    """
    closure.check_closure()
    if policy is not None and policy.is_full:
        model = policy.model_directory
    elif base.tiny:
        raise UserError("The tiny preset's model is made by its warm start.", hint="name a policy: --policy …")
    else:
        model = base_directory(base)
    vllm = server_settings(where, settings, lora_rank=None if closure.on_cpu() else lora_rank)
    argv = server_command(str(model), port, vllm, None, host)
    os.execvpe(argv[0], argv, server_environment(os.environ, str(model), vllm))


def base_directory(base: BaseSource) -> Path:
    """Of the base model, downloaded if need be."""
    return Base(**base.entry()).locate()
