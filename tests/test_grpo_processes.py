"""Two processes on a CPU (gloo): their accumulated gradients are one process's, and FSDP2's step is that of DDP."""

from pathlib import Path

import pytest
import yaml
from grpo_world import FULL, LORA, TRAIN
from safetensors.torch import load_file

from thinkimg.config import TrainerConfig
from thinkimg.errors import UserError
from thinkimg.grpo.worker import Trainer

# After one step from nothing exp_avg is a tenth of the accumulated gradient, if nothing is clipped.
UNCLIPPED = TRAIN.model_copy(update={"max_grad_norm": 1e9, "token_budget": 150})
MODELS = {"full": FULL, "lora": LORA}
PRESETS = Path(__file__).parents[1] / "thinkimg" / "presets" / "accelerate"


def tensors(directory: Path) -> tuple[dict, dict]:
    """Accumulated gradients (up to a factor) and trained weights."""
    gradients = {k: v for k, v in load_file(directory / "optimizer.safetensors").items() if k.startswith("exp_avg.")}
    (weights,) = [*directory.glob("model/*.safetensors"), *directory.glob("adapter/*.safetensors")]
    return gradients, load_file(weights)


def worst(found: dict, expected: dict) -> float:
    """Largest relative error over tensors, by norm; those that are nothing but rounding are left out."""
    largest = max(float(value.norm()) for value in expected.values())
    compared = [k for k, v in expected.items() if float(v.norm()) > 1e-5 * largest]
    assert len(compared) > len(expected) / 3
    return max(float((found[k] - expected[k]).norm() / expected[k].norm()) for k in compared)


@pytest.fixture(scope="module")
def steps(world, tmp_path_factory):
    """(name of the model, ways) -> directory of the policy after one step, and the worker's metrics."""
    found = {}
    log = tmp_path_factory.mktemp("log") / "trainer"
    for name, model in MODELS.items():
        job = world.job(f"{name}-one", model=model, train=UNCLIPPED)
        found[name, "one"] = Path(job["output"]), world.train(job)["metrics"]
    for way, env in (("ddp", {}), ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})):
        with pytest.MonkeyPatch.context() as patch:
            for key, value in env.items():
                patch.setenv(key, value)
            with Trainer(TrainerConfig(threads=1, processes=2), log_path=log) as trainer:
                for name, model in MODELS.items():
                    job = world.job(f"{name}-{way}", model=model, train=UNCLIPPED)
                    found[name, way] = Path(job["output"]), trainer.submit(job)["metrics"]
                    if way == "fsdp2" and name == "lora":  # once more, from what was gathered and written
                        loose = UNCLIPPED.model_copy(update={"parity": TRAIN.parity.model_copy(update={"max_kl": 1e9})})
                        policy = {"directory": job["output"], "digest": "v0"}
                        more = world.job("lora-more", model=model, train=loose, policy=policy)
                        found["more", way] = Path(more["output"]), trainer.submit(more)["metrics"]
                        again = world.job("lora-again", model=model, train=loose, policy=policy)
                        found["more", "one"] = Path(again["output"]), world.train(again)["metrics"]
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_accumulated_gradients_are_those_of_one_process(steps, name, way):
    (one, alone), (two, together) = steps[name, "one"], steps[name, way]
    assert worst(tensors(two)[0], tensors(one)[0]) < 1e-5
    for metric in ("grad_norm", "loss", "entropy", "parity/mean_abs", "tokens"):
        assert together[metric] == pytest.approx(alone[metric], rel=1e-5, abs=1e-6), metric


@pytest.mark.parametrize("name", MODELS)
def test_an_fsdp2_step_is_ddps(world, steps, name):
    before = tensors(world.policies[name])[1]
    (gradients, ddp), (found, fsdp) = (tensors(steps[name, way][0]) for way in ("ddp", "fsdp2"))
    assert worst(found, gradients) < 1e-5
    assert fsdp.keys() == ddp.keys()
    # Adam divides by the gradient's size: what is rounding in the one is rounding in the other, ten thousand times larger.
    update = {key: ddp[key] - before[key] for key in ddp if gradients_of(key, gradients)}
    assert worst({key: fsdp[key] - before[key] for key in update}, update) < 1e-3


def gradients_of(key: str, gradients: dict) -> bool:
    """Whether a weight, by its name in a file, has a gradient that is more than rounding."""
    largest = max(float(value.norm()) for value in gradients.values())
    names = [n for n in gradients if n.endswith("." + key) or n.replace(".default", "").endswith("." + key)]
    return any(float(gradients[n].norm()) > 1e-3 * largest for n in names)


def test_fsdp2_goes_on_from_its_own_policy(steps):
    (one, _), (two, _) = steps["more", "one"], steps["more", "fsdp2"]
    assert worst(tensors(two)[0], tensors(one)[0]) < 1e-4


def test_the_accelerate_configs_are_accelerates():
    from accelerate.commands.config.config_args import load_config_from_file

    for name, kind in (("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")):
        config = load_config_from_file(str(PRESETS / f"{name}.yaml"))
        assert config.distributed_type == kind and config.num_processes == 8
    fsdp = yaml.safe_load((PRESETS / "fsdp2.yaml").read_text())["fsdp_config"]
    assert fsdp["fsdp_version"] == 2


def test_fsdp1_is_refused(monkeypatch, tmp_path):
    from thinkimg.grpo.worker import Worker

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setattr("accelerate.Accelerator", lambda cpu: type("A", (), {"num_processes": 2, "process_index": 0}))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(UserError, match="FSDP 1"):
        Worker(tmp_path, 2)
