"""Forecast of a GPU's memory, with a GPU pretended: every preset fits the GPU that it is for, in trainer and engine."""

import copy
import re

import pytest
import torch
from paths import REPOSITORY
from transformers import AutoConfig, Qwen3_5Config, Qwen3VLConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel

from thinkimg.analysis import disk_forecast, engine_memory, forecast
from thinkimg.config.load import list_presets, load_config
from thinkimg.config.tree import Config
from thinkimg.models.base import Base
from thinkimg.models.settings import ModelConfig
from thinkimg.trainer import checkpoint
from thinkimg.trainer.memory import GIB
from thinkimg.trainer.policy import train_only

VISIBLE = {16: 15.6, 32: 31.4, 48: 44.4, 64: 63.0, 80: 79.1}
"""GiB that CUDA shows of a card of so many GB, of the poorest of its kind: T1000, 5090, L40S, a part of an H100."""
BUSY = 8
"""Conversations at once, below which an engine waits for itself."""


@pytest.fixture
def pretend(monkeypatch):
    """Has the machine a GPU of so many GiB, of which all is free."""

    def gpu(gib: float) -> None:
        monkeypatch.setattr(forecast, "gpu_memory", lambda *_: (int(gib * GIB), int(gib * GIB)))

    return gpu


@pytest.fixture(scope="module")
def geometries():
    """Configs of Qwen2.5-VL's 7B, 3B and 72B."""
    import sys

    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        from workload import SEVEN_B, config_of
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))
    seven = config_of(SEVEN_B)

    def resize(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, groups: int, tied: bool):
        other = copy.deepcopy(seven)
        text = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate}
        text |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups}
        for name, value in (text | {"layer_types": layers * seven.text_config.layer_types[:1]}).items():
            setattr(other.text_config, name, value)
        other.tie_word_embeddings, other.vision_config.out_hidden_size = tied, hidden
        return other

    three = resize(151936, 2048, 11008, 36, 16, 2, tied=True)
    return {"7B": seven, "3B": three, "72B": resize(152064, 8192, 29568, 80, 64, 8, tied=False)}


def size_of(preset: str) -> int:
    """GB that a preset says it is for, in its own comment or that of the preset which it extends."""
    text = (REPOSITORY / "thinkimg" / "presets" / f"{preset}.yaml").read_text()
    found = re.search(r"For (\d+) GB", text)
    return int(found[1]) if found else size_of(re.search(r"^extends: (\S+)", text, re.M)[1])


def geometry_of(config, geometries):
    return geometries["3B" if "3B" in config.model.path else "7B"]


PRESETS = [name for name in list_presets() if name != "tiny"]


@pytest.mark.parametrize("preset", PRESETS)
def test_an_engine_of_a_preset_plays_enough_at_once(preset, geometries):
    config, gpu = load_config(preset), int(VISIBLE[size_of(preset)] * GIB)
    base = geometry_of(config, geometries)
    engine = engine_memory.predict_engine(config, base, gpu)
    assert engine.conversations >= BUSY, forecast.forecast_engine(config, base, gpu)


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_of_a_preset_fits_the_gpu_that_it_says(preset, geometries, pretend):
    config = load_config(preset, ["where.teacher.url=http://teacher/v1"])
    pretend(VISIBLE[size_of(preset)])
    line = forecast.forecast_trainer(config, geometry_of(config, geometries))
    assert "fits in" in line and "of the GPU" in line, line


def test_the_7b_and_its_cache_are_counted(geometries):
    config = load_config("balanced")
    engine = engine_memory.predict_engine(config, geometries["7B"], 80 * GIB)
    assert engine.weights / GIB == pytest.approx(15.45, abs=0.05)  # 8.29 G parameters in bfloat16
    assert engine.adapters / GIB == pytest.approx(0.60, abs=0.04)
    assert engine.per_token == 56 * 1024
    halves = engine_memory.predict_engine(
        load_config("balanced", ["where.engine.tensor_parallel_size=2"]), geometries["7B"], 80 * GIB
    )
    assert halves.weights == engine.weights // 2 and halves.per_token == engine.per_token // 2


@pytest.mark.parametrize("together", [True, False])
def test_a_72b_on_eight_gpus_takes_turns_with_its_engine(together, geometries, pretend):
    """Split eight ways in both; beside one another the weights and a step are too much for 80 GB."""
    turns = [f"where.{half}.keep={str(together).lower()}" for half in ("engine", "trainer")]
    eight = ["where.engine.tensor_parallel_size=8", "where.trainer={processes: 8, accelerate_config: fsdp2}"]
    path = "model.path=Qwen/Qwen2.5-VL-72B-Instruct"
    config = load_config("high-quality", ["where.teacher.url=http://teacher/v1", path, *eight, *turns])
    engine = engine_memory.predict_engine(config, geometries["72B"], int(VISIBLE[80] * GIB))
    assert engine.weights / GIB == pytest.approx(73.4e9 * 2 / 8 / GIB, rel=0.01) and engine.conversations >= BUSY
    pretend(VISIBLE[80])
    line = forecast.forecast_trainer(config, geometries["72B"])
    assert "beside 19.0 GiB of weights" in line and ("fits in" in line) == (not together), line


