"""Two processes on a CPU (gloo): they hold the files' weights, and their accumulated gradients are one process's.

FSDP2's step is that of DDP."""

import json
import multiprocessing
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
import yaml
from grpo_world import FULL, LORA, TRAIN
from lossy_rank import LOST, lossy_rank
from paths import REPOSITORY
from safetensors.torch import load_file, save_file

from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.models.base import Base
from thinkimg.process import free_port
from thinkimg.store import files
from thinkimg.trainer import checkpoint, checksums, weight_files
from thinkimg.trainer.client import Trainer, read_accelerate_settings
from thinkimg.trainer.policy import PolicyModel, load_model
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.settings import TrainerConfig
from thinkimg.trainer.worker import Worker

# After one step from nothing exp_avg is a tenth of the accumulated gradient, if nothing is clipped.
UNCLIPPED = TRAIN.model_copy(update={"max_grad_norm": 1e9, "token_budget": 150})
MODELS = {"full": FULL, "lora": LORA}
PRESETS = REPOSITORY / "thinkimg" / "presets" / "accelerate"
CONFIGS = sorted(path.stem for path in PRESETS.glob("*.yaml"))
WAYS = (*CONFIGS, "own")


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


def own_file(directory: Path) -> str:
    """An accelerate config of the user's that says what the launcher has by default: all but one load zeros."""
    settings = yaml.safe_load((PRESETS / "fsdp2.yaml").read_text())
    settings["fsdp_config"] |= {"fsdp_cpu_ram_efficient_loading": True}
    path = directory / "own.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture(scope="module")
def steps(world, tmp_path_factory):
    """(name of the model, way) -> directory of the policy after one step, and the worker's metrics.

    The names "warm-full" and "warm-lora" are warm starts of no step. The ways are one process, and two as they are
    launched for an accelerate config.
    """
    found = {}
    directory = tmp_path_factory.mktemp("processes")
    for name, model in MODELS.items():
        job = world.job(f"{name}-one", model=model, train=UNCLIPPED)
        found[name, "one"] = Path(job["output"]), world.train(job)["metrics"]
    for way in WAYS:
        config = own_file(directory) if way == "own" else way
        where = TrainerConfig(threads=1, processes=2, accelerate_config=config)
        with Trainer(where, log_path=directory / "log") as trainer:
            for name, model in MODELS.items():
                job = world.job(f"{name}-{way}", model=model, train=UNCLIPPED)
                job["padding"] = "x" * 9 * 2**20  # a job of many pairs; the process group's store takes 8 MiB
                found[name, way] = Path(job["output"]), trainer.submit(job)["metrics"]
                warm = world.warmstart_job(f"warm-{name}-{way}", model=model.model_dump(mode="json"), rollouts=None)
                warm["warmstart"] = warm["warmstart"] | {"steps": 0}
                trainer.submit(warm)
                found[f"warm-{name}", way] = Path(warm["output"]), {}
            if way == "fsdp2":  # once more, from what was gathered and written
                loose = UNCLIPPED.model_copy(
                    update={"parity": TRAIN.parity.model_copy(update={"max_kl": 1e9, "min_slope": -9.0})}
                )
                policy = {"directory": str(found["lora", way][0]), "digest": "v0"}
                more = world.job("lora-more", model=LORA, train=loose, policy=policy)
                found["more", way] = Path(more["output"]), trainer.submit(more)["metrics"]
                again = world.job("lora-again", model=LORA, train=loose, policy=policy)
                found["more", "one"] = Path(again["output"]), world.train(again)["metrics"]
                narrow = LORA.model_copy(update={"dtype": "bfloat16"})
                strict = loose.model_copy(update={"parity": TRAIN.parity.model_copy(update={"max_kl": 1e9})})
                for place, run in ((way, trainer.submit), ("one", world.train)):
                    job = world.job(f"narrow-{place}", model=narrow, train=strict, policy=policy)
                    with pytest.raises(UserError) as refused:
                        run(job)
                    found["narrow", place] = Path(job["output"]), {"said": refused.value.message}
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_accumulated_gradients_are_those_of_one_process(steps, name, way):
    (one, alone), (two, together) = steps[name, "one"], steps[name, way]
    assert worst(tensors(two)[0], tensors(one)[0]) < 1e-5
    for metric in ("grad_norm", "loss", "entropy", "parity/mean_abs", "tokens"):
        assert together[metric] == pytest.approx(alone[metric], rel=1e-5, abs=1e-6), metric


