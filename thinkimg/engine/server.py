"""Server of vLLM on localhost, a child process."""

import json
import os
import re
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from thinkimg import closure
from thinkimg.devices import select_gpus
from thinkimg.engine.errors import EngineError
from thinkimg.engine.settings import EngineConfig, EngineSettings
from thinkimg.environment import CONNECTION_ERRORS, child_environment, is_healthy, open_local
from thinkimg.errors import UserError, shorten
from thinkimg.models.base import check_model
from thinkimg.models.family import family_at
from thinkimg.process import Child, free_port, spawn

SERVED_NAME = "policy"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has kernels for
ADAPTERS = 2  # that play at once: with a lag one policy plays while another one is evaluated, or judges
READY_TIMEOUT_S = 1800.0  # a 7B from a cold disk, with compilation; a tiny model on a CPU takes half a minute
REPORT_EVERY_S = 30.0
TOKENS = 1280  # of the largest picture that the processor admits, at least; views come at their final size
CPU_BATCHED_TOKENS = 8192  # at least, so that no prompt is prefilled in pieces
PHASES = {
    "Resolved architecture": "starting its processes",
    "Starting to load model": "loading the model's weights",
    "Loading weights took": "reserving the cache and compiling",
    "init engine": "opening its port",
}
"""Text in vLLM's log -> what the server does from there on, in order."""
# An error says what happened, seldom what to do about it.
LOG_HINTS = {
    "No available memory for the cache blocks": "raise gpu_memory_utilization, or cpu_kvcache_gib on a CPU",
    "out of memory": "lower gpu_memory_utilization or max_num_seqs, or raise tensor_parallel_size",
    "Free memory on device": "another process holds the GPU's memory: end it, or lower gpu_memory_utilization",
    "derived max_model_len": "lower conversation.max_tokens to what the model's config allows",
    "ddress already in use": "start it again: another process took the port in the meantime",
    "torchvision::nms": "torchvision is a CUDA build and torch is not: install thinkimg again, or run `make setup`",
    "Failed to infer device type": "torch sees no GPU: CUDA 13 needs driver 580 or later, see `nvidia-smi`",
    "No space left on device": "free some space there, or set TMPDIR to another directory",
    "No module named": "the environment is incomplete: install the closure in requirements/ again",
}
# "(EngineCore pid=1) ERROR 11-22 15:27:25 [core.py:1] ValueError: message", or an exception at the start of a line
CAUSE = re.compile(r"(?:^|\] )((?:cannot start |(?:\w+\.)*\w*(?:Error|Exception|Interrupt): ).+)$", re.MULTILINE)


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server: the limits that a stage asks for, and how it uses the machine."""

    limits: EngineSettings
    engine: EngineConfig = EngineConfig()
    max_lora_rank: int | None = None
    """Highest rank of the adapters that it serves beside the model; None: no adapters, which on a CPU take 46 times as
    long."""
    sleeps: bool = False
    """True if `sleep` can free the GPU's memory."""
    media_dir: Path | None = None
    """Folder from which file:// images are admitted; None admits none."""


class Server:
    """Server of vLLM: entering the context starts it and waits until it is ready, leaving the context ends it.

    model: local directory or Hub id. log_path: its log, appended to. version: weight version that it reports until
    other weights are loaded. progress: called with a line now and then while it starts. Raises UserError if there is no
    model directory, EngineError if it does not start.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        log_path: Path,
        version: str,
        settings: ServerSettings,
        progress: Callable[[str], None] = lambda line: None,
        name: str = "engine",
    ):
        self.model, self.log_path, self.version, self.settings = str(model), log_path, version, settings
        self.progress, self.name = progress, name
        self.url = ""
        self._child: Child | None = None
        self._asleep = False
        self._stopping = threading.Lock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        """True while its process runs."""
        return self._child is not None and self._child.alive

    def start(self, timeout: float = READY_TIMEOUT_S) -> None:
        """Start the server and wait until it is ready, `timeout` seconds at most."""
        check_model(self.model)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        argv = server_command(self.model, port, self.settings)
        env = server_environment(os.environ, self.model, self.settings)
        self._child = child = spawn(argv, name=self.name, env=env, log_path=self.log_path)
        try:
            self._wait(child, timeout)
            post(f"{self.url}/update_weight_version", {"new_version": self.version})
        except BaseException as error:
            try:
                if not isinstance(error, Exception):  # a signal
                    with suppress(OSError):  # of a stderr that nobody reads
                        self.progress(f"{self.name}: stopping")
            finally:
                self.stop()
            raise

    def stop(self) -> None:
        """End the server and all its processes, if it runs; any thread may call this."""
        with self._stopping:
            if self._child is not None:
                self._child.terminate(timeout=5)
                self._child, self._asleep = None, False

    def sleep(self) -> None:
        """Free the GPU's memory: the weights move to the machine's memory, the KV cache is dropped.

        No request may run now, and none may be sent before `wake`.
        """
        if self.alive and not self._asleep:
            post(f"{self.url}/sleep?level=1", {})
            self._asleep = True

    def wake(self) -> None:
        """Take the GPU's memory again, if the server sleeps."""
        if self._asleep:
            post(f"{self.url}/wake_up", {})
            self._asleep = False

    def _wait(self, child: Child, timeout: float) -> None:
        started, reported, phase = time.monotonic(), -REPORT_EVERY_S, "loading vLLM"
        while not is_healthy(f"{self.url}/health"):
            elapsed = time.monotonic() - started
            if not child.alive:
                raise self._error(child, f"ended with status {child.returncode} after {elapsed:.0f} s")
            if elapsed > timeout:
                raise self._error(child, f"was not ready after {timeout:.0f} s")
            log = child.log_tail(1000)
            latest = next((phase for text, phase in reversed(PHASES.items()) if text in log), phase)
            if latest != phase or elapsed - reported >= REPORT_EVERY_S:
                reported, phase = elapsed, latest
                self.progress(f"{self.name}: {phase} ({elapsed:.0f} s)")
            time.sleep(0.1)
        self.progress(f"{self.name}: ready after {time.monotonic() - started:.0f} s at {self.url}")

    def _error(self, child: Child, event: str) -> EngineError:
        log = child.log_tail(1000)
        # The first exception is the cause, those behind it are processes that lost each other.
        cause = CAUSE.search(log)
        reason = f": {cause[1]}" if cause else ""
        hint = next(
            (hint for symptom, hint in LOG_HINTS.items() if cause and symptom in cause[1]), f"read {self.log_path}"
        )
        tail = "\n".join(log.splitlines()[-12:])
        return EngineError(f"the vLLM server for {self.model} {event}{reason}\nIts log ends with\n{tail}", hint=hint)


