"""Training process: polls the spool of client.Trainer and runs its jobs on the policy that it holds.

It imports neither Prefect nor MLflow nor vLLM, so that a machine that trains alone needs none of them.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from thinkimg import closure
from thinkimg.disk import writing
from thinkimg.errors import UserError
from thinkimg.models.base import Base
from thinkimg.models.settings import ModelConfig
from thinkimg.registry import allow_user_modules
from thinkimg.store import files
from thinkimg.trainer import attention_job, checkpoint, grpo_job, warmstart_job
from thinkimg.trainer.client import FSDP1, KINDS_HINT, NO_SPOOL, POLL_S, REJOIN_S
from thinkimg.trainer.heartbeat import BEAT_S, SILENCE_S, Heartbeat, connect_store
from thinkimg.trainer.installations import compare_inputs, compare_installations
from thinkimg.trainer.loading import load_together
from thinkimg.trainer.policy import PolicyModel
from thinkimg.trainer.ranks import Ranks

JOBS = {"train": grpo_job.run, "warmstart": warmstart_job.run, "attention": attention_job.run}
STATES = ("state.json", "optimizer.safetensors", "model", "adapter")
COLLECTIVE_LIMIT = timedelta(hours=6)  # the first may write a policy for long; the heartbeat sees who is gone
PATIENCE_S = SILENCE_S + 2 * BEAT_S


class Worker:
    """Runner of the jobs in a spool directory, on the policy that it holds."""

    def __init__(self, spool: Path, processes: int):
        for name in ("DEEPSPEED", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
                raise UserError(f"The accelerate config asks for {name}.", hint=KINDS_HINT)
        # If this is true, as accelerate's launcher has it by default, transformers gives all processes but a machine's
        # first a model of zeros, for Accelerator.prepare to fill. Nothing is prepared here.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        closure.check_cuda()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_LIMIT)]
        )
        actual = self.accelerator.num_processes
        assert actual == processes, f"{actual} processes, not {processes}"
        self.spool, self.ranks = spool, Ranks(self.accelerator.process_index, processes)
        # accelerate's launcher says so in the environment; on a CPU its Accelerator does not heed it.
        self.sharded = processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if self.sharded and os.environ.get("FSDP_VERSION") != "2":
            raise UserError(*FSDP1)
        self.policy: PolicyModel | None = None
        self.stamps: list[tuple] | None = None  # of the files that hold the policy in memory
        self.number = 1
        self.heartbeat = Heartbeat(self.ranks.rank, processes, self._lost) if processes > 1 else None
        self.store = connect_store() if processes > 1 else None
        compare_installations(self.ranks)

    def serve(self) -> None:
        """Run jobs until the process is ended."""
        while True:
            try:
                job = self._next(f"{self.number:06}.job.json")
            except RuntimeError:  # what a broken connection raises
                if self.ranks.rank == 0:
                    raise
                print("the trainer's first process has left", file=sys.stderr, flush=True)
                sys.exit()
            result = self._answer(job, self.spool / f"{self.number:06}.progress.jsonl")
            if self.ranks.rank == 0:
                self._write(result)
            if "error" in result and self.ranks.count > 1:
                if self.ranks.rank:
                    time.sleep(REJOIN_S)  # the launcher ends all when one has left: the first has to answer before
                sys.exit(1)  # some processes may still wait for others in the middle of a step
            self.number += 1

    def _write(self, result: dict) -> None:
        files.write(self.spool / f"{self.number:06}.result.json", json.dumps(result))

    def _lost(self, sentence: str) -> None:
        """End this process, as another is gone; the main thread may be in a collective that waits for it."""
        print(sentence, file=sys.stderr, flush=True)
        if self.ranks.rank == 0:
            self._write({"error": {"user": False, "message": sentence, "hint": "", "traceback": ""}})
        os._exit(1)

    def _next(self, name: str) -> dict:
        """Wait for a job and return it; the same in every process.

        The others ask the process group's store: in a collective they would keep their GPUs busy all the while.
        """
        job = None
        if self.ranks.rank == 0:
            while not (self.spool / name).exists():
                time.sleep(POLL_S)
            job = json.loads((self.spool / name).read_text())
            if self.store is not None:
                self.store.set(name, "ready")  # a job of many pairs is larger than the store takes
        else:
            while not self.store.check([name]):
                time.sleep(POLL_S)
        return self.ranks.gather(job)[0]

    def _answer(self, job: dict, lines: Path) -> dict:
        def progress(line: dict) -> None:
            if self.ranks.rank == 0:
                with writing(lines), lines.open("a") as file:
                    file.write(json.dumps(line) + "\n")

        try:
            return self._run(job, progress)
        except Exception as error:  # the job failed and not the worker: the parent reads it in the result
            self.policy = self.stamps = None
            user = isinstance(error, UserError)
            message = error.message if user else f"{type(error).__name__}: {error}"
            tail = "".join(traceback.format_exception(error)[-8:])
            print(tail, file=sys.stderr, flush=True)
            if self.heartbeat is not None and self.ranks.rank == 0 and not user:
                self.heartbeat.join(PATIENCE_S)  # if a process is gone, that is the cause, and the heartbeat says it
            hint = error.hint if user else ""
            return {"error": {"user": user, "message": message, "hint": hint, "traceback": tail}}

    def _run(self, job: dict, progress: Callable[[dict], None]) -> dict:
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        config = ModelConfig.model_validate(job["model"])
        base = Base(**job["base"]) if job.get("base") else None
        compare_inputs(self.ranks, job)
        reloaded = not self._holds(job, config)
        if reloaded:
            self.policy = self.stamps = None  # before the next one takes memory
            self.policy = self._load(job, config, base)
        self.stamps = None  # until the job is done the weights are those of no directory
        result = JOBS[job["kind"]](job, self.policy, self.ranks, progress)
        # A job without an output changes nothing, so that the weights stay those of the directory.
        self.stamps = self._read_stamps(job.get("output") or job["policy"]["directory"])
        return result | {"reloaded": reloaded}

    def _read_stamps(self, directory: str) -> list[tuple]:
        return self.ranks.gather(read_stamps(Path(directory)) if self.ranks.rank == 0 else [])[0]

    def _load(self, job: dict, config: ModelConfig, base: Base | None) -> PolicyModel:
        def load(device: torch.device) -> PolicyModel:
            if job["kind"] == "warmstart":
                return checkpoint.start_from_base(base, config, device, seed=job["seed"])
            return checkpoint.load(job["policy"]["directory"], config, device, base)

        return load_together(load, self.ranks, self.accelerator.device, sharded=self.sharded)

    def _holds(self, job: dict, config: ModelConfig) -> bool:
        """Return True if the job's policy is in memory: its files are those this worker wrote last, renamed or not."""
        if job["kind"] == "warmstart" or self.stamps is None or self.policy.config != config:
            return False
        return self._read_stamps(job["policy"]["directory"]) == self.stamps


def read_stamps(directory: Path) -> list[tuple]:
    """Return (name, device, inode, size, time of change) of a policy's files; renaming its directory changes none."""
    stamps = []
    for top in STATES:
        path = directory / top
        for file in sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []:
            stat = file.stat()
            stamps.append((f"{top}/{file.name}", stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return stamps


def main() -> None:
    """Serve the spool of the command line; write a UserError at the start as the answer to the first job."""
    spool = sys.argv[1]
    allow_user_modules()
    try:
        worker = Worker(Path(spool), int(sys.argv[2]))
    except UserError as error:
        if spool != NO_SPOOL:
            answer = {"user": True, "message": error.message, "hint": error.hint, "traceback": ""}
            files.write(Path(spool, f"{1:06}.result.json"), json.dumps({"error": answer, "ended": True}))
        sys.exit(str(error))
    try:
        worker.serve()
    except UserError as error:  # no space for a result
        sys.exit(str(error))


if __name__ == "__main__":
    main()
