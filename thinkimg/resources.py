"""What a loop starts once and keeps: a vLLM engine and a trainer, each when the first stage needs it.

A loop that finds everything cached starts neither. A stage that runs alone opens machines of its own.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from thinkimg import closure, process
from thinkimg.config import Config
from thinkimg.errors import UserError
from thinkimg.models.base import base_entry

if TYPE_CHECKING:
    from thinkimg.engine.client import EngineClient
    from thinkimg.engine.server import Server, ServerSettings
    from thinkimg.store.artifacts import Artifact
    from thinkimg.trainer.worker import Trainer

CURRENT: ContextVar["Machines | None"] = ContextVar("machines", default=None)

take_device: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
"""Entered before anything is started and left after all has ended; the flows put a queue here, for machines that several
runs share."""


class Machines:
    """Context manager; ends everything that it started. `report` takes lines about slow starts."""

    def __init__(self, config: Config, report=print):
        self.config, self.report = config, report
        self._stack = contextlib.ExitStack()
        self._server: Server | None = None
        self._trainer: Trainer | None = None
        self._teacher: Server | None = None
        self._frozen: str | None = None  # digest of the teacher's weights
        self._merging = threading.Lock()

    def __enter__(self) -> "Machines":
        self._stack.__enter__()
        self._stack.enter_context(take_device())
        self.scratch = self._stack.enter_context(process.scratch())
        self._stack.callback(CURRENT.reset, CURRENT.set(self))
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    @property
    def trainer(self) -> "Trainer":
        """The kept worker, started by the first job."""
        from thinkimg.trainer.worker import Trainer

        self._make_room()
        if self._trainer is None:
            closure.check_closure()
            self._trainer = self._stack.enter_context(Trainer(self.config.where.trainer, log_path=self.log("trainer")))
        return self._trainer

    def _make_room(self, wanted: "Server | None" = None) -> None:
        """Where one machine at a time fits into the memory: put the other servers to sleep, or end those that can't."""
        if not self.config.where.engine.keep:
            for server in (self._server, self._teacher):
                if server is not None and server is not wanted:
                    if server.settings.sleeps:
                        server.sleep()
                    else:
                        server.stop()

    @property
    def _sleeps(self) -> bool:
        """Whether servers sleep while it is another's turn: a GPU's can."""
        return not self.config.where.engine.keep and not closure.on_cpu()

    async def engine(self, policy: "Artifact") -> tuple["EngineClient", str | None]:
        """A client whose servers hold `policy`, and the adapter's name where it is one: starts the loop's own server, or
        loads into those of `engine.urls`. Leave the client's context in the same event loop.

        On a GPU adapters are served beside the base model, under a new name for each version; on a CPU, where vLLM's
        adapters are 46 times slower, merged weights are loaded in place.
        """
        from thinkimg.engine.client import EngineClient

        where = self.config.where.engine
        adapter = None if is_full(policy) or closure.on_cpu() else policy.digest
        urls = where.urls or [self.server(policy, adapter).url]
        # Our own server reads the pictures of our scratch folder; others may neither share the disk nor admit the folder.
        media = "data" if where.urls else "file"
        client = EngineClient(urls, media=media, concurrency=where.concurrency, timeout_s=where.timeout_s)
        try:
            await client.leave_out_dead()
            if adapter is not None:
                await client.load_adapter(adapter, policy.checked("policy/adapter"))
            elif set((await client.versions()).values()) != {policy.digest}:
                await client.load_weights(self.weights(policy), policy.digest)
        except BaseException:
            await client.__aexit__()
            raise
        return client, adapter

    def server(self, policy: "Artifact", adapter: str | None) -> "Server":
        from thinkimg.engine.server import Server

        self._make_room(self._server)
        if self._server is None or not self._server.alive:
            closure.check_closure()
            settings = engine_settings(self.config, adapters=adapter is not None, sleeps=self._sleeps)
            model = base_directory(self.config) if adapter else self.weights(policy)
            version = "base" if adapter else policy.digest
            server = Server(
                model, log_path=self.log("engine"), version=version, settings=settings,
                media_dir=self.media, progress=self.report,
            )  # fmt: skip
            self._server = self._stack.enter_context(server)  # leaving a server that was stopped does nothing
        self._server.wake()
        return self._server

    def teacher(self, founder: "Artifact") -> "Server":
        """The second server, with the frozen first policy, which judges what later ones make."""
        from thinkimg.engine.server import Server, ServerSettings

        self._make_room(self._teacher)
        if self._teacher is None or not self._teacher.alive:
            closure.check_closure()
            config, where = self.config, self.config.where
            settings = ServerSettings(
                max_model_len=config.conversation.max_tokens,
                max_images=2,
                max_num_seqs=where.teacher.concurrency,
                dtype=config.model.dtype,
                max_pixels=max(config.images.max_pixels, ServerSettings.max_pixels),
                gpu_memory_utilization=where.teacher.gpu_memory_utilization,
                cpu_kvcache_gib=1,
                cpu_threads_bind=where.teacher.cpu_threads_bind,
                sleeps=self._sleeps,
            )
            self._frozen = founder.digest
            server = Server(
                self.weights(founder), log_path=self.log("teacher"), version=founder.digest, settings=settings,
                progress=self.report, name="teacher",
            )  # fmt: skip
            self._teacher = self._stack.enter_context(server)
        self._teacher.wake()
        return self._teacher

    @property
    def media(self) -> Path:
        """Folder in which the engine finds the pictures of running conversations."""
        folder = self.scratch / "media"
        folder.mkdir(exist_ok=True)
        return folder

    def vocabulary(self, policy: "Artifact") -> Path:
        """The directory with the policy's tokenizer, processor and chat template."""
        return policy.checked(f"policy/{'model' if is_full(policy) else 'adapter'}")

    def weights(self, policy: "Artifact") -> Path:
        """A complete model directory: the policy's own, or for adapters the base model with them merged in (in scratch)."""
        if is_full(policy):
            return policy.checked("policy/model")
        from thinkimg.trainer.checkpoint import Base, export_merged

        with self._merging:  # judges ask for two policies' at a time
            merged = self.scratch / f"merged-{policy.digest[:16]}"
            if not merged.exists():
                for old in self.scratch.glob("merged-*"):
                    if self._frozen is None or old.name != f"merged-{self._frozen[:16]}":
                        shutil.rmtree(old)
                half = self.scratch / "half-merged"
                shutil.rmtree(half, ignore_errors=True)
                export_merged(policy.directory / "policy", half, base=Base(**base_entry(self.config)))
                half.rename(merged)
        return merged

    def log(self, name: str) -> Path:
        folder = Path(self.config.where.store) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"


