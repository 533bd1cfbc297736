"""Each family in training: what makes it different counts, adapters reach it, and files of other models are refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from grpo_world import FULL, LORA, TRAIN, World, shape_of

from thinkimg.analysis import forecast
from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.models.base import Base
from thinkimg.models.family import list_families
from thinkimg.models.family_check import check_files
from thinkimg.trainer import checkpoint, checksums, weight_files
from thinkimg.trainer.checkpoint import start_from_base
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.modules import get_base_model, unwrap
from thinkimg.trainer.ranks import Ranks
from thinkimg.trainer.rows import read_rows
from thinkimg.trainer.settings import ParityConfig

FAMILIES = list_families()
MODELS = {"full": FULL, "lora": LORA}


@pytest.fixture(scope="module", params=FAMILIES)
def family_world(request, tmp_path_factory) -> World:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield World(tmp_path_factory.mktemp("world"), family=request.param)
    torch.set_num_threads(before)


def score(world: World, policy, *, units=None) -> torch.Tensor:
    """Log-probabilities of the world's rows."""
    talks = [row.conversation for row in read_rows(world.artifact, world.image_token)]
    pixels = world.patches()
    pixels.prepare(talks)
    scorer = Scorer(policy.model, pixels, temperature=1.0, banned=(), features=None)
    with torch.no_grad():
        logps, _ = scorer(talks, units)
    pixels.close()
    return logps


PARTS = {
    "qwen2_5_vl": ("language_model.layers.0.self_attn.q_proj.bias",),
    "qwen3_vl": (
        "visual.deepstack_merger_list.0.linear_fc2.weight",
        "visual.deepstack_merger_list.1.linear_fc2.weight",
        "visual.pos_embed.weight",
        "language_model.layers.1.self_attn.q_norm.weight",
        "language_model.layers.1.self_attn.k_norm.weight",
    ),
    "qwen3_5": (
        "visual.pos_embed.weight",
        "language_model.layers.1.linear_attn.conv1d.weight",
        "language_model.layers.1.linear_attn.A_log",
        "language_model.layers.1.linear_attn.dt_bias",
        "language_model.layers.1.linear_attn.in_proj_qkv.weight",
        "language_model.layers.2.linear_attn.norm.weight",
        "language_model.layers.3.self_attn.q_norm.weight",
        "language_model.layers.3.self_attn.k_norm.weight",
    ),
}
"""Parameters of what makes a family different."""


