"""Starts a vLLM server on localhost as a child process and waits until it answers."""

import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from thinkimg import closure
from thinkimg.engine.errors import EngineError
from thinkimg.errors import UserError
from thinkimg.process import Child, free_port, spawn

SERVED_NAME = "policy"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM has kernels for
PACKAGE_ROOT = Path(__file__).parents[2]
READY_TIMEOUT_S = 1800.0  # a 7B from a cold disk, with compilation; a tiny model on a CPU takes half a minute
# An error says what happened, seldom what to do about it.
HINTS = {
    "No available memory for the cache blocks": "raise gpu_memory_utilization, or cpu_kvcache_gib on a CPU",
    "out of memory": "lower gpu_memory_utilization or max_num_seqs, or raise tensor_parallel_size",
    "Free memory on device": "another process holds the GPU's memory: end it, or lower gpu_memory_utilization",
    "derived max_model_len": "lower max_model_len to what the model's config allows",
    "ddress already in use": "start it again: somebody took the port in the meantime",
    "torchvision::nms": "torchvision is a CUDA build and torch is not: install thinkimg again, or run `make setup`",
    "Failed to infer device type": "torch finds no GPU: `nvidia-smi` tells the driver's version, CUDA 13 needs 580 or later",
    "No module named": "the environment is incomplete: install the closure in requirements/ again",
}
# "(EngineCore pid=1) ERROR 11-22 15:27:25 [core.py:1] ValueError: message", or an exception at the start of a line
CAUSE = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)$", re.MULTILINE)


@dataclass(frozen=True)
class ServerSettings:
    """How a server runs. None of it belongs into a fingerprint but `dtype` and `max_model_len`."""

    max_model_len: int = 8192
    max_images: int = 16
    """Images per prompt, those that tools made included."""
    min_pixels: int = 28 * 28
    max_pixels: int = 1280 * 28 * 28
    """Limits of the processor. Views come at their final size, so these need only admit them all."""
    dtype: str | None = None
    """None: float32 on a CPU (vLLM's "auto" turns float32 weights into bfloat16), bfloat16 on a GPU."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    """None: vLLM's own choice on a GPU, and on a CPU whatever keeps prompts from being prefilled in pieces."""
    max_lora_rank: int | None = None
    """Serve adapters of up to this rank; None serves merged weights only (on a CPU adapters cost a factor of 46)."""
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool | None = None
    """None: eager on a CPU, compiled with CUDA graphs on a GPU."""
    cpu_kvcache_gib: int = 2
    """CPU only."""
    cpu_threads_bind: str | None = None
    """CPU only: cores for the forward pass, as "0" or "0-7"; None lets vLLM choose. Two servers need disjoint sets."""
    sleeps: bool = False
    """GPU only: `sleep` frees its memory."""


class Server:
    """A vLLM server; entering the context starts it and waits until it is ready, leaving ends it.

    model: a local directory or a Hub id. media_dir: the folder from which file:// images are admitted, None admits
    none. log_path: its log, appended. version: what it reports as weight version until weights are loaded into it.
    Raises UserError if the model directory is missing, EngineError if the server does not come up.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        log_path: Path,
        version: str,
        settings: ServerSettings = ServerSettings(),
        media_dir: Path | None = None,
        progress: Callable[[str], None] | None = None,
        name: str = "engine",
    ):
        self.model, self.log_path, self.version, self.settings = str(model), log_path, version, settings
        self.media_dir, self.progress, self.name = media_dir, progress, name
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
        return self._child is not None and self._child.alive

    def start(self, timeout: float = READY_TIMEOUT_S) -> None:
        check_model(self.model)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        argv = server_command(self.model, port, self.settings, self.media_dir)
        env = server_environment(os.environ, self.model, self.settings)
        self._child = child = spawn(argv, name=self.name, env=env, log_path=self.log_path)
        try:
            self._wait(child, timeout)
            post(f"{self.url}/update_weight_version", {"new_version": self.version})
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and all its processes; does nothing if it isn't running. For several threads."""
        with self._stopping:
            if self._child is not None:
                self._child.terminate(timeout=5)
                self._child, self._asleep = None, False

    def sleep(self) -> None:
        """Free the GPU's memory: the weights wait in the machine's memory, the KV cache is gone.

        Nothing may be running, and nothing is to be asked before `wake`.
        """
        if self.alive and not self._asleep:
            post(f"{self.url}/sleep?level=1", {})
            self._asleep = True

    def wake(self) -> None:
        """Take the memory back; does nothing if it is awake."""
        if self._asleep:
            post(f"{self.url}/wake_up", {})
            self._asleep = False

    def _wait(self, child: Child, timeout: float) -> None:
        started, told = time.monotonic(), 0.0
        while not answers(f"{self.url}/health"):
            elapsed = time.monotonic() - started
            if not child.alive:
                raise self._error(child, f"ended with status {child.returncode} after {elapsed:.0f} s")
            if elapsed > timeout:
                raise self._error(child, f"was not ready after {timeout:.0f} s")
            if self.progress is not None and elapsed - told >= 5:
                told = elapsed
                words = last_words(child.log_tail(1))
                self.progress(f"{self.name}: starting, {elapsed:.0f} s{words and ': '}{words}")
            time.sleep(0.1)
        if self.progress is not None:
            self.progress(f"{self.name}: ready after {time.monotonic() - started:.0f} s at {self.url}")

    def _error(self, child: Child, what: str) -> EngineError:
        log = child.log_tail(1000)
        # The first exception is the cause, those behind it are processes that lost each other.
        cause = CAUSE.search(log)
        told = f": {cause[1]}" if cause else ""
        hint = next((hint for symptom, hint in HINTS.items() if cause and symptom in cause[1]), f"read {self.log_path}")
        tail = "\n".join(log.splitlines()[-12:])
        return EngineError(f"the vLLM server for {self.model} {what}{told}\nIts log ends with\n{tail}", hint=hint)