def engine_settings(config: Config, *, adapters: bool, sleeps: bool = False) -> "ServerSettings":
    """How a server runs that plays this config's rollouts; adapters: it serves them beside the base model."""
    from thinkimg.engine.server import ServerSettings

    where = config.where.engine
    return ServerSettings(
        max_model_len=config.conversation.max_tokens,
        max_images=config.conversation.max_images,
        max_num_seqs=where.max_num_seqs,
        max_lora_rank=config.model.lora_rank if adapters else None,
        dtype=config.model.dtype,
        max_pixels=max(config.images.max_pixels, ServerSettings.max_pixels),
        tensor_parallel_size=where.tensor_parallel_size,
        gpu_memory_utilization=where.gpu_memory_utilization,
        cpu_kvcache_gib=where.cpu_kvcache_gib,
        cpu_threads_bind=where.cpu_threads_bind,
        sleeps=sleeps,
    )


def serve(config: Config, policy: "Artifact | None", host: str, port: int) -> NoReturn:
    """Become a server for the `engine.urls` of loops: with a whole policy's weights, else with the base model's.

    Whoever uses it loads what he needs: adapters under names of their own, whole weights in place.
    """
    from thinkimg.engine.server import server_command, server_environment

    closure.check_closure()
    if policy is not None and is_full(policy):
        model = policy.checked("policy/model")
    elif config.model.tiny is not None:
        raise UserError("The tiny preset's model is made by its warm start.", hint="name a policy: --policy …")
    else:
        model = base_directory(config)
    settings = engine_settings(config, adapters=config.model.adaptation == "lora" and not closure.on_cpu())
    argv = server_command(str(model), port, settings, None, host)
    os.execvpe(argv[0], argv, server_environment(os.environ, str(model), settings))


def base_directory(config: Config) -> Path:
    """Of the base model, downloaded if need be."""
    from thinkimg.trainer.checkpoint import Base

    return Base(**base_entry(config)).locate()


def is_full(policy: "Artifact") -> bool:
    """Whether the policy is a whole model and not an adapter."""
    return "policy/model/config.json" in policy.files


@contextlib.contextmanager
def machines(config: Config, report=print) -> Iterator[Machines]:
    """The loop's machines where there are some, else new ones for this stage alone."""
    if (current := CURRENT.get()) is not None:
        yield current
    else:
        with Machines(config, report) as own:
            yield own
