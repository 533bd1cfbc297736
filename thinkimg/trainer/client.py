"""Client of the training process: `Trainer` starts `python -m thinkimg.trainer.worker` and hands it jobs.

    Trainer ──► spool/000001.job.json ──► Worker ──► spool/000001.progress.jsonl, 000001.result.json ──► Trainer

A job is a JSON object; directories are absolute. The worker writes `output` (an empty directory or none yet; its parent
exists) and answers with a JSON object. Policy directories are described in checkpoint.py.

    {"kind": "train",
     "policy": {"directory": "…", "digest": "…"},   to be trained; digest = the `weights` of every rollout
     "base": {"name": "Qwen/…" or "model/<fingerprint>", "revision": null, "directory": null},    LoRA only: models.base
     "model": {…}, "train": {…},                    ModelConfig and TrainConfig as JSON (model_dump(mode="json"))
     "rollouts": "…",                               directory with trajectories*.parquet
     "images": {"tables": ["…", …],                 directories with images*.parquet (data set and rollouts)
                "min_pixels": 3136, "max_pixels": 1003520},
     "advantages": "….parquet",                     trajectory_id, advantage: the included rows, no others
     "conversation": {"temperature": 1.0, "banned": [ids], "max_tokens": 8192},
     "reference": null,                             policy directory of the KL's reference: full with beta > 0
     "output": "…", "seed": 0}

    {"kind": "warmstart",
     "base": {…, "directory": "…"},                 start of the training
     "model": {…}, "warmstart": {…},                ModelConfig and WarmstartConfig as JSON
     "rollouts": "…" or null,                       directory with trajectories*.parquet; null: steps is 0
     "images": {…}, "conversation": {"temperature": 1.0, "banned": [ids]},
     "token_budget": 16384,                         padded tokens per micro-batch
     "output": "…", "seed": 0}

    {"kind": "attention",                          attention of texts on images, see attention_job.py
     "policy": {…}, "base": {…}, "model": {…},      as above
     "layers": [22] or null for the family's, "images": {…}, "token_budget": 16384,
     "pairs": [{"images": ["…", "…"], "grids": [[t, h, w], …], "region": [left, top, right, bottom] or null,
                "prompts": [{"tokens": [compact ids], "text": [first, end)}, …]}, …]}
     Result: {"pairs": [{"<layer>/<rows>": {"question": mass, "generic": mass, …}}, …], "forwards": number}

Other results: {"metrics": {name: float} (means over the steps, parity/*, memory, seconds), "steps": [{"step", …}],
"updates": optimizer steps since the base, "reloaded": true if weights were read from disk}.
Progress lines have {"step", "steps", "loss", …} of one optimizer step each.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml

from thinkimg import closure, process
from thinkimg.devices import bound_to_cores, select_gpus
from thinkimg.environment import child_environment
from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.trainer.settings import TrainerConfig

NO_SPOOL = "-"  # of the nodes that do not run the loop
POLL_S = 0.05
LOG_LINES = 30
REJOIN_S = 1.0
KINDS_HINT = "Set distributed_type to MULTI_GPU, or to FSDP with fsdp_config.fsdp_version 2."
FSDP1 = ("The accelerate config asks for FSDP 1.", "Set fsdp_config.fsdp_version to 2.")


class TrainerError(RuntimeError):
    """Failure of the worker or of a job that is not the user's fault; the message ends with log or traceback."""


@dataclass
class RunningWorker:
    """Worker process and the folder of its jobs."""

    child: process.Child
    spool: Path
    jobs: int = 0
    """Jobs submitted so far."""


class Trainer:
    """Context that keeps a worker and hands it jobs. The worker ends with the context, and with this process.

    It starts at once, so that its imports (some 12 s) run beside other work. If it has left (config.keep off, or it
    died), the next job starts another.
    """

    def __init__(self, config: TrainerConfig, *, log_path: Path):
        """log_path: file that the worker's output is appended to."""
        self._config, self._log_path = config, log_path
        self._stack = contextlib.ExitStack()  # while a worker is there: its spool directory, and itself
        self._worker: RunningWorker | None = None
        self._lock, self._closed = threading.RLock(), False

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            self.release()

    def submit(self, job: dict, progress: Callable[[dict], None] | None = None) -> dict:
        """Run a job and return its result; `progress` receives each step's line.

        Raises UserError for the user's mistakes, TrainerError for other failures. After a failed job the worker lives
        on, but reads the policy again. Several processes end, and start again with the next job.
        """
        with self._lock:
            if self._closed:  # by another thread: nothing would end a worker that started now
                raise RuntimeError("the trainer has been closed")
            worker = self._worker
            if worker is None or not worker.child.alive:
                self.release()
                worker = self._start()
        worker.jobs += 1
        name = str(worker.spool / f"{worker.jobs:06}")
        files.write(Path(f"{name}.job.json"), json.dumps(job))
        try:
            result = self._wait(
                worker.child, Path(f"{name}.result.json"), Path(f"{name}.progress.jsonl"), progress or (lambda _: None)
            )
        except BaseException:
            self.release()  # dead, or in the middle of a job whose result nothing waits for
            raise
        if not self._config.keep or ("error" in result and self._config.processes > 1) or "ended" in result:
            self.release()
        if "error" in result:
            error = result["error"]
            if error["user"]:
                raise UserError(error["message"], error["hint"])
            raise TrainerError(f"The training job failed: {error['message']}\n{error['traceback']}".rstrip())
        return result

    def release(self) -> None:
        """End the worker and free its memory; the next job starts another."""
        with self._lock:
            self._worker = None
            self._stack.close()

    def _start(self) -> RunningWorker:
        spool = self._stack.enter_context(process.scratch())
        child = self._stack.enter_context(spawn(self._config, str(spool), log_path=self._log_path))
        self._worker = RunningWorker(child, spool)
        return self._worker

    def _wait(self, child: process.Child, result: Path, lines: Path, progress: Callable[[dict], None]) -> dict:
        offset = 0
        while True:
            alive, done = child.alive, result.exists()
            if lines.exists():
                with lines.open() as file:
                    file.seek(offset)
                    while (line := file.readline()).endswith("\n"):
                        progress(json.loads(line))
                        offset += len(line)  # ASCII
            if done:
                return json.loads(result.read_text())
            if not alive:
                raise TrainerError(
                    f"The trainer ended with status {child.returncode}. Its log {self._log_path} ends with\n"
                    f"{child.log_tail(LOG_LINES)}"
                )
            time.sleep(POLL_S)


