"""FSDP2: a process that loads a policy never holds more of it than its own part, and machines that differ are named."""

import json
import multiprocessing
import pickle

import pytest
from grpo_world import FULL, LORA, TRAIN, World
from loading_rank import loading_rank
from safetensors.torch import load_file
from unequal_rank import SHARES, add_gradients, build_passes, unequal_rank

from thinkimg.errors import UserError
from thinkimg.models.family import list_families
from thinkimg.models.settings import TinyModel
from thinkimg.models.tiny import create_tiny
from thinkimg.process import free_port
from thinkimg.trainer import checkpoint, installations
from thinkimg.trainer.client import Trainer
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.settings import TrainerConfig


def run_ranks(function, *args) -> None:
    """Call function(rank, port, *args) in two processes."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [context.Process(target=function, args=(rank, port, *args)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]


def test_no_process_holds_the_whole_model_while_it_loads(tmp_path, monkeypatch):
    shape = TinyModel(
        vocab_size=20_000, hidden_size=768, layers=6, heads=12, vision_layers=2, vision_hidden_size=32, vision_heads=2
    )
    create_tiny(tmp_path / "base", shape, ["crop the image"], seed=0)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")  # what is freed is the system's again at once
    run_ranks(loading_rank, str(tmp_path), str(tmp_path / "base"))
    for rank in range(2):
        figures = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        for adaptation, found in figures.items():
            assert found["peak"] < 0.7 * found["model"], (adaptation, rank, found["peak"] / found["model"])
            whole = [name for name in found["whole"] if ".visual." not in name]
            assert [name.rpartition("language_model.")[2] for name in whole] == ["norm.weight"]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, World]:
    """A world of each family, with a head of its own."""
    return {family: World(tmp_path_factory.mktemp(family), tied=False, family=family) for family in list_families()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A sharded trainer."""
    where = TrainerConfig(threads=1, processes=2, accelerate_config="fsdp2")
    with Trainer(where, log_path=tmp_path_factory.mktemp("sharded") / "log") as trainer:
        yield trainer


@pytest.mark.parametrize("family", list_families())
def test_a_step_with_a_head_of_its_own_is_that_of_one_process(worlds, two_processes, family):
    """Other shapes than a tied model's: two tables are gathered, and two have gradients."""
    train, world = TRAIN.model_copy(update={"max_grad_norm": 1e9, "token_budget": 150}), worlds[family]
    for name, model in {"full": FULL, "lora": LORA}.items():
        alone = world.train(world.job(f"{name}-one", model=model, train=train))["metrics"]
        found = two_processes.submit(world.job(f"{name}-two", model=model, train=train))["metrics"]
        for metric in ("grad_norm", "loss", "entropy", "parity/mean_abs"):
            # Rounding: sums of float32 in another order; the recurrent layers' exponentials carry it on.
            assert found[metric] == pytest.approx(alone[metric], rel=3e-5, abs=1e-6), (name, metric)
        one, two = (load_file(world.root / f"{name}-{way}" / "optimizer.safetensors") for way in ("one", "two"))
        assert one.keys() == two.keys()
        first = {key: value for key, value in one.items() if key.startswith("exp_avg.")}
        largest = max(float(value.norm()) for value in first.values())
        for key, value in first.items():
            assert float((two[key] - value).norm()) < 1e-5 * largest, key
    names = load_file(world.root / "full-two" / "model" / "model.safetensors").keys()
    assert (
        names == load_file(world.root / "full-one" / "model" / "model.safetensors").keys() and "lm_head.weight" in names
    )


@pytest.mark.parametrize("large", [0, 1])
def test_a_process_with_fewer_micro_batches_makes_as_many_passes(world, tmp_path, large):
    """Else it waits in one collective, and the other in another."""
    (tmp_path / "world.pkl").write_bytes(pickle.dumps(world))
    run_ranks(unequal_rank, str(tmp_path), large)
    policy = checkpoint.load(world.policies["full"], FULL, "cpu")
    passes = build_passes(world, policy, Ranks())
    rows = tuple(i for share in SHARES for i in share)
    expected, _ = passes.score(rows)
    add_gradients(passes, rows)
    figures = [json.loads((tmp_path / f"unequal-{rank}.json").read_text()) for rank in range(2)]
    found = {int(i): values for one in figures for i, values in one["logps"].items()}
    assert found.keys() == expected.keys()
    for i, values in expected.items():
        assert found[i] == pytest.approx(values.tolist(), abs=1e-5)
    norms = {name: float(p.grad.norm()) for name, p in policy.model.named_parameters() if p.grad is not None}
    assert figures[0]["norms"].keys() == norms.keys()
    assert figures[0]["norms"] == pytest.approx(norms, rel=1e-4, abs=1e-4)


def test_weights_in_4_bits_are_not_sharded(world):
    with pytest.raises(UserError, match="FSDP2 shards no weights in 4 bits"):
        checkpoint.start_from_base(world.base, LORA.model_copy(update={"load_in_4bit": True}), "meta", seed=0)


class Two(Ranks):
    """Two processes, of which the second says something else."""

    def __init__(self, other: dict[str, str]):
        super().__init__(0, 2)
        object.__setattr__(self, "other", other)

    def gather(self, value):
        return [value, ("elsewhere", self.other)]


@pytest.mark.parametrize("package", [*installations.PACKAGES, "thinkimg's code"])
def test_a_machine_with_another_version_is_named(package):
    here = installations.describe_installation()
    installations.compare_installations(Two(here))
    with pytest.raises(UserError, match=rf"^Process 1 of the trainer, on elsewhere, has {package} 0\.0, and the first"):
        installations.compare_installations(Two(here | {package: "0.0"}))


@pytest.mark.parametrize("variable", ["FSDP_VERSION", "ACCELERATE_USE_FSDP", "OMP_NUM_THREADS"])
def test_a_machine_with_another_accelerate_config_is_named(variable, monkeypatch):
    here = installations.describe_installation()
    monkeypatch.setenv(variable, "7")
    with pytest.raises(UserError, match=f"has {variable} .*, and the first process 7"):
        installations.compare_installations(Two(here))


def test_a_store_that_is_not_shared_is_named(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "state.json").write_text("{}")
    job = {"policy": {"directory": str(tmp_path / "policy")}}
    seen = {str(tmp_path / "policy" / "state.json"): "2 bytes"}
    installations.compare_inputs(Two(seen), job)
    for other in ({}, {next(iter(seen)): "3 bytes"}):
        with pytest.raises(UserError, match=r"state\.json .*, and the first process 2 bytes.*\. Hint: .*where\.store"):
            installations.compare_inputs(Two(other), job)


def test_another_file_of_the_users_loss_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "loss_of_nodes.py").write_text("LOSS = None")
    job = {"train": {"loss": {"loss_type": "loss_of_nodes"}}}
    installations.compare_inputs(Two(installations.describe_loss(job)), job)
    for other in ("0123456789ab", "There is no module loss_of_nodes."):
        with pytest.raises(UserError, match="has the loss loss_of_nodes "):
            installations.compare_inputs(Two({"the loss loss_of_nodes": other}), job)
    missing = {"train": {"loss": {"loss_type": "no_such_loss"}}}
    assert "no_such_loss" in installations.describe_loss(missing)["the loss no_such_loss"]
    assert installations.describe_loss({"train": {"loss": {"loss_type": "grpo"}}}) == {}
