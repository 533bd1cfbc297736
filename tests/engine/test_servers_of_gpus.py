"""Servers as GPUs run them, on a CPU: adapters, two processes that share a model, sleep, and Model Runner V2.

What each of them samples is compared with what the trainer computes.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_codecs import CORPUS
from original_base import write_original
from paths import SUPPORT
from served_families import TEMPERATURE, Served, Talk, say

from thinkimg.conversation.tokens import TokenStream
from thinkimg.engine.client import EngineClient, EngineError
from thinkimg.engine.request import Sampling
from thinkimg.engine.server import Server, ServerSettings, post
from thinkimg.engine.settings import EngineConfig, EngineSettings
from thinkimg.models.base import Base
from thinkimg.models.settings import ModelConfig, TinyModel
from thinkimg.models.tiny import create_tiny
from thinkimg.trainer import checkpoint
from thinkimg.trainer.policy import PolicyModel

pytestmark = pytest.mark.long

ADAPTERS = ("A", "B")
LORA = ModelConfig(dtype="float32", adaptation="lora", lora_rank=8, lora_alpha=16)
BOUND = 1e-4  # of |difference| of log-probabilities, float32; an adapter moves them by tenths


class World:
    """A model, and two adapters on it that change what it says.

    tied: a tiny model, whose head is its embeddings; else one with grouped heads, in the files of the 7B.
    """

    def __init__(self, root: Path, *, tied: bool = False):
        self.root, self.media = root, root / "media"
        self.media.mkdir()
        create_tiny(root / "base", TinyModel(vocab_size=512), CORPUS, seed=0)
        if not tied:
            config = json.loads((root / "base" / "config.json").read_text())
            ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
            write_original(root / "base", 32, 512, ids)
        base = Base("tiny", directory=str(root / "base"))
        self.policies: dict[str, PolicyModel] = {}
        for seed, name in enumerate(ADAPTERS):
            policy = checkpoint.start_from_base(base, LORA, "cpu", seed=0)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter_name, parameter in policy.model.named_parameters():
                    if "lora_B" in parameter_name:
                        parameter.normal_(0, 0.1, generator=generator)
            checkpoint.save(policy, root / name, learning_rate=0.0, seed=0)
            self.policies[name] = policy
            checkpoint.export_merged(root / name, root / f"{name}-merged", base=base)

    @contextmanager
    def serve(self, model: str, *, rank: int | None = None, cores: str = "0", size: int = 1) -> Iterator[Server]:
        limits = EngineSettings(dtype="float32", max_tokens=1024, max_images=4, max_pixels=10**6)
        place = EngineConfig(cpu_kvcache_gib=1, max_num_seqs=8, cpu_threads_bind=cores, tensor_parallel_size=size)
        settings = ServerSettings(limits, place, rank, media_dir=self.media)
        with Server(self.root / model, log_path=self.root / "log", version=model, settings=settings) as server:
            yield server

    def served(self, server: Server) -> Served:
        return Served("qwen2_5_vl", (self.root / "base", self.root / "base"), server.url, self.media)

    def play(self, server: Server, adapter: str | None, seeds: range, length: int) -> list[Talk]:
        """Return a turn of each seed about two pictures, by an adapter of the server or by the model itself."""
        served = self.served(server)

        async def say_once(client: EngineClient, seed: int) -> Talk:
            pictures = served.draw(100 * seed, 2)
            prompt = served.codec.prompt("Use a tool.", say("Which way do the stripes run?", pictures))
            talk = Talk(TokenStream(served.codec, prompt, [picture.slot for picture in pictures]), pictures)
            sampling = Sampling(TEMPERATURE, length, seed, (served.codec.end,), served.codec.banned)
            refs = [served.media.ref(picture.uuid, picture.view) for picture in pictures]
            answer = await client.generate(talk.stream.ids, refs, sampling)
            assert answer.weight_version == (adapter or answer.weight_version)
            talk.stream.check(answer.prompt_token_ids)
            talk.stream.append_sampled(answer.token_ids, answer.logprobs)
            return talk

        async def run() -> list[Talk]:
            async with EngineClient([server.url], media="file") as client:
                if adapter is not None:
                    await client.load_adapter(adapter, self.root / adapter / "adapter")
                return list(await asyncio.gather(*(say_once(client, seed) for seed in seeds)))

        return asyncio.run(run())

    def play_both(self, server: Server, seeds: range, length: int) -> dict[str, list[Talk]]:
        """Return the turns of both adapters, played at the same time."""

        async def run() -> list[list[Talk]]:
            return await asyncio.gather(
                *(asyncio.to_thread(self.play, server, name, seeds, length) for name in ADAPTERS)
            )

        return dict(zip(ADAPTERS, asyncio.run(run()), strict=True))

    def differences(self, server: Server, talks: list[Talk]) -> dict[str, float]:
        """Return for each adapter, and for the base, how far the trainer's log-probabilities are from the server's."""
        engine, found = np.concatenate([talk.logps for talk in talks]), {}
        for name, policy in self.policies.items():
            found[name] = float(np.abs(engine - self.served(server).score(talks, policy.model)).max())
        with self.policies["A"].model.disable_adapter():
            found["base"] = float(np.abs(engine - self.served(server).score(talks, self.policies["A"].model)).max())
        return found

    def check_is(self, name: str, server: Server, talks: list[Talk]) -> None:
        """Assert that what was played is one of "A", "B" and "base", and none of the others."""
        found = self.differences(server, talks)
        assert found.pop(name) < BOUND
        assert min(found.values()) > 100 * BOUND


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("cores, size, tied", [("0", 1, False), ("0", 1, True), ("0|1", 2, False)])
def test_two_adapters_and_their_base_play_at_once(request, tmp_path_factory, cores, size, tied):
    world = World(tmp_path_factory.mktemp("tied"), tied=True) if tied else request.getfixturevalue("world")
    with world.serve("base", rank=8, cores=cores, size=size) as server:
        for name, talks in world.play_both(server, range(2), 8).items():
            world.check_is(name, server, talks)
        world.check_is("base", server, world.play(server, None, range(2), 8))


def test_two_processes_that_share_a_model_take_other_weights(world):
    with world.serve("A-merged", cores="0|1", size=2) as server:
        world.check_is("A", server, world.play(server, None, range(8), 32))

        async def load() -> None:
            async with EngineClient([server.url], media="file") as client:
                await client.load_weights(world.root / "B-merged", "B")

        asyncio.run(load())
        world.check_is("B", server, world.play(server, None, range(8), 32))


def test_a_server_that_slept_plays_on_with_its_adapter(world):
    """The scheduler pauses and the caches are dropped; a CPU's memory stays, so that this is all that can be seen."""
    with world.serve("base", rank=8) as server:
        before = world.play(server, "A", range(2), 8)
        for _ in range(2):  # again does nothing
            server.sleep()
        server.wake()
        after = world.play(server, "A", range(2), 8)
        assert [talk.sampled for talk in after] == [talk.sampled for talk in before]
        world.check_is("A", server, after)
        post(f"{server.url}/v1/unload_lora_adapter", {"lora_name": "A"})
        world.check_is("A", server, world.play(server, "A", range(2), 8))  # it was loaded again
        with pytest.raises(EngineError):
            post(f"{server.url}/v1/load_lora_adapter", {"lora_name": "C", "lora_path": str(world.root / "C")})


def test_model_runner_v2_plays_what_the_trainer_computes(world, monkeypatch):
    """Of a turn each with and without an adapter, under Triton's interpreter: some seconds a token."""
    path = os.pathsep.join([str(SUPPORT / "v2_runner"), os.environ.get("PYTHONPATH", "")])
    for name, value in {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_USE_V2_MODEL_RUNNER": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", path)
    with world.serve("base", rank=8) as server:
        assert "Using V2 Model Runner" in (world.root / "log").read_text()
        world.check_is("A", server, world.play(server, "A", range(2), 4))
        world.check_is("base", server, world.play(server, None, range(2), 4))
