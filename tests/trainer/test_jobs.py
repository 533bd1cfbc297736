"""Training jobs: resuming, micro-batches, processes, exclusion, the parity gate, and the kept worker."""

import dataclasses
import hashlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from grpo_world import FULL, LORA, TRAIN

from thinkimg.errors import UserError
from thinkimg.grpo.settings import LossConfig
from thinkimg.models.base import Base
from thinkimg.trainer import checkpoint, packing_check, warmstart_job
from thinkimg.trainer.client import Trainer, TrainerError, build_launch_command
from thinkimg.trainer.forward.packed_attention import PackedAttention
from thinkimg.trainer.grpo_job import deal
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import Row
from thinkimg.trainer.settings import ParityConfig, TrainerConfig
from thinkimg.watchdog import descendants


def digest(directory: Path) -> dict[str, str]:
    paths = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def weights(directory: Path | str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (path,) = [p for p in Path(directory).rglob("*.safetensors") if p.parent.name in ("model", "adapter")]
    return load_file(path)


@pytest.mark.parametrize("model", [FULL, LORA], ids=["full", "lora"])
def test_a_loaded_policy_trains_on_bit_by_bit_as_one_that_stayed(world, model):
    name = model.adaptation
    # the rollouts are the first policy's
    loose = TRAIN.model_copy(update={"parity": ParityConfig(max_kl=1e9, min_slope=-9.0)})
    job = world.job(f"{name}-1", model=model, train=loose)
    kept = checkpoint.load(job["policy"]["directory"], model, "cpu", world.base)
    first = world.train(job, kept)
    assert first["metrics"]["parity/mean_abs"] < 1e-5 and first["metrics"]["grad_norm"] > 0
    following = {"policy": {"directory": job["output"], "digest": "v0"}, "model": model.model_dump(mode="json")}
    world.train(job | following | {"output": str(world.root / f"{name}-2")}, kept)
    world.train(job | following | {"output": str(world.root / f"{name}-2-loaded")})
    assert digest(world.root / f"{name}-2") == digest(world.root / f"{name}-2-loaded")
    assert digest(world.root / f"{name}-1") != digest(world.root / f"{name}-2")
    changed = [
        key
        for key, value in weights(job["output"]).items()
        if not torch.equal(value, weights(world.policies[name])[key])
    ]
    assert any("visual" not in key for key in changed)
    assert any("visual" in key for key in changed) == (name == "full")


def test_excluded_rows_and_micro_batches_leave_the_gradient_alone(world):
    whole = world.train(world.job("whole", train=TRAIN.model_copy(update={"token_budget": 10_000})))
    cut = world.train(world.job("cut", train=TRAIN.model_copy(update={"token_budget": 1})))
    assert cut["steps"][0]["grad_norm"] == pytest.approx(whole["steps"][0]["grad_norm"], rel=1e-5)
    assert cut["steps"][0]["loss"] == pytest.approx(whole["steps"][0]["loss"], rel=1e-5)
    excluded = [dataclasses.replace(t, logprobs=(-99.0,) * len(t.logprobs)) for t in world.trajectories[6:]]
    rollouts = world.rollouts("spoiled", [*world.trajectories[:6], *excluded])
    train = TRAIN.model_copy(update={"token_budget": 10_000})
    world.train(world.job("excluded", train=train, rollouts=str(rollouts.directory)))
    assert digest(world.root / "excluded") == digest(world.root / "whole")


def fail_backward(ctx, grad):
    raise RuntimeError("out of resource: shared memory")


def double_backward(ctx, grad):
    return tuple(None if part is None else 2 * part for part in BACKWARD(ctx, grad))


BACKWARD = PackedAttention.backward


@pytest.mark.parametrize("why", ["obstacle", "wrong numbers", "no backward", "wrong gradients"])
def test_where_packing_can_not_be_right_rows_are_padded(world, monkeypatch, caplog, why):
    whole = world.train(world.job(f"packed {why}"))
    if why == "obstacle":
        monkeypatch.setattr(
            "thinkimg.trainer.forward.shared_prompts.find_obstacle", lambda config: "it looks through a window"
        )
    elif why == "wrong numbers":
        monkeypatch.setattr("thinkimg.trainer.packing_check.LIMITS", {"float32": -1.0})
    else:
        backward = fail_backward if why == "no backward" else double_backward
        monkeypatch.setattr(PackedAttention, "backward", staticmethod(backward))
    padded = world.train(world.job(f"padded {why}"))
    assert "Prompts are not shared" in caplog.text
    assert (whole["metrics"]["packing/fallback"], padded["metrics"]["packing/fallback"]) == (0, 1)
    assert 0 < whole["metrics"]["packing/computed"] <= 1
    assert padded["metrics"]["grad_norm"] == pytest.approx(whole["metrics"]["grad_norm"], rel=1e-5)
    off = world.train(world.job(f"off {why}", train=TRAIN.model_copy(update={"shared_prompts": False})))
    assert off["metrics"]["packing/fallback"] == 0 and off["metrics"]["grad_norm"] == padded["metrics"]["grad_norm"]


@pytest.mark.parametrize(
    "model", [FULL, LORA, LORA.model_copy(update={"dtype": "bfloat16"})], ids=["full", "lora", "bf16"]
)
def test_of_a_sharded_policy_the_kernel_is_tried_without_the_model(world, monkeypatch, model):
    """A backward pass that fails would leave FSDP2 in a state of which nobody knows."""
    policy = checkpoint.start_from_base(world.base, model, "cpu", seed=0)
    assert packing_check.try_kernel(policy) is None
    monkeypatch.setattr(PackedAttention, "backward", staticmethod(fail_backward))
    assert packing_check.try_kernel(policy) == "RuntimeError: out of resource: shared memory"


def test_frozen_vision_stays_and_several_steps_use_old_logps(world):
    loss = LossConfig(beta=0.1, top_entropy_quantile=0.5, entropy_coef=0.01)
    train = TRAIN.model_copy(
        update={"steps": 2, "epochs": 2, "loss": loss, "gradient_checkpointing": True, "warmup_steps": 2}
    )
    model = FULL.model_copy(update={"train_vision": False})
    job = world.job("several", model=model, train=train, reference=str(world.policies["full"]))
    result = world.train(job)
    assert [step["lr"] for step in result["steps"]] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])
    assert result["steps"][0]["kl"] == pytest.approx(0, abs=1e-9) and result["steps"][-1]["kl"] > 1e-4
    before, after = weights(world.policies["full"]), weights(job["output"])
    assert all(torch.equal(before[key], after[key]) for key in before if "visual" in key)
    assert checkpoint.read_state(Path(job["output"]))["updates"] == 4