def server_command(model: str, port: int, settings: ServerSettings, host: str = "127.0.0.1") -> list[str]:
    """Return a server's command line.

    host: interface that it listens on; whoever reaches the port can change the weights (development mode).
    Raises UserError for a precision in which vLLM does not serve the model's family, or a family that is unknown.
    """
    cpu = closure.on_cpu()
    limits, engine = settings.limits, settings.engine
    family = family_at(model)
    if limits.dtype not in (precisions := family.precisions(cpu=cpu)):
        raise UserError(
            f"vLLM serves a {family.name} on a {'CPU' if cpu else 'GPU'} in {' or '.join(precisions)}, "
            f"not in {limits.dtype}.",
            hint="Leave model.dtype null.",
        )
    token = family.processor.token_side**2
    options: dict[str, object] = {
        "model": model,
        "served-model-name": SERVED_NAME,
        "host": host,
        "port": port,
        "dtype": limits.dtype,
        "max-model-len": limits.max_tokens,
        "max-num-seqs": engine.max_num_seqs,
        "max-num-batched-tokens": max(limits.max_tokens, CPU_BATCHED_TOKENS) if cpu else None,
        "tensor-parallel-size": engine.tensor_parallel_size,
        "gpu-memory-utilization": None if cpu else engine.gpu_memory_utilization,
        # What we compare with the trainer are the log-probabilities of the distribution that was sampled from.
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": 128,
        "generation-config": "vllm",  # no sampling defaults from the model's files
        "limit-mm-per-prompt": json.dumps({"image": limits.max_images, "video": 0}),
        "mm-processor-kwargs": json.dumps(
            {"size": {"shortest_edge": token, "longest_edge": max(TOKENS * token, limits.max_pixels)}}
        ),
        "mm-processor-cache-gb": 1 if cpu else 4,
        "allowed-local-media-path": settings.media_dir.resolve() if settings.media_dir else None,
        "uvicorn-log-level": "warning",
        "worker-extension-cls": "thinkimg.engine.worker.WeightLoader",
    }
    flags: list[str] = ["enable-scale-out", "enable-prefix-caching", "disable-uvicorn-access-log", "disable-log-stats"]
    if cpu:
        # A request with a seed kills the CPU engine if its prompt is prefilled in pieces.
        flags += ["no-enable-chunked-prefill", "skip-mm-profiling", "enforce-eager"]
    if settings.max_lora_rank is not None:
        flags.append("enable-lora")
        options |= {"max-lora-rank": round_rank(settings.max_lora_rank), "max-loras": ADAPTERS}
    if settings.sleeps:
        flags += ["enable-sleep-mode", "sleep-mode-offload-cudagraph"]
    argv = [sys.executable, "-m", "thinkimg.engine.serve" if cpu else "vllm.entrypoints.launchers.api_server.entry"]
    options |= dict.fromkeys(flags, True) | dict(family.engine_options(cpu=cpu))
    for name, value in options.items():
        if value is not None:
            argv += [f"--{name}", *([] if value is True else [str(value)])]
    return argv


def round_rank(rank: int) -> int:
    """Return the rank that vLLM reserves for adapters of this one."""
    return next(step for step in LORA_RANKS if step >= rank)


def server_environment(base: Mapping[str, str], model: str, settings: ServerSettings) -> dict[str, str]:
    """Return a server's environment, made from the caller's by the rule for engines. model: directory or Hub id.

    Raises UserError where there are no such GPUs as the settings name.
    """
    own = select_gpus("where.engine.devices", settings.engine.devices, base)
    if Path(model).is_dir():
        own["HF_HUB_OFFLINE"] = "1"
    if settings.max_lora_rank is not None:
        own["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if closure.on_cpu():
        own["VLLM_CPU_KVCACHE_SPACE"] = str(settings.engine.cpu_kvcache_gib)
        if settings.engine.cpu_threads_bind is not None:
            own["VLLM_CPU_OMP_THREADS_BIND"] = settings.engine.cpu_threads_bind
    return child_environment("engine", base, own)


def post(url: str, body: dict) -> None:
    """Send JSON to a server. Raises EngineError where it answers with an error, or does not answer."""
    try:
        with open_local(url, timeout=60, body=json.dumps(body).encode()):
            pass
    except urllib.error.HTTPError as error:
        answer = shorten(error.read().decode(errors="replace"), 500)
        raise EngineError(f"{url} answered {error.code}: {answer}") from error
    except CONNECTION_ERRORS as error:  # time-outs and connections that broke
        raise EngineError(f"{url} did not answer ({type(error).__name__}: {shorten(str(error))})") from error