def test_heads_of_a_width_of_their_own_are_counted():
    """As in Qwen3-VL-4B: 32 heads of 128 on a width of 2,560."""
    text = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    base = Qwen3VLConfig(text_config=text | {"head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936})
    engine = engine_memory.predict_engine(load_config("balanced"), base, 80 * GIB)
    assert engine.per_token == 2 * 36 * 8 * 128 * 2 and engine.per_sequence == 0


def test_recurrent_layers_keep_a_state_and_no_cache():
    """As large as those that transformers keeps, but for the oldest token of the convolution's window."""
    text = {
        "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24,
        "vocab_size": 64, "intermediate_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    base = Qwen3_5Config(text_config=text, vision_config=vision)
    config = load_config("balanced", ["model.dtype=float32", "conversation.max_tokens=64"])
    engine = engine_memory.predict_engine(config, base, 80 * GIB)
    language = Qwen3_5TextModel(base.text_config).eval()
    with torch.no_grad():
        cache = language(input_ids=torch.arange(10)[None], use_cache=True).past_key_values
    recurrent = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    attending = [layer for layer in cache.layers if not hasattr(layer, "recurrent_states")]
    assert (len(recurrent), len(attending)) == (6, 2)
    assert engine.per_token * 10 == sum(layer.keys.nbytes + layer.values.nbytes for layer in attending)
    windows = [layer.conv_states[0][..., 1:] for layer in recurrent]
    states = [layer.recurrent_states[0] for layer in recurrent]
    assert engine.per_sequence == sum(x.numel() * x.itemsize for x in [*windows, *states])
    assert engine.conversations == engine.cache // (engine.per_token * 64 + engine.per_sequence)


def test_a_gpu_that_is_too_small_is_told_with_what_to_change(geometries):
    line = forecast.forecast_engine(load_config("development"), geometries["7B"], 16 * GIB)
    assert "no conversation of 8192 tokens" in line and "where.engine.gpu_memory_utilization" in line


def test_the_lines_of_a_gpu_name_it_and_both_halves(pretend):
    """Of a tiny model, as it is the same for all: a trainer's line, an engine's, and the disk's."""
    pretend(24)
    trainer, engine, _ = forecast.forecast_needs(load_config("tiny")).splitlines()
    assert "fits in" in trainer and "GiB of the GPU" in trainer and "conversations of 512 tokens" in engine
    pretend(0.1)
    trainer, engine, _ = forecast.forecast_needs(load_config("tiny")).splitlines()
    assert "of the GPU are free: lower train.token_budget" in trainer and "no conversation" in engine


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_the_disk_of_a_tiny_policy_is_what_a_checkpoint_writes(adaptation, tiny_models, tmp_path):
    """Weights to the byte but for headers; so are the moments, of the language model alone or of all."""
    model = ModelConfig(dtype="float32", adaptation=adaptation, lora_rank=8)
    policy = checkpoint.start_from_base(Base("tiny", directory=str(tiny_models[0])), model, "cpu", seed=0)
    parameters = train_only(policy.model, model, vision=False)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    policy.resume_optimizer(parameters, 0.0).step()
    checkpoint.save(policy, tmp_path / "policy", learning_rate=0.0, seed=0)
    weights = sum(path.stat().st_size for path in (tmp_path / "policy").rglob("*model.safetensors"))
    optimizer = (tmp_path / "policy" / "optimizer.safetensors").stat().st_size
    config = Config(model=model, iterations=3)
    sizes = disk_forecast.predict_policies(config, AutoConfig.from_pretrained(tiny_models[0]))
    assert sizes.weights == pytest.approx(weights, rel=0.05) and sizes.weights <= weights
    assert sizes.optimizer == pytest.approx(optimizer, rel=0.05) and sizes.optimizer <= optimizer
    assert sizes.total(sizes.count) == 4 * sizes.weights + 3 * sizes.optimizer


def test_a_whole_7b_that_would_fill_the_disk_is_told_how_many_to_keep(monkeypatch, geometries):
    monkeypatch.setattr(disk_forecast, "free_space", lambda store: 500 * GIB)
    config = load_config("development", ["model.adaptation=full", "model.dtype=null", "iterations=20"])
    line = forecast.forecast_policies(config, geometries["7B"])
    written = re.search(r"an iteration writes ([0-9.]+) GiB of weights and ([0-9.]+) GiB of the optimizer's", line)
    assert float(written[1]) == pytest.approx(30.9, abs=0.1) and float(written[2]) == pytest.approx(56.9, abs=0.5)
    assert "21 policies take" in line and "only 500.0 GiB are free" in line
    keep = re.search(r"set where\.keep_policies=(\d+)$", line)[1]
    assert "fits in" in forecast.forecast_policies(load_config("development", [
        "model.adaptation=full", "model.dtype=null", "iterations=20", f"where.keep_policies={keep}"
    ]), geometries["7B"])  # fmt: skip
    monkeypatch.setattr(disk_forecast, "free_space", lambda store: 50 * GIB)
    assert "free some, or set where.store" in forecast.forecast_policies(config, geometries["7B"])


def test_a_loop_of_whole_models_says_so_before_it_starts(monkeypatch, geometries, capsys):
    from flows.loop import announce_disk

    monkeypatch.setattr(forecast, "base_config", lambda config: geometries["7B"])
    for settings in (["model.adaptation=lora"], ["model.adaptation=full", "model.tiny={}"]):
        announce_disk(load_config("development", settings))
    assert capsys.readouterr().err == ""
    announce_disk(load_config("development", ["model.adaptation=full", "model.dtype=null"]))
    assert "an iteration writes 30.9 GiB" in capsys.readouterr().err