def test_groups_are_dealt_whole():
    rows = [Row(str(i), f"g{i % 5}", "", None, np.empty(0)) for i in range(20)]
    batches = deal(rows, 3, 2, seed=1)
    assert len(batches) == 6 and deal(rows, 3, 2, seed=1) == batches != deal(rows, 3, 2, seed=2)
    for epoch in (batches[:3], batches[3:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(20))
        assert all(len({b for b, batch in enumerate(epoch) for i in batch if i % 5 == g}) == 1 for g in range(5))
    assert len(deal(rows, 9, 1, seed=0)) == 5


def shifted(world, job):
    rows = [dataclasses.replace(t, logprobs=(t.logprobs[0] - 3, *t.logprobs[1:])) for t in world.trajectories]
    return job | {"rollouts": str(world.rollouts("shifted", rows).directory)}


def swapped_pixels(world, job):
    keys, pictures = list(world.pictures), list(world.pictures.values())
    table = world.image_table("swapped", dict(zip(keys, [*pictures[1:], pictures[0]], strict=True)))
    return job | {"images": job["images"] | {"tables": [str(table)]}}


def other_weights(world, job):
    return job | {"policy": job["policy"] | {"digest": "v1"}}


def other_limits(world, job):
    return job | {"images": job["images"] | {"max_pixels": 784}}


def other_temperature(world, job):
    return job | {"conversation": job["conversation"] | {"temperature": 2.0}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, "Engine and trainer disagree.*token .* of trajectory"),
        (swapped_pixels, "have the hash"),
        (other_weights, "sampled with the weights v0"),
        (other_limits, "patches in the engine"),
        (other_temperature, "Engine and trainer disagree"),
    ],
)
def test_the_parity_gate_trips(world, change, message):
    job = change(world, world.job("refused"))
    with pytest.raises(UserError, match=message):
        world.train(job)
    assert not Path(job["output"]).exists()


