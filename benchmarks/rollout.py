"""Speed of the rollout loop: tokens per second of the same conversations, played in several ways in one run.

    python benchmarks/rollout.py --store artifacts --policy 3f2a    (else the tiny preset's warm-started one)

    loop        thinkimg's: one task per conversation, against a vLLM server
    barrier     the same, but nobody's turn begins before everybody's last one has ended, its tool call included
    in process  the loop with AsyncLLM in its own process: no HTTP, and images as they are
    generate    AsyncLLM alone: the prompts of all turns at once, as many tokens for each as the loop sampled

Both engines have the same settings, stay awake beside each other, and start each round with empty caches. A round plays
all ways in turn, so that what else the machine does meets them all: ratios are of one round.
"""

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import psutil
from barrier import Barrier

from thinkimg.closure import on_cpu
from thinkimg.config.load import load_config
from thinkimg.engine.media import Media
from thinkimg.engine.play import EpisodeSpec, Sampler, SamplingMode
from thinkimg.engine.request import Generation, Sampling
from thinkimg.engine.server import ServerSettings, server_command, server_environment
from thinkimg.engine.settings import EngineSettings
from thinkimg.models.base import BaseSource
from thinkimg.resource_settings import ResourcesConfig
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder
from thinkimg.stages.prepare import prepare
from thinkimg.stages.rollout import RolloutSettings, draw_samples, open_sampler, settings_of
from thinkimg.stages.warmstart import warmstart
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import Dataset, Policy

if on_cpu():
    import thinkimg.engine.serve  # noqa: F401  the engine of this process waits as that of the server does

CACHES = ("prefix", "mm", "encoder")
PARTS = {
    "engine.serve": "server",
    "api_server": "server",
    "APIServer": "server",
    "EngineCore": "scheduler",
    "VLLM::Worker": "model",
}


def clock() -> Counter:
    """Seconds; CPU seconds of this process ("client"), of vLLM's with their busy waiting, and of all "others" here."""
    now = Counter(client=time.process_time())
    for process in psutil.Process().children(recursive=True):
        command = " ".join(process.cmdline())
        if part := next((part for mark, part in PARTS.items() if mark in command and "watchdog" not in command), None):
            now[part] += sum(process.cpu_times()[:2])
    whole = psutil.cpu_times()
    return now + Counter(others=sum(whole) - whole.idle - whole.iowait - now.total(), seconds=time.perf_counter())


class InProcess:
    """AsyncLLM as an EngineClient, and its own media: an image is (uuid, image). Keeps all requests and answers."""

    media = "none"

    def __init__(self, llm, concurrency: int):
        self.llm, self.concurrency, self.turns, self.numbers = llm, concurrency, [], count()

    async def __aenter__(self) -> "InProcess":
        return self

    @asynccontextmanager
    async def lend(self, images: list[tuple], pool):
        yield images

    async def generate(self, prompt: list[int], images: list[tuple], sampling: Sampling) -> Generation:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        values = sampling.params()
        values["logit_bias"] = {int(token): bias for token, bias in (values["logit_bias"] or {}).items()}
        params = SamplingParams(**values, output_kind=RequestOutputKind.FINAL_ONLY)
        uuids, pictures = ({"image": list(column)} for column in zip(*images, strict=True))
        inputs = {"prompt_token_ids": prompt, "multi_modal_data": pictures, "multi_modal_uuids": uuids}
        async for output in self.llm.generate(inputs, params, str(next(self.numbers))):
            done = output.outputs[0]
        logprobs = [entry[token].logprob for token, entry in zip(done.token_ids, done.logprobs, strict=True)]
        made = Generation(list(done.token_ids), logprobs, output.prompt_token_ids, done.finish_reason, "in process")
        self.turns.append((prompt, images, sampling, made.token_ids))
        return made

    async def __aexit__(self, *_: object) -> None:
        self.llm.shutdown()


class Here(Resources):
    """Resources with the engine in this process: the server's own command line, parsed by its own parser."""

    def __init__(self, where: ResourcesConfig, server: ServerSettings):
        super().__init__(where)
        self.server_settings = server

    async def engine(self, policy: Policy, settings: EngineSettings, base: BaseSource) -> InProcess:
        model = str(self.weights(policy, base))
        os.environ |= server_environment(os.environ, model, self.server_settings)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        options = server_command(model, 1, self.server_settings)[3:]
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(parsed))
        return InProcess(llm, self.where.engine.concurrency)


async def play(sampler: Sampler, specs: list[EpisodeSpec], together: bool = False) -> Counter:
    """Play all conversations; `together`: turn by turn, nobody ahead of the slowest."""
    before, tokens, engine = clock(), 0, sampler.engine
    if together:
        sampler.engine = Barrier(engine, len(specs))
    async for _, episode in sampler.sample(specs):
        assert episode.error is None, episode.error
        tokens += len(episode.stream.logprobs)
        if together:
            sampler.engine.leave()
    sampler.engine = engine
    return clock() - before + Counter(tokens=tokens)


