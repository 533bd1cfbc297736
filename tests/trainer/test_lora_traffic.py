"""LoRA with its scaling folded, and compiled decoder layers: the same numbers in fewer operations, for any length.

Layers are compiled by "aot_eager" here, which makes no code of its own: seconds instead of a minute. That Inductor's
kernels are right is tested under the marker `long`, and tried by every job that uses them.
"""

import copy
import json

import pytest
import torch
from grpo_world import LORA, TRAIN, World
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from thinkimg.models.family import list_families
from thinkimg.trainer import checkpoint, compile_check
from thinkimg.trainer.forward import compilation
from thinkimg.trainer.forward.lora import FoldedLinear, fold_scaling
from thinkimg.trainer.forward.modules import get_base_model
from thinkimg.trainer.passes import Passes, build_scorer
from thinkimg.trainer.policy import PolicyModel, train_only
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import read_rows
from thinkimg.trainer.stepper import checkpoint_activations

BF16 = LORA.model_copy(update={"dtype": "bfloat16"})


# Folded scaling


class Pair(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(48, 80), nn.Linear(80, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))


def adapted(dtype: torch.dtype, **options: object) -> nn.Module:
    """A pair under an adapter with values, as peft makes it."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 8, "lora_alpha": 24, "target_modules": ["inner", "outer"]} | options)
    model = get_peft_model(Pair().to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) / 8
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = dtype == torch.float32
    return model.eval()


def folded(model: nn.Module) -> nn.Module:
    """A copy of it, folded."""
    twin = copy.deepcopy(model)
    assert fold_scaling(twin) == 2
    return twin


def run(model: nn.Module, dtype: torch.dtype, *, frozen_input: bool = False) -> list[torch.Tensor]:
    """Output and gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 40, 48, generator=generator).to(dtype).requires_grad_(not frozen_input)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    inputs = [] if frozen_input else [x.grad]
    return [out.detach(), *inputs, *(p.grad for p in model.parameters() if p.grad is not None)]