def server_command(
    model: str, port: int, settings: ServerSettings, media_dir: Path | None, host: str = "127.0.0.1"
) -> list[str]:
    """The command line. host: development mode lets anybody who reaches the port change the weights."""
    cpu = closure.on_cpu()
    batched_tokens = settings.max_num_batched_tokens
    if batched_tokens is None and cpu:
        batched_tokens = max(settings.max_model_len, 8192)
    eager = cpu if settings.enforce_eager is None else settings.enforce_eager
    options: dict[str, object] = {
        "model": model,
        "served-model-name": SERVED_NAME,
        "host": host,
        "port": port,
        "dtype": settings.dtype or ("float32" if cpu else "bfloat16"),
        "max-model-len": settings.max_model_len,
        "max-num-seqs": settings.max_num_seqs,
        "max-num-batched-tokens": batched_tokens,
        "tensor-parallel-size": settings.tensor_parallel_size,
        "gpu-memory-utilization": None if cpu else settings.gpu_memory_utilization,
        # What we compare with the trainer are the log-probabilities of the distribution that was sampled from.
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": 128,
        "generation-config": "vllm",  # no sampling defaults from the model's files
        "limit-mm-per-prompt": json.dumps({"image": settings.max_images, "video": 0}),
        "mm-processor-kwargs": json.dumps(
            {"size": {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}}
        ),
        "mm-processor-cache-gb": 1 if cpu else 4,
        "allowed-local-media-path": media_dir.resolve() if media_dir else None,
        "uvicorn-log-level": "warning",
        "worker-extension-cls": "thinkimg.engine.worker.WeightLoader",
        "max-lora-rank": next((rank for rank in LORA_RANKS if rank >= (settings.max_lora_rank or 513)), None),
    }
    flags = ["enable-scale-out", "enable-prefix-caching", "disable-uvicorn-access-log", "disable-log-stats"]
    if cpu:
        # A request with a seed kills the CPU engine if its prompt is prefilled in pieces.
        flags += ["no-enable-chunked-prefill", "skip-mm-profiling"]
    if eager:
        flags.append("enforce-eager")
    if settings.max_lora_rank is not None:
        flags.append("enable-lora")
    if settings.sleeps:
        flags.append("enable-sleep-mode")
    argv = [sys.executable, "-m", "thinkimg.engine.serve" if cpu else "vllm.entrypoints.openai.api_server"]
    for name, value in options.items():
        if value is not None:
            argv += [f"--{name}", str(value)]
    return argv + [f"--{flag}" for flag in flags]


def server_environment(base: Mapping[str, str], model: str, settings: ServerSettings) -> dict[str, str]:
    """The server's environment: ours, with development mode on and telemetry off."""
    env = {
        **base,
        "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, /pause, /update_weight_version
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # for our worker extension
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE_ROOT), base.get("PYTHONPATH")])),
    }
    if Path(model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if settings.max_lora_rank is not None:
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if closure.on_cpu():
        env["VLLM_CPU_KVCACHE_SPACE"] = str(settings.cpu_kvcache_gib)
        if settings.cpu_threads_bind is not None:
            env["VLLM_CPU_OMP_THREADS_BIND"] = settings.cpu_threads_bind
    return env


def check_model(model: str) -> None:
    """Raise UserError if `model` is a path without a model in it; a Hub id ("owner/name") passes."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"{model} holds no model: there is no config.json", hint="name a directory that save_pretrained wrote"
            )
    elif path.is_absolute() or model.count("/") != 1 or path.exists():
        raise UserError(
            f"there is no model directory {model}",
            hint="name a local directory or a Hub id such as Qwen/Qwen2.5-VL-7B-Instruct",
        )


def last_words(line: str) -> str:
    """A line of the log without process, time and place."""
    return line.rpartition("] ")[2].strip()[:100]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:  # URLError and HTTPError are OSErrors: not listening yet, or not ready
        return False


def post(url: str, body: dict) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60):
            pass
    except urllib.error.HTTPError as error:
        raise EngineError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from error
