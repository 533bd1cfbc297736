"""Speed of the endpoint against its engine, and its memory over many requests.

    python benchmarks/serving.py --store artifacts --policy 3f2a    (else the tiny preset's warm-started one)

    endpoint    requests of held-out questions over HTTP, so many at once, each with its picture as a data: URI
    raw         the turns that these sampled, sent to vLLM by our client alone: same prompts, seeds and order

Both begin with empty caches, take turns, and share the cores with their clients. Greedy, so that all rounds sample the
same. The memory is that of this process, in which endpoint and clients run.
"""

import argparse
import asyncio
import base64
import os
import time
from collections import defaultdict
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import aiohttp
import psutil
from aiohttp import web

from thinkimg.config.load import load_config
from thinkimg.conversation.question import list_choices, state_form
from thinkimg.engine.client import EngineClient
from thinkimg.images.decode import ImageLimits, encode_png
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder
from thinkimg.serving.app import Access, make_app
from thinkimg.serving.keeper import EngineKeeper
from thinkimg.serving.serve import Sources, connect_once, in_a_thread, make_connect, make_service
from thinkimg.stages.prepare import prepare
from thinkimg.stages.rollout import settings_of
from thinkimg.stages.warmstart import warmstart
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Dataset


class Recorder:
    """An engine's client that keeps the arguments of each request, by the request to the endpoint that made it."""

    def __init__(self, engine: EngineClient):
        self.engine, self.requests = engine, defaultdict(list)

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    async def generate(self, *arguments):
        self.requests[asyncio.current_task()].append(arguments)
        return await self.engine.generate(*arguments)

    async def __aexit__(self, *error):
        await self.engine.__aexit__(*error)


def read_bodies(dataset: Dataset, coordinates) -> list[dict]:
    """Return a request for each held-out question, in the words of training."""
    images, bodies = ImageTable([dataset]), []
    for sample in dataset.split("held_out"):
        text = "\n".join([sample.question, *list_choices(sample.choices), state_form(sample, coordinates)])
        data = [base64.b64encode(encode_png(images.decoded(sha))).decode() for sha in sample.images]
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in data]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        bodies.append({"model": "policy", "messages": [message]})
    return bodies


async def at_once(count: int, jobs, work) -> float:
    """Do all jobs, so many at a time; return jobs per second."""
    slots, started = asyncio.Semaphore(count), time.perf_counter()

    async def limited(job) -> None:
        async with slots:
            await work(job)

    await asyncio.gather(*map(limited, jobs))
    return len(jobs) / (time.perf_counter() - started)


async def measure(service, bodies: list[dict], rounds: int, crowds: list[int], many: int) -> None:
    """Print requests per second of both, and the memory over `many` requests."""
    runner = web.AppRunner(make_app(service, Access()), handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/chat/completions"
    recorder = service.keeper._client = Recorder(service.keeper._client)
    engine, process = recorder.engine, psutil.Process()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def ask(body: dict) -> None:
            async with http.post(url, json=body) as response:
                assert response.status == 200, await response.text()
                await response.read()

        async def repeat(turns: list[tuple]) -> None:
            for arguments in turns:
                await engine.generate(*arguments)

        async def forget() -> None:
            for server in engine.urls:
                await engine._post(server, "/reset_prefix_cache", {})

        await at_once(8, bodies[:16], ask)
        for crowd in crowds:
            found = defaultdict(list)
            for _ in range(rounds):
                recorder.requests.clear()
                await forget()
                found["endpoint"].append(await at_once(crowd, bodies, ask))
                await forget()
                found["raw"].append(await at_once(crowd, list(recorder.requests.values()), repeat))
            ratios = [one / other for one, other in zip(found["endpoint"], found["raw"], strict=True)]
            speeds = ", ".join(f"{name} {median(values):.1f} requests/s" for name, values in found.items())
            shown = f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{crowd:4} at once: {speeds}, {shown}", flush=True)
        service.keeper._client = engine
        recorder.requests.clear()
        for tenth in range(10 if many else 0):
            await at_once(32, list(islice(cycle(bodies), many // 10)), ask)
            memory = process.memory_info().rss / 2**20
            print(
                f"after {(tenth + 1) * many // 10:6} requests: {memory:.0f} MiB, media {service.media.size / 2**20:.1f}"
            )
    await runner.cleanup()


def main(overrides: list[str], given: argparse.Namespace) -> None:
    config = load_config("tiny", overrides)
    settings, store = settings_of(config), Store(config.where.store)
    with Resources(config.where) as resources, ExitStack() as stack:
        builder = Builder(config, store, resources)
        dataset = builder.make(prepare)
        policy = store.resolve(given.policy, "policy") if given.policy else builder.make(warmstart, dataset=dataset)
        connect = make_connect(policy, settings, resources)
        asyncio.run(connect_once(connect))
        sources = Sources(ImageLimits(), None, ())
        service = make_service(policy, settings, resources, sources, EngineKeeper(in_a_thread(connect)), stack)
        bodies = read_bodies(dataset, settings.conversation.unit)[: given.questions]
        load = f"{os.getloadavg()[0]:.1f}"
        print(f"{len(bodies)} questions, {given.rounds} rounds, {os.cpu_count()} cores, load before {load}", flush=True)
        asyncio.run(measure(service, bodies, given.rounds, given.crowds, given.many))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("artifacts"), help="what it lacks is made")
    parser.add_argument("--policy", help="beginning of its fingerprint")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crowds", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument("--many", type=int, default=10_000, help="requests over which memory is measured; 0: none")
    parser.add_argument("--set", action="append", default=[], help="a setting of the preset, as a.b=value")
    arguments = parser.parse_args()
    main([f"where.store={arguments.store}", *arguments.set], arguments)
