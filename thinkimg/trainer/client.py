"""The kept training process: `Trainer` starts `python -m thinkimg.trainer.worker` and hands it jobs.

    Trainer ──► spool/000001.job.json ──► Worker ──► spool/000001.progress.jsonl, 000001.result.json ──► Trainer

A job is a JSON object; directories are absolute. The worker writes `output` (a directory that is empty or not there yet;
its parent exists) and answers with a JSON object. Policy directories are described in checkpoint.py.

    {"kind": "train",
     "policy": {"directory": "…", "digest": "…"},   what is trained on; digest = the `weights` of every rollout
     "base": {"name": "Qwen/…" or "model/<fingerprint>", "revision": null, "directory": null},   LoRA only: see models.base.Base
     "model": {…}, "train": {…},                    ModelConfig and TrainConfig as JSON (model_dump(mode="json"))
     "rollouts": "…",                               directory with trajectories*.parquet
     "images": {"tables": ["…", …],                 directories with images*.parquet (data set and rollouts)
                "min_pixels": 3136, "max_pixels": 1003520},
     "advantages": "….parquet",                     trajectory_id, advantage: the included rows, no others
     "conversation": {"temperature": 1.0, "banned": [ids], "max_tokens": 8192},
     "reference": null,                             policy directory of the KL's reference: full fine-tuning with beta > 0
     "output": "…", "seed": 0}

    {"kind": "warmstart",
     "base": {…, "directory": "…"},                 where training starts
     "model": {…}, "warmstart": {…},                ModelConfig and WarmstartConfig as JSON
     "rollouts": "…" or null,                       directory with trajectories*.parquet of demonstrations; null: steps is 0
     "images": {…}, "conversation": {"temperature": 1.0, "banned": [ids]},
     "token_budget": 16384,                         padded tokens per micro-batch
     "output": "…", "seed": 0}

    {"kind": "attention",                          what do texts look at? See relative_attention.py
     "policy": {…}, "base": {…}, "model": {…},      as above
     "layers": [22], "images": {…}, "token_budget": 16384,
     "pairs": [{"images": ["…", "…"], "grids": [[t, h, w], …], "region": [left, top, right, bottom] or null,
                "prompts": [{"tokens": [compact ids], "text": [first, end)}, …]}, …]}
     Result: {"pairs": [{"<layer>/<rows>": {"question": mass, "generic": mass, …}}, …], "forwards": number}

Other results: {"metrics": {name: float} (means over the steps, parity/*, memory, seconds), "steps": [{"step", …, per step}],
"updates": optimizer steps since the base, "reloaded": whether weights had to be read from disk}.
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
from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.trainer.settings import TrainerConfig

NO_SPOOL = "-"  # on other nodes than the loop's
POLL_S = 0.05
LOG_LINES = 30
REJOIN_S = 1.0
KINDS_HINT = "Set distributed_type to MULTI_GPU, or to FSDP with fsdp_config.fsdp_version 2."
FSDP1 = ("The accelerate config asks for FSDP 1.", "Set fsdp_config.fsdp_version to 2.")


class TrainerError(RuntimeError):
    """The worker died, or a job failed for a reason that is not the user's; the message ends with log or traceback."""


@dataclass
class Running:
    """A worker process, and the folder that its jobs lie in."""

    child: process.Child
    spool: Path
    jobs: int = 0
    """So many it was given."""