@pytest.mark.parametrize("way", WAYS)
def test_a_full_first_policy_is_the_base(world, steps, way):
    base = load_file(world.root / "base" / "model.safetensors")
    published = load_file(steps["warm-full", way][0] / "model" / "model.safetensors")
    assert published.keys() == base.keys()
    assert all(torch.equal(published[key], value) for key, value in base.items())


@pytest.mark.parametrize("way", WAYS)
def test_a_new_adapter_is_that_of_one_process(world, steps, way):
    alone = load_file(world.policies["lora"] / "adapter" / "adapter_model.safetensors")
    found = load_file(steps["warm-lora", way][0] / "adapter" / "adapter_model.safetensors")
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[key], value) for key, value in alone.items())


@pytest.mark.parametrize("name", MODELS)
def test_an_fsdp2_step_is_ddps(world, steps, name):
    before = tensors(world.policies[name])[1]
    (gradients, ddp), (found, fsdp) = (tensors(steps[name, way][0]) for way in ("ddp", "fsdp2"))
    assert worst(found, gradients) < 1e-5
    assert fsdp.keys() == ddp.keys()
    # Adam divides by the gradient's size: rounding in the one is rounding in the other, ten thousand times larger.
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


@pytest.mark.parametrize("place", ["one", "fsdp2"])
def test_in_bfloat16_an_adapter_of_one_step_that_is_not_applied_is_refused(steps, place):
    """What it changes is far below bfloat16's noise: weights are widened, sharded ones, too. The base has played."""
    said = steps["narrow", place][1]["said"]
    assert re.search(r"does not apply the adapter: .* shows -?0\.0", said), said


def test_the_accelerate_configs_are_accelerates():
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    for name in CONFIGS:
        config = load_config_from_file(str(PRESETS / f"{name}.yaml"))
        assert config.distributed_type == kinds[name] and config.num_processes == 8
    fsdp = yaml.safe_load((PRESETS / "fsdp2.yaml").read_text())["fsdp_config"]
    assert fsdp["fsdp_version"] == 2 and fsdp["fsdp_cpu_ram_efficient_loading"] is False