def test_what_makes_a_family_different_changes_the_log_probabilities(family_world):
    """So that a forward pass that left one of them out would be seen."""
    policy = start_from_base(family_world.base, FULL, "cpu", seed=0)
    before, base = score(family_world, policy), get_base_model(policy.model)
    for name in PARTS[policy.family.name]:
        parameter = base.get_parameter(name)
        value = parameter.data.clone()
        parameter.data.neg_().add_(0.3)
        assert float((score(family_world, policy) - before).abs().max()) > 1e-3, name
        parameter.data.copy_(value)
    text = policy.model.config.text_config
    if policy.family.name != "qwen2_5_vl":
        assert text.num_attention_heads > text.num_key_value_heads > 1, "heads are grouped"
        number = policy.family.attention_layers(text)[-1]
        keys = base.get_parameter(f"language_model.layers.{number}.self_attn.k_proj.weight")
        keys.data.copy_(keys.data.roll(len(keys) // text.num_key_value_heads, 0))
        assert float((score(family_world, policy) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_trains_on_as_one_that_stayed_and_prompts_are_shared_where_they_can_be(family_world, name, caplog):
    world, model = family_world, MODELS[name]
    # The rollouts are the first policy's.
    train = TRAIN.model_copy(update={"parity": ParityConfig(max_kl=1e9, min_slope=-9.0)})
    job = world.job(f"{name}-1", model=model, train=train)
    kept = checkpoint.load(job["policy"]["directory"], model, "cpu", world.base)
    metrics = world.train(job, kept)["metrics"]
    assert metrics["parity/mean_abs"] < 1e-5 and metrics["grad_norm"] > 0
    recurrent = kept.family.name == "qwen3_5"
    assert metrics["packing/fallback"] == recurrent
    assert ("Prompts are not shared: most of its layers are recurrent" in caplog.text) == recurrent
    following = {"policy": {"directory": job["output"], "digest": "v0"}, "model": model.model_dump(mode="json")}
    world.train(job | following | {"output": str(world.root / f"{name}-2")}, kept)
    world.train(job | following | {"output": str(world.root / f"{name}-2-loaded")})
    files = [sorted(p for p in (world.root / f"{name}-2{end}").rglob("*") if p.is_file()) for end in ("", "-loaded")]
    assert len(files[0]) == len(files[1]) > 5
    for stayed, loaded in zip(*files, strict=True):
        assert stayed.read_bytes() == loaded.read_bytes(), stayed


def test_an_adapter_reaches_every_linear_layer_and_is_merged(family_world, tmp_path):
    world = family_world
    policy = checkpoint.load(world.policies["lora"], LORA, "cpu", world.base)
    before = score(world, policy)
    inner = unwrap(policy.model)
    adapted = {name.split(".lora_A")[0] for name, _ in inner.named_modules() if name.endswith("lora_A")}
    linears = {
        name.removesuffix(".base_layer")
        for name, module in inner.model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    }
    assert adapted == {f"model.language_model.{name}" for name in linears}
    leaves = {name.rpartition(".")[2] for name in adapted}
    recurrent = {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
    assert leaves & recurrent == (recurrent if policy.family.name == "qwen3_5" else set())
    assert not any(kind in name for name in adapted for kind in ("conv1d", "visual", "lm_head"))
    job = world.job("adapter", model=LORA)
    world.train(job, policy)
    trained = {
        name
        for name, parameter in policy.model.named_parameters()
        if "lora_B" in name and float(parameter.detach().abs().max()) > 0
    }
    assert len(trained) == len(adapted)
    after = score(world, policy)
    assert float((after - before).abs().max()) > 1e-3
    checkpoint.export_merged(job["output"], tmp_path / "merged", base=world.base)
    merged = start_from_base(Base("merged", directory=str(tmp_path / "merged")), FULL, "cpu", seed=0)
    torch.testing.assert_close(score(world, merged), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_a_saved_policy_is_located_in_its_files(family_world, name):
    """As processes of one trainer do it, which load a part each."""
    policy = checkpoint.load(family_world.policies[name], MODELS[name], "cpu", family_world.base)
    checksums.verify(policy, checksums.compute_expected(policy, Ranks()), Ranks())
    assert weight_files.locate(policy).keys() == weight_files.list_floating(policy).keys()


# Files of other models


def changed(base: Path, root: Path, file: str, change) -> Path:
    """A copy of a model whose JSON file is changed."""
    shutil.copytree(base, root / "changed")
    path = root / "changed" / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return root / "changed"


CHANGES = {
    "preprocessor_config.json": {
        "patch_size": 15, "merge_size": 3, "temporal_patch_size": 1, "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.5], "rescale_factor": 1.0,
    },
    "config.json": {"patch_size": 15, "spatial_merge_size": 3, "temporal_patch_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in CHANGES.items() for name in names])
def test_files_that_state_other_values_than_the_family_are_refused(base_of, tmp_path, family, file, name):
    base, value = Path(base_of(family).directory), CHANGES[file][name]

    def change(content: dict) -> None:
        (content["vision_config"] if file == "config.json" else content)[name] = value

    directory = changed(base, tmp_path, file, change)
    with pytest.raises(
        UserError, match=rf"{file} states {name} = {re.escape(json.dumps(value))}, and .* have "
    ) as caught:
        check_files(directory, FULL)
    assert json.dumps(value) in caught.value.message and family in caught.value.message and caught.value.hint
    with pytest.raises(UserError, match=f"states {name}"):
        start_from_base(Base("changed", directory=str(directory)), LORA, "cpu", seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_files_may_be_missing_and_newer_files_are_checked(base_of, tmp_path, family):
    base = Path(base_of(family).directory)
    assert check_files(base, FULL) is FAMILIES[family]
    directory = changed(base, tmp_path, "preprocessor_config.json", lambda content: content.clear())
    check_files(directory, FULL)
    (directory / "preprocessor_config.json").unlink()
    check_files(directory, FULL)
    newer = {"image_processor": {"patch_size": FAMILIES[family].processor.patch, "image_mean": [0.0, 0.5, 0.5]}}
    (directory / "processor_config.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match=r"image_mean = \[0.0, 0.5, 0.5\]"):
        check_files(directory, FULL)
    (directory / "processor_config.json").write_text("[")
    with pytest.raises(UserError, match="can't be read"):
        check_files(directory, FULL)


def test_another_familys_processor_is_refused(base_of, tmp_path):
    """A Qwen3-VL with the preprocessing of a Qwen2.5-VL would be shown another grid by the engine."""
    shutil.copytree(base_of("qwen3_vl").directory, tmp_path / "mixed")
    shutil.copy(Path(base_of("qwen2_5_vl").directory, "preprocessor_config.json"), tmp_path / "mixed")
    with pytest.raises(UserError, match="states patch_size = 14, and models of the family qwen3_vl have 16"):
        check_files(tmp_path / "mixed", FULL)


# Mixtures of experts


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_5"])
def experts(request, tmp_path_factory) -> Path:
    """A model directory of a mixture of experts, without weights."""
    from transformers import AutoConfig

    shape, name = shape_of(request.param), f"{request.param}_moe"
    ids = {token: 200 + number for number, token in enumerate(forecast.tiny.SPECIAL_TOKENS)}
    content = FAMILIES[request.param].make_config(shape, ids).to_dict()
    content["model_type"], content["text_config"]["model_type"] = name, f"{name}_text"
    content["vision_config"].pop("model_type")
    content["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    directory = tmp_path_factory.mktemp("experts")
    (directory / "config.json").write_text(json.dumps(content))
    assert AutoConfig.from_pretrained(directory).text_config.num_experts == 4
    return directory


@pytest.mark.parametrize(("model", "reason"), [(LORA, "an adapter would miss them"), (FULL, "has been tested")])
def test_experts_are_refused_in_a_sentence_before_anything_is_loaded(experts, model, reason):
    with pytest.raises(UserError, match=f"can't be trained: qwen3_.*_moe has experts, .*{reason}") as caught:
        start_from_base(Base("experts", directory=str(experts)), model, "cpu", seed=0)  # there are no weights to load
    assert "dense" in caught.value.hint
    settings = [f"model.path={experts}", f"model.adaptation={model.adaptation}", "model.tiny=null"]
    with pytest.raises(UserError, match=reason):
        forecast.forecast_needs(load_config("tiny", settings))


def test_an_adapter_would_leave_experts_out(experts):
    """The reason for the refusal: once transformers makes linear layers of experts this can go."""
    from transformers import AutoConfig

    from thinkimg.trainer.policy import add_adapter, build_empty

    model = build_empty(AutoConfig.from_pretrained(experts), LORA)
    assert any(parameter.dim() == 3 and "experts" in name for name, parameter in model.named_parameters())
    with pytest.raises(UserError, match="has experts"):
        add_adapter(model, LORA)