class Trainer:
    """Hands jobs to a kept worker. Leaving the context ends it; so does our own death, however it comes.

    It starts at once, so that its imports (some 12 s) run while something else is being done, and again when a job comes
    after it has left (config.keep off, or it died).
    """

    def __init__(self, config: TrainerConfig, *, log_path: Path):
        """log_path: where its output is appended."""
        self._config, self._log_path = config, log_path
        self._stack = contextlib.ExitStack()  # while a worker is there: its spool directory, and itself
        self._worker: Running | None = None
        self._lock, self._closed = threading.RLock(), False

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            self.release()

    def submit(self, job: dict, progress: Callable[[dict], None] | None = None) -> dict:
        """Run a job and return its result; `progress` gets each step's line.

        Raises UserError for what the user can mend, TrainerError for the rest. After a failed job the worker lives on
        (several processes end, and start again with the next job), but has to read the policy again.
        """
        with self._lock:
            if self._closed:  # by another thread: a worker that started now nobody would end
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
            self.release()  # dead, or in the middle of a job that nobody waits for any more
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

    def _start(self) -> Running:
        spool = self._stack.enter_context(process.scratch())
        child = self._stack.enter_context(spawn(self._config, str(spool), log_path=self._log_path))
        self._worker = Running(child, spool)
        return self._worker

    def _wait(self, child: process.Child, result: Path, lines: Path, progress: Callable[[dict], None]) -> dict:
        seen = 0
        while True:
            alive, done = child.alive, result.exists()
            if lines.exists():
                with lines.open() as file:
                    file.seek(seen)
                    while (line := file.readline()).endswith("\n"):
                        progress(json.loads(line))
                        seen += len(line)  # ASCII
            if done:
                return json.loads(result.read_text())
            if not alive:
                raise TrainerError(
                    f"The trainer ended with status {child.returncode}; its log is {self._log_path} and ends with\n"
                    f"{child.log_tail(LOG_LINES)}"
                )
            time.sleep(POLL_S)


def serve_rank(config: TrainerConfig, rank: int, report: Callable[[str], None] = print) -> None:
    """On another node than the loop's: take part in the jobs of its trainer, from start to start, until interrupted.

    rank: of this node, from 1. Raises UserError where the config has no such node.
    """
    if not 0 < rank < config.nodes:
        raise UserError(
            f"There is no node {rank} to be: where.trainer.nodes is {config.nodes}.",
            hint="Give this command the same settings as the loop, and ranks from 1; node 0 is the loop's own.",
        )
    closure.check_closure()
    closure.check_cuda()
    while True:
        report(f"node {rank} of {config.nodes}: waiting for the trainer at {config.address}")
        with spawn(config, NO_SPOOL, rank=rank) as child:
            child.wait()
        time.sleep(REJOIN_S)


def spawn(config: TrainerConfig, spool: str, *, rank: int = 0, log_path: Path | None = None) -> process.Child:
    """Start this node's processes."""
    # Spinning threads are ruinous where another process (the engine) wants the cores, too: two threads on two busy
    # cores took 2 s a step when passive, and over 40 s as is.
    threads = {"OMP_NUM_THREADS": str(config.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    env = os.environ | threads | {"TOKENIZERS_PARALLELISM": "false"}
    argv = [*launch_command(config, gpus=closure.visible_gpus(), rank=rank), spool, str(config.processes)]
    return process.spawn(argv, name="trainer", env=env, log_path=log_path)


def launch_command(config: TrainerConfig, *, gpus: int, rank: int = 0) -> list[str]:
    """The command line of a node up to the worker's own arguments. rank: of the node.

    accelerate's launcher takes three seconds to import what the worker imports again, so one process does without it. And
    `accelerate launch --cpu --num_processes 2` starts one process (accelerate 1.15), so several on a CPU take torchrun.
    """
    module = ["-m", "thinkimg.trainer.worker"]
    if config.accelerate_config is None and config.processes == 1:
        return [sys.executable, *module]
    settings = accelerate_settings(config)
    port = settings.get("main_process_port") or process.free_port()  # else two trainers of a machine want the same one
    host, _, port = (config.address or f"127.0.0.1:{port}").rpartition(":")
    if config.accelerate_config is None and not gpus:
        here = {"nnodes": config.nodes, "node_rank": rank, "nproc_per_node": config.processes // config.nodes}
        return [*python("torch.distributed.run", here | {"master_addr": host, "master_port": port}), *module]
    options = {"num_processes": config.processes, "num_machines": config.nodes, "machine_rank": rank}
    options |= {"main_process_ip": host, "main_process_port": port}
    if config.accelerate_config is None:
        several = ["--multi_gpu", *arguments({"mixed_precision": "no", "dynamo_backend": "no"})]
    else:
        several = arguments({"config_file": config.accelerate_file})
    return [*python("accelerate.commands.launch", options), *several, *module]


def accelerate_settings(config: TrainerConfig) -> dict:
    """Return what the file of `accelerate config` says, {} without one.

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


def python(module: str, options: dict[str, object]) -> list[str]:
    return [sys.executable, "-m", module, *arguments(options)]


def arguments(options: dict[str, object]) -> list[str]:
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]