def test_fsdp1_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setattr(
        "thinkimg.trainer.worker.Accelerator", lambda **_: type("A", (), {"num_processes": 2, "process_index": 0})
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(UserError, match="FSDP 1"):
        Worker(tmp_path, 2)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="asks for DEEPSPEED"):
        Worker(tmp_path, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed_type: DEEPSPEED", "distributed_type DEEPSPEED. Hint: Set distributed_type to MULTI_GPU"),
        ("distributed_type: MEGATRON_LM", "distributed_type MEGATRON_LM"),
        ("distributed_type: XLA", "distributed_type XLA"),
        ("distributed_type: NO", "distributed_type NO"),
        ("distributed_type: FSDP", "FSDP 1"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "FSDP 1"),
        ("[MULTI_GPU]", "no mapping of settings"),
        ("a: [", "can't be read"),
    ],
)
def test_other_kinds_of_training_are_refused_before_a_launch(text, said, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    where = TrainerConfig(processes=2, accelerate_config=str(path))
    with (
        pytest.raises(UserError) as caught,
        Trainer(where, log_path=tmp_path / "log"),
    ):
        pass
    assert said in str(caught.value)


def test_one_process_may_have_a_config_without_distribution(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("distributed_type: NO")
    assert read_accelerate_settings(TrainerConfig(accelerate_config=str(path))) == {"distributed_type": False}


NEW_NAMES = {"visual.": "model.visual.", "model.": "model.language_model."}
SHAPES = ("old names", "new names", "a head of its own", "several files")


@pytest.fixture(scope="module", params=SHAPES)
def base(request, world, tmp_path_factory) -> Base:
    """The world's base as others write it."""
    directory = tmp_path_factory.mktemp("bases") / "base"
    shutil.copytree(world.root / "base", directory)
    weights = load_file(directory / "model.safetensors")
    assert (
        "model.layers.0.mlp.up_proj.weight" in weights and "lm_head.weight" not in weights
    )  # the Hub's old names, tied
    if request.param == "new names":
        new = {
            next(name.replace(old, new, 1) for old, new in NEW_NAMES.items() if name.startswith(old)): value
            for name, value in weights.items()
        }
        save_file(new, directory / "model.safetensors", metadata={"format": "pt"})
    if request.param == "a head of its own":
        settings = json.loads((directory / "config.json").read_text())
        settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = False
        (directory / "config.json").write_text(json.dumps(settings))
        head = torch.randn(280, 32, generator=torch.Generator().manual_seed(0))
        save_file(weights | {"lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    if request.param == "several files":
        model = load_model(directory, FULL, "cpu")
        (directory / "model.safetensors").unlink()
        model.save_pretrained(directory, max_shard_size="50KB")
        assert len(list(directory.glob("*.safetensors"))) > 2
    return Base("tiny", directory=str(directory))


def summed(base: Base) -> tuple[float, float]:
    """Sum and sum of squares of all that is in a base's files."""
    weights = [
        value.double() for path in Path(base.directory).glob("*.safetensors") for value in load_file(path).values()
    ]
    return sum(float(value.sum()) for value in weights), sum(float(value.square().sum()) for value in weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_checksums_of_files_are_those_of_what_was_loaded(base, model, dtype):
    policy = checkpoint.start_from_base(base, model.model_copy(update={"dtype": dtype}), "cpu", seed=0)
    references = checksums.compute_expected(policy, Ranks())
    checksums.verify(policy, references, Ranks())
    found = [value for name, value in references.items() if "lora_" not in name]
    if (model.adaptation, dtype) != ("lora", "bfloat16"):  # there they are rounded
        totals = sum(value.total for value in found), sum(value.square for value in found)
        assert totals == pytest.approx(summed(base), rel=1e-9)


def breakable(world, name: str) -> PolicyModel:
    base = world.base if name == "lora" else None
    return checkpoint.load(world.policies[name], MODELS[name], "cpu", base)


@pytest.mark.parametrize("name", MODELS)
def test_a_parameter_that_is_not_the_files_is_refused(world, name):
    policy = breakable(world, name)
    references = checksums.compute_expected(policy, Ranks())
    parameters = weight_files.list_floating(policy)
    assert references.keys() == parameters.keys() and len(references) == (56 if name == "full" else 84)
    for key, parameter in parameters.items():
        before = parameter.detach().clone()
        if not before.any():  # a new adapter's second matrix
            continue
        changes = {
            "zeros": lambda p: p.zero_(),
            "half": lambda p: p[: len(p) // 2].zero_(),
            "one": lambda p: p.view(-1)[:1].mul_(1.001),
            "sign": lambda p: p.neg_(),
            "nan": lambda p: p.view(-1)[0].fill_(float("nan")),
        }
        for change in changes.values():
            with torch.no_grad():
                change(parameter)
                with pytest.raises(
                    UserError, match=rf"^In process 0 of the trainer 1 of {len(references)} parameters .* {key}\. Hint"
                ):
                    checksums.verify(policy, references, Ranks())
                parameter.copy_(before)
    checksums.verify(policy, references, Ranks())


def test_an_adapters_second_matrix_is_compared(world):
    policy = breakable(world, "lora")
    references = checksums.compute_expected(policy, Ranks())
    name, parameter = next((n, p) for n, p in weight_files.list_floating(policy).items() if "lora_B" in n)
    parameter.data[0, 0] = 1e-6
    with pytest.raises(UserError, match=name):
        checksums.verify(policy, references, Ranks())


@pytest.mark.parametrize("name", MODELS)
def test_a_parameter_in_no_file_is_refused(world, name, tmp_path):
    policy = breakable(world, name)
    shutil.copytree(policy.weights_directory, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    del weights["visual.merger.mlp.2.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    policy.weights_directory = tmp_path / "base"
    with pytest.raises(UserError, match=r"^1 parameters .* the first is model\.visual\.merger\.mlp\.2\.bias\."):
        checksums.compute_expected(policy, Ranks())


def test_weights_in_4_bits_are_left_out(world):
    policy = checkpoint.start_from_base(world.base, LORA.model_copy(update={"load_in_4bit": True}), "cpu", seed=0)
    references = checksums.compute_expected(policy, Ranks())
    assert len(references) == 84 - 14 and not any(".base_layer.weight" in name for name in references)
    checksums.verify(policy, references, Ranks())


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("visual.merger.mlp.2.bias", r"1 of its weights; the first is model\.visual\.merger\.mlp\.2\.bias\."),
        (
            "model.layers.1.mlp.up_proj.weight",
            r"1 of its weights; .* model\.language_model\.layers\.1\.mlp\.up_proj\.weight\.",
        ),
        ("model.embed_tokens.weight", r"2 of its weights; the first is lm_head\.weight\."),  # tied to each other
    ],
)
def test_a_base_without_one_of_its_weights_is_refused(world, key, said, tmp_path):
    shutil.copytree(world.root / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights[key]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    for model in MODELS.values():
        with pytest.raises(UserError, match=said):
            checkpoint.start_from_base(Base("tiny", directory=str(tmp_path / "base")), model, "cpu", seed=0)


def test_a_lost_shard_fails_the_job_in_every_process(world, tmp_path):
    job = world.warmstart_job("lost", model=FULL.model_dump(mode="json"), rollouts=None)
    (tmp_path / "000001.job.json").write_text(json.dumps(job))
    context = multiprocessing.get_context("spawn")
    port = free_port()
    ranks = [context.Process(target=lossy_rank, args=(rank, port, str(tmp_path), job)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert all(process.exitcode for process in ranks), [
        process.exitcode for process in ranks
    ]  # both have ended, and failed
    names = ("answer-0.json", "answer-1.json", "000001.result.json")
    for error in (json.loads((tmp_path / name).read_text())["error"] for name in names):
        assert error["user"] and error["message"].startswith(
            "In process 0 of the trainer 1 of 56 parameters differ from the files"
        )
        assert LOST in error["message"]
    assert not Path(job["output"]).exists()
    first, second = (json.loads((tmp_path / f"sums-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    files = load_file(world.root / "base" / "model.safetensors")
    for name, values in first["actual"].items():
        key = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        value = files[key].double()
        exact = [value.numel(), float(value.sum()), float(value.square().sum())]
        assert values == pytest.approx(exact, rel=1e-9, abs=1e-9) and first["expected"][name] == pytest.approx(exact)
    assert len(first["actual"]) == len(files)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_idle_process_waits_without_a_collective(rank, tmp_path):
    """In one it would keep its GPU busy."""
    worker, store, job = Worker.__new__(Worker), torch.distributed.HashStore(), {"kind": "grpo"}
    ready = threading.Event()

    class Asked(Ranks):
        def gather(self, value):
            assert ready.is_set(), "there is no job yet"
            return [job, value] if rank else [value, None]

    worker.ranks, worker.store, worker.spool = Asked(rank, 2), store, tmp_path

    def give() -> None:
        ready.set()
        if rank:
            store.set("1.job.json", "ready")
        else:
            files.write(tmp_path / "1.job.json", json.dumps(job))

    threading.Timer(0.3, give).start()
    assert worker._next("1.job.json") == job and ready.is_set()
    assert store.check(["1.job.json"])  # the others are told


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_goes_by_its_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert TrainerConfig(accelerate_config=name).accelerate_file == PRESETS / f"{name}.yaml"
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU")
    for own in ("mine.yaml", "./mine.yaml", str(tmp_path / "mine.yaml")):
        assert TrainerConfig(accelerate_config=own).accelerate_file == Path(own)


@pytest.mark.parametrize("name", ["fsdp3", "fsdp2.yaml", "./fsdp2", "accelerate/fsdp2.yaml", "."])
def test_an_accelerate_config_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=r"has to be ddp or fsdp2 or the path of a file, and '.*' is none of these\.$"):
        load_config(overrides=[f"where.trainer.accelerate_config={name}"])