@pytest.mark.parametrize("model", [FULL, LORA], ids=["full", "lora"])
def test_the_warm_start_learns_and_makes_a_policy(world, model):
    job = world.warmstart_job(f"warm-{model.adaptation}", model=model.model_dump(mode="json"))
    policy = checkpoint.start_from_base(world.base, model, "cpu", seed=0)
    lines = []
    result = warmstart_job.run(job, policy, Ranks(), lines.append)
    assert result["steps"][-1]["loss"] < result["steps"][0]["loss"] - 0.02 and len(lines) == 6
    assert [step["lr"] for step in result["steps"]][:2] == pytest.approx([2.5e-3, 5e-3])
    assert result["steps"][-1]["lr"] == pytest.approx(5e-4)
    loaded = checkpoint.load(job["output"], model, "cpu", world.base)
    assert loaded.moments == {} and loaded.updates == 0
    for (name, a), b in zip(policy.model.named_parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_merged_adapter_gives_the_same_logits(world):
    from transformers import AutoModelForImageTextToText

    job = world.job("lora-trained", model=LORA)
    policy = checkpoint.load(world.policies["lora"], LORA, "cpu", world.base)
    world.train(job, policy)
    checkpoint.export_merged(job["output"], world.root / "merged", base=world.base)
    merged = AutoModelForImageTextToText.from_pretrained(world.root / "merged")
    tokens = torch.arange(20, 40)[None]
    with torch.no_grad():
        expected = policy.model(input_ids=tokens).logits
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-4)
        with policy.model.disable_adapter():
            assert not torch.allclose(policy.model(input_ids=tokens).logits, expected, atol=1e-3)
    needed = {"tokenizer.json", "preprocessor_config.json", "chat_template.json", "config.json"}
    assert needed <= set(digest(world.root / "merged"))


def test_policies_refuse_what_they_are_not(world):
    with pytest.raises(UserError, match="adaptation"):
        checkpoint.load(world.policies["lora"], FULL, "cpu")
    with pytest.raises(UserError, match="not on other"):
        checkpoint.load(world.policies["lora"], LORA, "cpu", Base("other"))
    with pytest.raises(UserError, match="no policy"):
        checkpoint.load(world.root / "base", FULL, "cpu")


def test_the_worker_is_kept_and_survives_a_failing_job(world, tmp_path):
    lines = []
    with Trainer(TrainerConfig(threads=1), log_path=tmp_path / "log") as trainer:
        job = world.job("kept-1")
        first = trainer.submit(job, lines.append)
        assert first["reloaded"] and [line["step"] for line in lines] == [1] and lines[0]["steps"] == 1
        assert digest(job["output"]) == digest_of_in_process(world)
        renamed = world.root / "published"
        Path(job["output"]).rename(renamed)
        loose = TRAIN.model_copy(update={"parity": ParityConfig(max_kl=1e9, min_slope=-9.0)})
        second = trainer.submit(world.job("kept-2", train=loose, policy={"directory": str(renamed), "digest": "v0"}))
        assert not second["reloaded"] and second["updates"] == 2
        with pytest.raises(UserError, match="sampled with the weights") as caught:
            trainer.submit(other_weights(world, world.job("kept-3")))
        assert caught.value.hint
        with pytest.raises(TrainerError, match="KeyError"):
            trainer.submit({"kind": "train"})
        pid = trainer._worker.child.pid
        assert trainer.submit(world.job("kept-4"))["reloaded"] and trainer._worker.child.pid == pid
        for descendant in descendants(pid):
            os.kill(descendant, signal.SIGKILL)
        with pytest.raises(TrainerError, match="ended with status"):
            trainer._wait(trainer._worker.child, tmp_path / "never", tmp_path / "neither", print)