async def over_http(
    resources: Resources,
    settings: RolloutSettings,
    dataset: Dataset,
    policy: Policy,
    specs: list[EpisodeSpec],
    rounds: int,
):
    """Return measurements by name, and for each turn True if "generate" sampled the loop's tokens."""
    found = defaultdict(list)
    async with open_sampler(settings, dataset, policy, resources) as sampler:
        engine = sampler.engine
        await play(sampler, specs)  # warms up
        # vLLM makes engines in main threads only: this one is in that of a new process, which leaves nothing behind.
        ours, theirs = get_context("spawn").Pipe()
        server = resources.servers(policy, None, settings.engine, settings.base).settings
        references = (str(resources.where.store), str(dataset.reference), str(policy.reference))
        other = get_context("spawn").Process(
            target=in_process, args=(theirs, resources.where, settings, server, references, specs)
        )
        other.start()
        theirs.close()  # else nobody sees that it has ended
        await asyncio.to_thread(ours.recv)  # it has warmed up, too
        for way in ["loop", "barrier", "in process", "generate"] * rounds:
            if way in ("in process", "generate"):
                ours.send(way)
                found[way].append(await asyncio.to_thread(ours.recv))
                continue
            for cache in CACHES:
                await engine._post(engine.urls[0], f"/reset_{cache}_cache", {})
            with tempfile.TemporaryDirectory(dir=resources.media) as scratch:
                sampler.media = Media(Path(scratch))
                found[way].append(await play(sampler, specs, together=way == "barrier"))
        ours.send(None)
        same = await asyncio.to_thread(ours.recv)
        other.join()
    return found, same


def in_process(
    pipe: Connection,
    where: ResourcesConfig,
    settings: RolloutSettings,
    server: ServerSettings,
    references: tuple[str, str, str],
    specs: list[EpisodeSpec],
) -> None:
    """Play in the ways that the pipe names and send what each took; then, for each turn, if the tokens were the loop's.

    references: store, data set and policy.
    """
    store, *names = references
    dataset, policy = (Store(store).resolve(name) for name in names)

    async def run():
        same: list[bool] = []
        async with open_sampler(settings, dataset, policy, resources) as sampler:
            sampler.media = engine = sampler.engine
            await play(sampler, specs)
            turns = engine.turns.copy()
            known = [(p, images, replace(how, max_tokens=len(ids), stop_token_ids=())) for p, images, how, ids in turns]
            pipe.send(None)
            while (way := await asyncio.to_thread(pipe.recv)) is not None:
                for cache in CACHES:
                    await getattr(engine.llm, f"reset_{cache}_cache")()
                if way == "in process":
                    pipe.send(await play(sampler, specs))
                    continue
                before = clock()
                made = await asyncio.gather(*(engine.generate(*request) for request in known))
                tokens = sum(len(generation.token_ids) for generation in made)
                pipe.send(clock() - before + Counter(tokens=tokens))
                same = [generation.token_ids == turn[3] for generation, turn in zip(made, turns, strict=True)]
            pipe.send(same)

    with Here(where, server) as resources:
        asyncio.run(run())


def report(found: dict[str, list[Counter]]) -> None:
    speeds = {name: [each["tokens"] / each["seconds"] for each in rounds] for name, rounds in found.items()}
    parts = ("client", "server", "scheduler", "model", "others")
    print(f"{'':<12}tokens/s  (range)         loop is  (range)          CPU s: {', '.join(parts)}")
    for name, speed in speeds.items():
        used = " ".join(f"{median(each[part] for each in found[name]):6.1f}" for part in parts)
        ratios = [ours / theirs for ours, theirs in zip(speeds["loop"], speed, strict=True)]
        spread, near = f"({min(speed):.0f} to {max(speed):.0f})", f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:<12}{median(speed):8.0f}  {spread:<15}{median(ratios):6.2f}   {near:<15}  {used}")


def main(overrides: list[str], reference: str | None, rounds: int) -> None:
    config = load_config("tiny", overrides)
    settings, store = settings_of(config), Store(config.where.store)
    with Resources(config.where) as resources:
        builder = Builder(config, store, resources)
        dataset = builder.make(prepare)
        policy = store.resolve(reference, "policy") if reference else builder.make(warmstart, dataset=dataset)
        samples = draw_samples(dataset.split("train"), config.rollout.samples, 1, config.seed)
        group = range(config.rollout.group_size)
        specs = [EpisodeSpec(sample, index, SamplingMode(1.0)) for sample in samples for index in group]
        found, same = asyncio.run(over_http(resources, settings, dataset, policy, specs, rounds))
    print(f"{len(specs)} conversations, {len(same)} turns, {rounds} rounds, {os.cpu_count()} cores")
    report(found)
    print(f"generate sampled the loop's tokens in {100 * sum(same) / len(same):.1f} % of the turns")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="artifacts", help="what it lacks (data set, policy) is made")
    parser.add_argument("--policy", help="beginning of its fingerprint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="a setting of the preset, as a.b=value")
    given = parser.parse_args()
    main([f"where.store={given.store}", *given.set], given.policy, given.rounds)