def serve_rank(config: TrainerConfig, rank: int, report: Callable[[str], None] = print) -> None:
    """Take part in the jobs of a trainer on another node, through its restarts, until interrupted.

    rank: of this node, from 1. Raises UserError if the config has no such node.
    """
    if not 0 < rank < config.nodes:
        raise UserError(
            f"There is no node {rank}: where.trainer.nodes is {config.nodes}.",
            hint="Give this command the settings of the loop, and ranks from 1; node 0 runs the loop.",
        )
    closure.check_closure()
    closure.check_cuda()
    while True:
        report(f"node {rank} of {config.nodes}: waiting for the trainer at {config.address}")
        with spawn(config, NO_SPOOL, rank=rank) as child:
            child.wait()
        time.sleep(REJOIN_S)


def spawn(config: TrainerConfig, spool: str, *, rank: int = 0, log_path: Path | None = None) -> process.Child:
    """Start this node's processes, on the GPUs and cores of the config.

    Raises UserError where there are none such.
    """
    # Spinning threads are ruinous if another process (the engine) wants the cores too: two threads on two busy cores
    # took 2 s a step when passive, and over 40 s by default.
    threads = {"OMP_NUM_THREADS": str(config.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    gpus = select_gpus("where.trainer.devices", config.devices, os.environ)
    env = child_environment("trainer", os.environ, threads | gpus)
    if not env.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # rows of many lengths fragment a GPU's memory
    argv = [*build_launch_command(config, gpus=closure.visible_gpus(), rank=rank), spool, str(config.processes)]
    with bound_to_cores("where.trainer.cpu_threads_bind", config.cpu_threads_bind):
        return process.spawn(argv, name="trainer", env=env, log_path=log_path)


def build_launch_command(config: TrainerConfig, *, gpus: int, rank: int = 0) -> list[str]:
    """Return the command line of a node up to the worker's own arguments. rank: of the node.

    accelerate's launcher takes three seconds to import what the worker imports again, so one process does without it.
    `accelerate launch --cpu --num_processes 2` starts one process (accelerate 1.15), so several on a CPU use torchrun.
    """
    module = ["-m", "thinkimg.trainer.worker"]
    if config.accelerate_config is None and config.processes == 1:
        return [sys.executable, *module]
    settings = read_accelerate_settings(config)
    port = settings.get("main_process_port") or process.free_port()  # else two trainers of a machine share a port
    host, _, port = (config.address or f"127.0.0.1:{port}").rpartition(":")
    if config.accelerate_config is None and not gpus:
        node = {"nnodes": config.nodes, "node_rank": rank, "nproc_per_node": config.processes // config.nodes}
        return [
            *build_python_command("torch.distributed.run", node | {"master_addr": host, "master_port": port}),
            *module,
        ]
    options = {"num_processes": config.processes, "num_machines": config.nodes, "machine_rank": rank}
    options |= {"main_process_ip": host, "main_process_port": port}
    if config.accelerate_config is None:
        # The launcher would take what is left out from the user's own default config, another training's.
        own = config.model_copy(update={"accelerate_config": "ddp"}).accelerate_file
        kind = format_options({"mixed_precision": "no", "dynamo_backend": "no", "config_file": own})
        kind = ["--multi_gpu", *kind]
    else:
        kind = format_options({"config_file": config.accelerate_file})
    return [*build_python_command("accelerate.commands.launch", options), *kind, *module]


def read_accelerate_settings(config: TrainerConfig) -> dict:
    """Return the settings in the file of `accelerate config`, {} without one.

    Raises UserError if it can't be read, or asks for a kind of training that the worker does not do.
    """
    path = config.accelerate_file
    if path is None:
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"The accelerate config {path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(
            f"The accelerate config {path} is no mapping of settings.", hint="`accelerate config` writes one."
        )
    kind = settings.get("distributed_type") or "NO"  # an unquoted NO is false in YAML
    if kind not in ("MULTI_GPU", "FSDP") and (kind != "NO" or config.processes > 1):
        raise UserError(f"The accelerate config {path} has the distributed_type {kind}.", hint=KINDS_HINT)
    sharding = settings.get("fsdp_config")
    version = sharding.get("fsdp_version") if isinstance(sharding, dict) else None
    if kind == "FSDP" and str(version) != "2":
        raise UserError(*FSDP1)
    return settings


def build_python_command(module: str, options: dict[str, object]) -> list[str]:
    """Return the command line of a Python module with options."""
    return [sys.executable, "-m", module, *format_options(options)]


def format_options(options: dict[str, object]) -> list[str]:
    """Return options as arguments of a command line: --name value."""
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]
