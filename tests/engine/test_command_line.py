"""A GPU's command line of the engine, through vLLM's own parser: every preset and model, every rank of an adapter."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from thinkimg.config.load import list_presets, load_config
from thinkimg.engine.server import ServerSettings, server_command
from thinkimg.errors import UserError
from thinkimg.stages.rollout import settings_of


@pytest.fixture(scope="module")
def parser():
    return make_arg_parser(FlexibleArgumentParser())


MODELS = (
    "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-4B-Thinking", "Qwen/Qwen3-VL-8B-Instruct",
    "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B",
)  # fmt: skip


def settings(config) -> ServerSettings:
    """Return those of a server that sleeps where the preset has it sleep."""
    engine = config.where.engine
    return ServerSettings(settings_of(config).engine, engine, config.model.lora_rank, not engine.keep)


def parse(parser, preset: str, *overrides: str):
    """Return the config, and the arguments as vLLM reads them."""
    config = load_config(preset, overrides)
    arguments = parser.parse_args(server_command(config.model.path, 8000, settings(config))[3:])
    validate_parsed_serve_args(arguments)
    return config, arguments


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setattr("thinkimg.closure.on_cpu", lambda: False)


@pytest.mark.parametrize("preset", [name for name in list_presets() if name != "tiny"])
def test_vllm_reads_what_a_preset_means(parser, preset):
    config, found = parse(parser, preset, "where.engine.tensor_parallel_size=2")
    assert found.model == config.model.path and found.host == "127.0.0.1" and found.port == 8000
    assert found.enable_lora and found.max_lora_rank >= config.model.lora_rank and found.max_loras == 2
    assert found.enable_sleep_mode == found.sleep_mode_offload_cudagraph == (not config.where.engine.keep)
    assert found.tensor_parallel_size == 2
    assert found.gpu_memory_utilization == config.where.engine.gpu_memory_utilization
    assert found.max_model_len == config.conversation.max_tokens and found.dtype == config.model.precision
    assert found.max_num_seqs == config.where.engine.max_num_seqs
    images = (
        json.loads(found.limit_mm_per_prompt)
        if isinstance(found.limit_mm_per_prompt, str)
        else found.limit_mm_per_prompt
    )
    assert images == {"image": config.conversation.max_images, "video": 0}


def test_what_is_started_is_not_deprecated():
    module = server_command("Qwen/Qwen3-VL-2B-Instruct", 8000, settings(load_config("balanced")))[2]
    source = Path(importlib.util.find_spec(module).origin).read_text()
    assert "def main()" in source and '__name__ == "__main__"' in source and "DeprecationWarning" not in source


@pytest.mark.parametrize("devices, size", [("[0, 1]", 2), ("[0, 1]", 1), ("[3, 1, 2, 0]", 2), ("[GPU-a, GPU-b]", 1)])
def test_vllm_reads_each_of_several_servers(parser, devices, size):
    """The quick start on GPUs 0 and 1 for the engine, and one server for each GPU; none takes the other's port."""
    config = load_config("high-quality", [f"where.engine={{devices: {devices}, tensor_parallel_size: {size}}}"])
    asked = settings(config)
    parts = asked.engine.split(cpu=False)
    assert [device for part in parts for device in part.devices] == list(config.where.engine.devices)
    for port, part in enumerate(parts, 8000):
        argv = server_command(config.model.path, port, dataclasses.replace(asked, engine=part))[3:]
        found = parser.parse_args(argv)
        validate_parsed_serve_args(found)
        assert found.tensor_parallel_size == size == len(part.devices) and found.data_parallel_size == 1
        assert found.port == port and not found.device_ids


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("preset", [name for name in list_presets() if name != "tiny"])
def test_a_models_name_alone_is_enough(parser, preset, model):
    """No file of it is here, and nothing is asked of a network: grid and talk are its family's, with any preset."""
    config, found = parse(parser, preset, f"model.path={model}")
    family = config.family()
    assert config.view().token_side == family.processor.token_side
    assert (config.talk().protocol, config.talk().coordinates) == (family.protocols[0], family.coordinates)
    assert found.dtype == "bfloat16" and found.enable_prefix_caching and found.enable_chunked_prefill is not False
    sizes = found.mm_processor_kwargs["size"]
    assert (
        sizes["shortest_edge"] == family.processor.token_side**2 and sizes["longest_edge"] >= config.images.max_pixels
    )


@pytest.mark.parametrize(
    "cpu, dtype, fits", [(True, "bfloat16", True), (True, "float32", False), (False, "float32", True)]
)
def test_a_precision_that_vllm_has_no_kernel_for_is_one_sentence(monkeypatch, cpu, dtype, fits):
    monkeypatch.setattr("thinkimg.closure.on_cpu", lambda: cpu)
    asked = settings(load_config("development", ["model.path=Qwen/Qwen3.5-4B", f"model.dtype={dtype}"]))
    if fits:
        argv = server_command("Qwen/Qwen3.5-4B", 8000, asked)
        assert argv[argv.index("--dtype") + 1] == dtype
        return
    with pytest.raises(UserError, match="on a CPU in bfloat16, not in float32. Hint: Leave model.dtype null"):
        server_command("Qwen/Qwen3.5-4B", 8000, asked)


@pytest.mark.parametrize(
    "family, expected", [("qwen2_5_vl", "float32"), ("qwen3_vl", "float32"), ("qwen3_5", "bfloat16")]
)
def test_a_tiny_model_has_the_precision_of_its_familys_kernels(family, expected):
    tiny = f"model.tiny.family={family}"
    config = load_config("tiny", [tiny])
    assert config.model.dtype is None and settings_of(config).engine.dtype == expected == config.model.precision
    assert config.model.defining()["dtype"] == expected  # as in fingerprints of a config that names it
    assert config.model.defining() == load_config("tiny", [tiny, f"model.dtype={expected}"]).model.defining()
    if family == "qwen3_5":
        with pytest.raises(UserError, match="model.dtype=float32 does not suit a tiny qwen3_5"):
            load_config("tiny", [tiny, "model.dtype=float32"])


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64, 65, 128, 300, 512])
def test_an_adapter_of_any_rank_that_the_config_takes_can_be_served(parser, rank):
    _, found = parse(parser, "development", f"model.lora_rank={rank}")
    assert found.enable_lora and found.max_lora_rank >= rank


def test_a_rank_that_vllm_does_not_serve_is_refused():
    with pytest.raises(UserError, match="model.lora_rank"):
        load_config("development", ["model.lora_rank=513"])
