"""A GPU's command line of the engine, through vLLM's own parser: every preset, every rank of an adapter."""

import json

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


def parse(parser, preset: str, *overrides: str):
    """Return the arguments as vLLM reads them, of a server that sleeps where the preset has it sleep."""
    config = load_config(preset, overrides)
    engine, rank = config.where.engine, config.model.lora_rank
    argv = server_command("/model", 8000, ServerSettings(settings_of(config).engine, engine, rank, not engine.keep))
    arguments = parser.parse_args(argv[3:])
    validate_parsed_serve_args(arguments)
    return config, arguments


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setattr("thinkimg.closure.on_cpu", lambda: False)


@pytest.mark.parametrize("preset", [name for name in list_presets() if name != "tiny"])
def test_vllm_reads_what_a_preset_means(parser, preset):
    config, found = parse(parser, preset, "where.engine.tensor_parallel_size=2")
    assert found.model == "/model" and found.host == "127.0.0.1" and found.port == 8000
    assert found.enable_lora and found.max_lora_rank >= config.model.lora_rank
    assert found.enable_sleep_mode == (not config.where.engine.keep)
    assert found.tensor_parallel_size == 2
    assert found.gpu_memory_utilization == config.where.engine.gpu_memory_utilization
    assert found.max_model_len == config.conversation.max_tokens and found.dtype == config.model.dtype
    assert found.max_num_seqs == config.where.engine.max_num_seqs
    images = (
        json.loads(found.limit_mm_per_prompt)
        if isinstance(found.limit_mm_per_prompt, str)
        else found.limit_mm_per_prompt
    )
    assert images == {"image": config.conversation.max_images, "video": 0}


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64, 65, 128, 300, 512])
def test_an_adapter_of_any_rank_that_the_config_takes_can_be_served(parser, rank):
    _, found = parse(parser, "development", f"model.lora_rank={rank}")
    assert found.enable_lora and found.max_lora_rank >= rank


def test_a_rank_that_vllm_does_not_serve_is_refused():
    with pytest.raises(UserError, match="model.lora_rank"):
        load_config("development", ["model.lora_rank=513"])
