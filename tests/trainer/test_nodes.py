"""A trainer on two nodes: two launches that find each other on localhost (gloo), as two machines would."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from grpo_world import TRAIN
from safetensors.torch import load_file

from thinkimg import process
from thinkimg.errors import UserError
from thinkimg.process import free_port
from thinkimg.trainer.client import Trainer, TrainerError, build_launch_command, serve_rank
from thinkimg.trainer.settings import TrainerConfig
from thinkimg.watchdog import descendants

LIMIT_S = 60


def second_node(where: TrainerConfig, log: Path) -> process.Child:
    """By the command in docs/trainer.md."""
    settings = where.model_dump(include={"processes", "nodes", "address", "threads"})
    sets = [part for key, value in settings.items() for part in ("--set", f"where.trainer.{key}={value}")]
    return process.spawn([sys.executable, "-m", "thinkimg", "trainer", "--rank", "1", *sets], name="node", log_path=log)


def workers(node: process.Child) -> list[int]:
    found = descendants(node.pid)
    return [pid for pid in found if b"thinkimg.trainer.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def weights(directory: str) -> dict[str, torch.Tensor]:
    (path,) = Path(directory).glob("model/*.safetensors")
    return load_file(path) | load_file(Path(directory) / "optimizer.safetensors")


@pytest.mark.long
def test_two_nodes_are_one_and_the_death_of_one_ends_the_job(world, tmp_path):
    train = TRAIN.model_copy(update={"token_budget": 60})
    where = TrainerConfig(threads=1, processes=2, nodes=2, address=f"127.0.0.1:{free_port()}")
    with Trainer(TrainerConfig(threads=1, processes=2), log_path=tmp_path / "one") as trainer:
        expected = trainer.submit(job := world.job("one-node", train=train))
    with second_node(where, tmp_path / "second") as node, Trainer(where, log_path=tmp_path / "first") as trainer:
        found = trainer.submit(other := world.job("two-nodes", train=train))
        same = weights(other["output"])
        assert all(torch.equal(value, same[name]) for name, value in weights(job["output"]).items())
        assert found["metrics"]["grad_norm"] == expected["metrics"]["grad_norm"]

        stopped = []

        def stop(line: dict) -> None:
            """A machine that answers no more: nothing of it closes a connection."""
            if not stopped:
                stopped.append(time.monotonic())
                for pid in workers(node):
                    os.kill(pid, signal.SIGSTOP)

        many = train.model_copy(update={"epochs": 500})
        with pytest.raises(
            TrainerError, match="process 1 of the trainer, on .*, has ended or can't be reached"
        ) as caught:
            trainer.submit(world.job("dying", train=many), stop)
        assert time.monotonic() - stopped[0] < LIMIT_S and "\n" not in str(caught.value)
        for pid in workers(node):
            os.kill(pid, signal.SIGKILL)
        assert trainer.submit(world.job("again", train=train))["metrics"]["grad_norm"] == found["metrics"]["grad_norm"]


def test_each_node_is_told_who_it_is():
    where = TrainerConfig(processes=16, nodes=2, address="first:29500", accelerate_config="ddp")
    command = build_launch_command(where, gpus=8, rank=1)
    told = dict(zip(command, command[1:], strict=False))
    assert told["--config_file"].endswith("/presets/accelerate/ddp.yaml") and told["--num_processes"] == "16"
    assert (told["--num_machines"], told["--machine_rank"]) == ("2", "1")
    assert (told["--main_process_ip"], told["--main_process_port"]) == ("first", "29500")
    plain = build_launch_command(where.model_copy(update={"accelerate_config": None}), gpus=0, rank=1)
    told = dict(zip(plain, plain[1:], strict=False))
    assert (told["--nproc_per_node"], told["--node_rank"], told["--nnodes"]) == ("8", "1", "2")


def test_a_node_that_the_loop_does_not_know_is_refused():
    with pytest.raises(UserError, match="no node 1"):
        serve_rank(TrainerConfig(), 1)
    with pytest.raises(ValueError, match="trainer.address"):
        TrainerConfig(nodes=2, processes=2)