def test_a_trainer_that_was_closed_starts_nothing(tmp_path):
    """As when a loop ends in one thread while another is about to train."""
    with Trainer(TrainerConfig(threads=1), log_path=tmp_path / "log") as trainer:
        pass
    before = descendants(os.getpid())
    with pytest.raises(RuntimeError, match="closed"):
        trainer.submit({"kind": "train"})
    assert set(descendants(os.getpid())) <= set(before)


def digest_of_in_process(world) -> dict[str, str]:
    world.train(world.job("in-process"))
    return digest(world.root / "in-process")


def test_two_processes_are_one(world, tmp_path):
    train = TRAIN.model_copy(update={"loss": LossConfig(top_entropy_quantile=0.5), "token_budget": 60})
    one = world.train(world.job("one", train=train))
    with Trainer(TrainerConfig(threads=1, processes=2), log_path=tmp_path / "log") as trainer:
        two = trainer.submit(world.job("two", train=train))
        with pytest.raises(UserError, match="have the hash"):
            trainer.submit(swapped_pixels(world, world.job("refused", train=train)))
        assert trainer._worker is None
    for name in ("grad_norm", "loss", "entropy", "parity/mean_abs", "tokens"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5, abs=1e-6), name


def test_a_worker_that_can_do_no_job_says_why_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("THINKIMG_ENVIRONMENT", "ACCELERATE_USE_DEEPSPEED")
    with Trainer(TrainerConfig(threads=1), log_path=tmp_path / "log") as trainer:
        for _ in range(2):
            with pytest.raises(UserError, match="The accelerate config asks for DEEPSPEED"):
                trainer.submit({"kind": "train"})


def test_launch_commands():
    several = build_launch_command(TrainerConfig(processes=2), gpus=0)
    assert "torch.distributed.run" in several and several[several.index("--nproc_per_node") + 1] == "2"
    assert build_launch_command(TrainerConfig(), gpus=0) == [sys.executable, "-m", "thinkimg.trainer.worker"]
    on_gpus = build_launch_command(TrainerConfig(processes=4), gpus=4)
    assert (
        "--multi_gpu" in on_gpus
        and on_gpus[on_gpus.index("--num_processes") + 1] == "4"
        and "accelerate.commands.launch" in on_gpus
    )


def test_the_users_default_config_of_accelerate_is_another_trainings(tmp_path, monkeypatch):
    """It would choose the GPUs, or DeepSpeed: as accelerate's launcher reads our command line."""
    from accelerate.commands import launch

    text = "{distributed_type: DEEPSPEED, gpu_ids: '3', mixed_precision: fp8, num_processes: 5}"
    (tmp_path / "default.yaml").write_text(text)
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "default.yaml"))
    command = build_launch_command(TrainerConfig(processes=2), gpus=2)
    options = launch.launch_command_parser().parse_args(command[3:])
    read, *_ = launch._validate_launch_command(options)
    assert (read.multi_gpu, read.use_deepspeed, read.gpu_ids, read.num_processes) == (True, False, "all", 2)
    assert read.mixed_precision == "no" and read.module and read.training_script == "thinkimg.trainer.worker"


def test_trainers_of_one_machine_take_different_ports(tmp_path):
    def port(config: str) -> str:
        command = build_launch_command(TrainerConfig(processes=2, accelerate_config=config), gpus=0)
        assert "--config_file" in command and command[command.index("--num_machines") + 1] == "1"
        return command[command.index("--main_process_port") + 1]

    assert port("ddp") != port("ddp")
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: MULTI_GPU\nmain_process_port: 29511")
    assert port(str(own)) == "29511"