def errors(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Relative error of each tensor, by norm."""
    pairs = zip(actual, expected, strict=True)
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]


@pytest.mark.parametrize("frozen_input", [False, True])
def test_a_folded_layer_equals_pefts_forward_and_backward(frozen_input):
    model = adapted(torch.float32)
    expected = run(model, torch.float32, frozen_input=frozen_input)
    assert max(errors(run(folded(model), torch.float32, frozen_input=frozen_input), expected)) < 1e-6
    assert len(expected) == 5 + (not frozen_input)


def test_in_bfloat16_a_folded_layer_is_as_near_to_float32_as_pefts():
    model = adapted(torch.bfloat16)
    exact = run(copy.deepcopy(model).float(), torch.float32)
    theirs, ours = errors(run(model, torch.bfloat16), exact), errors(run(folded(model), torch.bfloat16), exact)
    assert max(theirs) < 0.02
    for a, b in zip(ours, theirs, strict=True):
        assert a < b + 2**-9  # half a unit in the last place


class Operations(TorchDispatchMode):
    """Names of the operations on tensors of activations' size."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= 3 * 40 * 48 and not function.is_view:
            self.names.append(function._schema.name.removeprefix("aten::"))
        return out


def test_no_multiplication_and_no_addition_of_the_adapters_part_is_left():
    layers = [adapted(torch.float32).base_model.model.inner]
    layers.append(folded(adapted(torch.float32)).base_model.model.inner)
    found = []
    for layer in layers:
        x = torch.randn(3, 40, 48, requires_grad=True)
        with Operations() as operations:
            layer(x).sum().backward()
        found.append(operations.names)
    theirs, ours = ([n for n in names if n in ("mul", "add", "add_")] for names in found)
    assert len(theirs) >= 3 and not ours
    assert found[1].count("addmm_") == 2  # out, and the input's gradient


def test_a_frozen_weight_has_no_gradient_and_what_is_not_plain_stays_as_peft_made_it():
    model = folded(adapted(torch.float32))
    run(model, torch.float32)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    for options in ({"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["inner"]}):
        other = adapted(torch.float32, **options)
        assert fold_scaling(other) == 0 and not any(isinstance(m, FoldedLinear) for m in other.modules())


def test_a_folded_layer_can_be_disabled_merged_and_saved_as_pefts(tmp_path):
    model = adapted(torch.float32)
    twin = folded(model)
    x = torch.randn(2, 5, 48)
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(twin(x), model(x))
    assert twin.state_dict().keys() == model.state_dict().keys()
    for name, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    before = twin(x)
    twin.merge_adapter()
    torch.testing.assert_close(twin(x), before)
    twin.unmerge_adapter()
    merged = twin.merge_and_unload()
    assert not any(isinstance(module, Linear) for module in merged.modules())
    torch.testing.assert_close(merged(x), before)


# Compiled layers


# To compile costs ten seconds and more, so that `make test` does so for one family.
FAMILIES = [pytest.param(name, marks=[pytest.mark.long] if name != "qwen2_5_vl" else []) for name in list_families()]


@pytest.fixture
def wanted(monkeypatch):
    """Has jobs compile on this machine, by "aot_eager"; tests share what is compiled."""
    monkeypatch.setattr(compile_check, "is_wanted", lambda device: True)
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    counters.clear()


def passes_of(world: World, model=LORA, policy: PolicyModel | None = None) -> Passes:
    """Passes over all rows of a world, under an adapter with values."""
    policy = policy or checkpoint.load(world.policies["lora"], model, "cpu", world.base)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    train_only(policy.model, model, vision=False)
    rows = read_rows(world.artifact, world.image_token)
    pixels = world.patches()
    pixels.prepare([row.conversation for row in rows])
    scorer = build_scorer(world.job("none"), policy, pixels, train_vision=False)
    return Passes(policy, Ranks(), scorer, pixels, rows, 400, policy.family.name != "qwen3_5")


def step(passes: Passes, indices: list[int]) -> list[torch.Tensor]:
    """Log-probabilities and the gradients of their sum."""
    passes.policy.model.zero_grad()
    parts = []
    for rows, units in passes.split(indices):
        with passes.policy.autocast():
            logps, _ = passes.scorer(rows, units)
        logps.sum().backward()
        parts.append(logps.detach())
    return [torch.cat(parts), *(p.grad.clone() for p in passes.policy.model.parameters() if p.grad is not None)]


LENGTHS = [[0, 1], [2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7], [6, 7]]  # rows of a batch


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_equal_eager_ones_and_compile_no_more_after_the_first_length(world, wanted, family, tmp_path):
    torch.compiler.reset()
    world = world if family == "qwen2_5_vl" else World(tmp_path, family=family)
    passes = passes_of(world)
    graphs = []

    def compare(values: list[torch.Tensor], indices: list[int]) -> None:
        assert max(errors(step(passes, indices), values)) < 1e-5
        graphs.append(counters["stats"]["unique_graphs"])

    with checkpoint_activations(passes.policy.model):
        expected = [step(passes, rows) for rows in LENGTHS]
        scored = passes.score(range(8))[0]
        with compile_check.compiled(passes.policy):
            for rows, values in zip(LENGTHS, expected, strict=True):
                compare(values, rows)
            assert all(abs(passes.score(range(8))[0][i] - scored[i]).max() < 1e-5 for i in range(8))
            all_graphs = counters["stats"]["unique_graphs"]
            with passes.policy.model.disable_adapter():
                base = passes.score([0, 1])[0]
    assert graphs[0] > 0 and len(set(graphs)) == 1
    with passes.policy.model.disable_adapter():
        assert all((passes.score([0, 1])[0][i] == base[i]).all() for i in (0, 1))
    layers = get_base_model(passes.policy.model).language_model.layers
    assert not any("forward" in vars(module) for layer in layers for module in layer.modules())
    passes = passes_of(world)  # the next job's policy, loaded anew
    with checkpoint_activations(passes.policy.model), compile_check.compiled(passes.policy):
        compare(expected[1], LENGTHS[1])
    assert counters["stats"]["unique_graphs"] == all_graphs, "neither the base nor another policy compiles anew"


@pytest.mark.parametrize("model", [LORA, pytest.param(BF16, marks=pytest.mark.long)], ids=["float32", "bfloat16"])
def test_a_compiled_job_trains_as_an_eager_one(world, wanted, monkeypatch, caplog, model):
    names = f"eager-{model.dtype}", f"compiled-{model.dtype}"
    train = TRAIN.model_copy(update={"steps": 2, "parity": TRAIN.parity.model_copy(update={"max_kl": 1.0})})
    jobs = [world.job(name, model=model, train=train) for name in names]
    with monkeypatch.context() as patch:
        patch.setattr(compile_check, "is_wanted", lambda device: False)
        eager = world.train(jobs[0])["metrics"]
    assert counters["stats"]["unique_graphs"] == 0
    with monkeypatch.context() as patch:
        calls: list[bool] = []
        use = compile_check.use_compiled_layers
        patch.setattr(compile_check, "use_compiled_layers", lambda *a, **k: calls.append(True) or use(*a, **k))
        compiled = world.train(jobs[1])["metrics"]
    assert len(calls) == 2  # the trial's, and the job's
    assert eager["compilation/fallback"] == compiled["compilation/fallback"] == 0
    for name in ("loss", "grad_norm", "parity/mean_abs"):
        assert compiled[name] == pytest.approx(eager[name], rel=1e-4, abs=1e-5 if model is LORA else 0.02), name
    settings = [json.loads((world.root / n / "adapter" / "adapter_config.json").read_text()) for n in names]
    assert settings[0] == settings[1] and not caplog.text.count("not compiled")


def raise_in_compiler(graph, inputs):
    raise RuntimeError("no compiler was found")


def wrong_graph(graph, inputs):
    """A backend whose results are off."""
    return lambda *args: tuple(
        x * 1.5 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in graph(*args)
    )


@pytest.mark.parametrize(
    ("backend", "reason"),
    [(raise_in_compiler, "no compiler was found"), (wrong_graph, "compiled log-probabilities differ")],
)
def test_where_compiling_fails_or_is_wrong_a_job_trains_eagerly_and_says_so(
    world, wanted, monkeypatch, caplog, backend, reason
):
    eager = world.job(f"without-{reason[:3]}", model=LORA)
    with monkeypatch.context() as patch:
        patch.setattr(compile_check, "is_wanted", lambda device: False)
        world.train(eager)
    monkeypatch.setattr(compilation, "BACKEND", backend)
    job = world.job(f"fallback-{reason[:3]}", model=LORA)
    assert world.train(job)["metrics"]["compilation/fallback"] == 1
    assert "Decoder layers are not compiled: " in caplog.text and reason in caplog.text
    adapters = [
        (world.root / j / "adapter" / "adapter_model.safetensors").read_bytes()
        for j in (eager["output"], job["output"])
    ]
    assert adapters[0] == adapters[1]


def test_shards_four_bits_and_a_users_wish_are_reasons_without_a_trial(world, wanted, monkeypatch):
    passes = passes_of(world)
    policy = passes.policy

    def reason(**changes: object) -> str | None:
        for name, value in changes.items():
            monkeypatch.setattr(policy, name, value)
        found = compile_check.find_obstacle(passes, checkpointing=False)
        monkeypatch.undo()
        policy.compilation_obstacle = None
        return found

    assert "FSDP2" in reason(sharded=True)
    assert "4 bits" in reason(config=LORA.model_copy(update={"load_in_4bit": True}))
    with torch._dynamo.config.patch(disable=True):
        assert "TORCH_COMPILE_DISABLE" in reason()
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.long
def test_inductors_kernels_equal_the_eager_layers(world, monkeypatch):
    torch.compiler.reset()
    passes = passes_of(world)
    expected = step(passes, LENGTHS[2])
    with compile_check.compiled(passes.policy):
        for rows in LENGTHS[:2]:
            step(passes, rows)
        graphs = counters["stats"]["unique_graphs"]
        assert max(errors(step(passes, LENGTHS[2]), expected)) < 1e-5
    assert counters["stats"]["unique_graphs"] == graphs
