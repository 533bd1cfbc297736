"""How fast is the rollout loop? Tokens per second of the same conversations, played in several ways in one run.

    python benchmarks/rollout.py --store artifacts --policy 3f2a    (without a policy: the tiny preset's warm-started one)

    loop        thinkimg's: one task per conversation, against a vLLM server
    barrier     the same, but nobody's turn begins before everybody's last one has ended, its tool call included
    in process  the loop with AsyncLLM in its own process: no HTTP, and images as they are
    generate    AsyncLLM alone: the prompts of all turns at once, as many tokens for each as the loop sampled

Both engines have the same settings, run one after the other, and start each round with empty caches.
"""

import argparse
import asyncio
import os
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from statistics import median

import psutil

from thinkimg.closure import on_cpu
from thinkimg.config import Config, load
from thinkimg.engine.client import Generation, Sampling
from thinkimg.engine.server import ServerSettings, server_command, server_environment
from thinkimg.resources import Machines
from thinkimg.rollout import Job, Media, Play, Players
from thinkimg.stages.prepare import prepare
from thinkimg.stages.rollout import draw
from thinkimg.stages.warmstart import warmstart
from thinkimg.store.artifacts import Artifact, Store
from thinkimg.store.image_table import load_samples

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


class Barrier:
    """An engine that begins no turn before all `parties` conversations wait for one; those that have ended leave."""

    def __init__(self, engine, parties: int):
        self.engine, self.parties, self.waiting = engine, parties, []

    async def generate(self, *request) -> Generation:
        self.waiting.append(turn := asyncio.Event())
        self.leave(0)
        await turn.wait()
        return await self.engine.generate(*request)

    def leave(self, parties: int = 1) -> None:
        self.parties -= parties
        if len(self.waiting) == self.parties:
            while self.waiting:
                self.waiting.pop(0).set()


class InProcess:
    """AsyncLLM as an EngineClient, and its own media: an image is (uuid, image). Keeps all requests and answers."""

    media = "none"

    def __init__(self, llm):
        self.llm, self.turns, self.numbers = llm, [], count()

    def ref(self, uuid: str, image) -> tuple:
        return uuid, image

    async def generate(self, prompt: list[int], images: list[tuple], sampling: Sampling, adapter: None) -> Generation:
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


class Here(Machines):
    """Machines with the engine in this process: the server's own command line, parsed by its own parser."""

    async def engine(self, policy: Artifact) -> tuple[InProcess, None]:
        model = str(self.weights(policy))
        os.environ |= server_environment(os.environ, model, self.settings)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        options = server_command(model, 1, self.settings, None)[3:]
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
        return InProcess(AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(parsed))), None


async def play(players: Players, jobs: list[Job], together: bool = False) -> Counter:
    """Play all conversations; `together`: turn by turn, nobody ahead of the slowest."""
    before, tokens, engine = clock(), 0, players.engine
    if together:
        players.engine = Barrier(engine, len(jobs))
    async for _, episode in players.play(jobs):
        assert episode.error is None, episode.error
        tokens += len(episode.stream.logprobs)
        if together:
            players.engine.leave()
    players.engine = engine
    return clock() - before + Counter(tokens=tokens)


async def over_http(crew: Machines, config: Config, wide: Config, dataset: Artifact, policy: Artifact, jobs, rounds):
    """Measurements by name, and the server's settings; `wide` is the config with all conversations in flight."""
    found = defaultdict(list)
    async with Players(config, dataset, policy, crew) as players:
        engine = players.engine
        await play(players, jobs)  # warms up
        for way in ["loop", "barrier"] * rounds:
            for cache in CACHES:
                await engine._post(engine.urls[0], f"/reset_{cache}_cache", {})
            players.media = Media(crew.media)
            players.config = wide if way == "barrier" else config
            found[way].append(await play(players, jobs, together=way == "barrier"))
    return found, crew.server(policy, None).settings


def in_process(config: Config, settings: ServerSettings, dataset: Artifact, policy: Artifact, jobs, rounds):
    """Measurements by name, and for each turn if "generate" sampled the loop's tokens."""

    async def run():
        found = defaultdict(list)
        async with Players(config, dataset, policy, crew) as players:
            players.media = engine = players.engine
            await play(players, jobs)
            turns = engine.turns.copy()
            known = [(p, images, replace(how, max_tokens=len(ids), stop_token_ids=())) for p, images, how, ids in turns]
            for way in ["in process", "generate"] * rounds:
                for cache in CACHES:
                    await getattr(engine.llm, f"reset_{cache}_cache")()
                if way == "in process":
                    found[way].append(await play(players, jobs))
                    continue
                before = clock()
                made = await asyncio.gather(*(engine.generate(*request, None) for request in known))
                tokens = sum(len(generation.token_ids) for generation in made)
                found[way].append(clock() - before + Counter(tokens=tokens))
        return found, [generation.token_ids == turn[3] for generation, turn in zip(made, turns, strict=True)]

    with Here(config) as crew:
        crew.settings = settings
        return asyncio.run(run())


def report(found: dict[str, list[Counter]]) -> None:
    speeds = {name: [each["tokens"] / each["seconds"] for each in rounds] for name, rounds in found.items()}
    parts = ("client", "server", "scheduler", "model", "others")
    print(f"{'':<12}tokens/s  (range)         loop is  CPU s: {', '.join(parts)}")
    for name, speed in speeds.items():
        used = " ".join(f"{median(each[part] for each in found[name]):6.1f}" for part in parts)
        spread, ratio = f"({min(speed):.0f} to {max(speed):.0f})", median(speeds["loop"]) / median(speed)
        print(f"{name:<12}{median(speed):8.0f}  {spread:<15}{ratio:6.2f} x  {used}")


def main(settings: list[str], reference: str | None, rounds: int) -> None:
    config = load("tiny", settings)
    store = Store(config.where.store)
    dataset, _ = prepare(config, store)
    policy = store.resolve(reference, "policy") if reference else warmstart(config, dataset, store)[0]
    samples, how = draw(load_samples(dataset, "train"), config.rollout.samples, 1, config.seed), Play(1.0)
    jobs = [Job(sample, index, how) for sample in samples for index in range(config.rollout.group_size)]
    wide = load("tiny", [*settings, f"where.engine.concurrency={len(jobs)}"])
    with Machines(config) as crew:
        found, served = asyncio.run(over_http(crew, config, wide, dataset, policy, jobs, rounds))
    # vLLM makes engines in main threads only: this one is in that of a new process, which leaves nothing behind.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as new:
        others, same = new.submit(in_process, config, served, dataset, policy, jobs, rounds).result()
    print(f"{len(jobs)} conversations, {len(same)} turns, {rounds} rounds, {os.cpu_count()} cores")
    report(found | others)
    print(f"generate sampled the loop's tokens in {100 * sum(same) / len(same):.1f} % of the turns")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="artifacts", help="what it lacks (data set, policy) is made")
    parser.add_argument("--policy", help="beginning of its fingerprint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="a setting of the preset, as a.b=value")
    given = parser.parse_args()
    main([f"where.store={given.store}", *given.set], given.policy, given.rounds)
