"""Servers that speak vLLM's protocol as thinkimg's client does, with the latencies of a 7B and no model behind them.

    python benchmarks/simulated_engine.py VOCABULARY --servers 4 --slots 64 --speed 1    (rollouts_at_scale.py does it)

It prints the servers' URLs as a line of JSON, and ends when its standard input does. Each server batches continuously:
a prompt enters when a slot is free, is prefilled (what the prefix cache lacks), and decodes one token per step beside
the others. Latencies and turn lengths are estimates, no GPU confirmed them (`Latencies`, `Lengths`). Answers are valid
turns, a function of the request's seed alone: a thought, then a crop or the answer.

Time may run `speed` times as fast. What a late process or a late client costs is the server's idle time.
"""

import argparse
import asyncio
import base64
import heapq
import io
import json
import sys
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import orjson
from aiohttp import web
from PIL import Image

from thinkimg.conversation.codec import Codec
from thinkimg.models.family import load_family

TOKEN_SIDE = load_family("qwen2_5_vl").processor.token_side
BLOCK = 16  # tokens of a block of the prefix cache, as vLLM's on a GPU


@dataclass(frozen=True)
class Latencies:
    """Seconds of a Qwen2.5-VL-7B in bfloat16 on one H100 (990 TFLOP/s, 3.35 TB/s). An estimate.

    A step reads 15.2 GB of weights and 57 KB of keys and values per token of context, at 60 % of the bandwidth, and
    computes 15.2 GFLOP per sequence at 45 % of the peak. A prefilled token takes 15.2 GFLOP at 45 %; a token of an
    image that was not encoded yet 1.5 times the tower's share, as counted for a H200.
    """

    step: float = 7.6e-3
    """Of one decoding step, whatever it holds."""
    sequence: float = 3.4e-5
    """Of one more sequence in the step."""
    context: float = 2.8e-8
    """Of one more token of context in the step."""
    prefill: float = 3.4e-5
    """Of one token that the prefix cache lacks."""
    vision: float = 2.0e-5
    """Of one token of an image that the server sees first."""
    image_tokens: int = 750
    """Tokens at which every image counts, however small it is here: 1,000 of a prompt's, 600 of a tool's."""


@dataclass(frozen=True)
class Lengths:
    """Turns of a policy in training: an estimate, log-normal as published rollouts of reasoning models are.

    Calls per conversation are those of workload.py: none in 5 %, one in 20 %, two in 45 %, three in 30 %.
    """

    median: float = 105.0
    """Tokens of a turn; its mean is 134 with the spread, 400 of a conversation."""
    spread: float = 0.7
    """Standard deviation of the logarithm."""
    answers: tuple[float, ...] = (0.05, 0.2 / 0.95, 0.45 / 0.75, 1.0)
    """Probability that a turn answers, by its number."""


@dataclass
class Request:
    """Prompt that waits, or decodes: its turn, and what is needed to price it."""

    turn: list[int]
    prompt: list[int]  # expanded
    blocks: list[tuple[int, int]]  # of the prefix cache: name and tokens
    rest: int  # tokens of the last block, which is not full and is never cached
    images: list[str]
    answer: asyncio.Future
    end: float = 0.0  # step at which it has decoded its turn

    def __lt__(self, other: "Request") -> bool:
        return self.end < other.end


@dataclass
class Cache:
    """Names that were used lately, up to `room` tokens."""

    room: int
    names: OrderedDict = field(default_factory=OrderedDict)

    def touch(self, name, tokens: int) -> bool:
        """Use a name; return True if it was there."""
        there = name in self.names
        if there:
            self.names.move_to_end(name)
        else:
            self.names[name] = tokens
            self.room -= tokens
            while self.room < 0:
                self.room += self.names.popitem(last=False)[1]
        return there


class Server:
    """One server: `slots` sequences decode at once, the others wait. All times but `_now` are simulated seconds."""

    def __init__(self, slots: int, speed: float, latencies: Latencies):
        self.slots, self.speed, self.latencies, self.version = slots, speed, latencies, "simulated"
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # a heap
        self.prefix, self.encoder = Cache(900_000), Cache(200_000)  # 55 GB of keys and values; encoder outputs
        self.steps = self.stall = self.context = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._start = asyncio.get_running_loop().time()
        self.time = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin to measure."""
        self.measured = dict.fromkeys(("seconds", "filled", "full", "tokens", "turns", "prefilled"), 0.0)

    def _now(self) -> float:
        return (asyncio.get_running_loop().time() - self._start) * self.speed

    async def generate(self, request: Request) -> None:
        """Wait until the request has its turn."""
        self._catch_up()
        self.waiting.append(request)
        self._admit()
        self._schedule()
        await request.answer

    def figures(self) -> dict[str, float]:
        """Return what was measured since `reset`, in simulated seconds."""
        self._catch_up()
        return self.measured

    @property
    def _step(self) -> float:
        price = self.latencies
        return price.step + len(self.running) * price.sequence + self.context * price.context

    def _catch_up(self) -> None:
        """Play, in their order, all ends of turns until now; whoever waits takes a slot the moment that it is free."""
        now = self._now()
        while self.running and (end := self._next_end()) <= now:
            self._move(end)
            done = heapq.heappop(self.running)
            self.steps = max(self.steps, done.end)
            self.context -= len(done.prompt) + len(done.turn) / 2
            self.measured["tokens"] += len(done.turn)
            self.measured["turns"] += 1
            if not done.answer.done():
                done.answer.set_result(None)
            self._admit()
        self._move(now)

    def _next_end(self) -> float:
        return self.time + self.stall + max(0.0, self.running[0].end - self.steps) * self._step

    def _move(self, time: float) -> None:
        passed = max(0.0, time - self.time)
        stalled = min(self.stall, passed)
        self.stall -= stalled
        if self.running:
            self.steps += (passed - stalled) / self._step
        self.measured["seconds"] += passed
        self.measured["filled"] += passed * len(self.running) / self.slots
        self.measured["full"] += passed * (len(self.running) == self.slots)
        self.time = max(self.time, time)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            request = self.waiting.popleft()
            tokens = request.rest
            tokens += sum(size for name, size in request.blocks if not self.prefix.touch(name, size))
            size = self.latencies.image_tokens
            seen = sum(size for uuid in request.images if not self.encoder.touch(uuid, size))
            self.stall += tokens * self.latencies.prefill + seen * self.latencies.vision
            self.measured["prefilled"] += tokens
            self.context += len(request.prompt) + len(request.turn) / 2
            request.end = self.steps + len(request.turn)
            heapq.heappush(self.running, request)

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.running:
            delay = max(0.0, self._next_end() - self._now()) / self.speed
            self._timer = asyncio.get_running_loop().call_later(delay, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._catch_up()
        self._schedule()


class Turns:
    """Turns as token ids, each a function of the request's seed."""

    def __init__(self, codec: Codec, lengths: Lengths, side: int):
        self.codec, self.lengths, self.crop = codec, lengths, side // 2
        self.opening = codec.encode("<think>")
        self.filler = codec.encode(" I look at the picture and think about what it shows.") * 200
        self.start = codec._ids["<|im_start|>"]

    def turn(self, seed: int, number: int, limit: int) -> list[int]:
        """Return the turn of this number in its conversation."""
        rng = np.random.default_rng(seed)
        length = int(self.lengths.median * rng.lognormal(0, self.lengths.spread))
        if rng.random() < self.lengths.answers[min(number, len(self.lengths.answers) - 1)]:
            action = f"<answer>{rng.choice(['left', 'right'])}</answer>"
        else:
            x, y = rng.integers(0, self.crop, 2).tolist()
            args = {"x": x, "y": y, "width": self.crop, "height": self.crop, "image": "original"}
            action = f"<tool>{json.dumps({'name': 'crop_image', 'args': args})}</tool>"
        closing = [*self.codec.encode(f"</think>{action}"), self.codec.end]
        room = max(1, min(length, limit) - len(self.opening) - len(closing))
        return [*self.opening, *self.filler[:room], *closing][:limit]

    def count(self, prompt: Sequence[int]) -> int:
        """Return the number of the turn that comes next: replies opened so far, less the system's and the user's."""
        return (prompt.count(self.start) - 3) // 2


class Images:
    """Number of tokens of an image, by its uuid; a header is read once."""

    def __init__(self) -> None:
        self.tokens = OrderedDict()

    def count(self, part: dict) -> int:
        """Return the tokens of an image of a request."""
        uuid = part["uuid"]
        if uuid not in self.tokens:
            url = part["url"]
            data = base64.b64decode(url.partition(",")[2]) if url.startswith("data:") else None
            source = io.BytesIO(data) if data is not None else unquote(urlsplit(url).path)
            with Image.open(source) as image:
                self.tokens[uuid] = (image.width // TOKEN_SIDE) * (image.height // TOKEN_SIDE)
            if len(self.tokens) > 100_000:
                self.tokens.popitem(last=False)
        return self.tokens[uuid]


class Application:
    """The routes of one server."""

    def __init__(self, server: Server, turns: Turns, images: Images):
        self.server, self.turns, self.images = server, turns, images

    def routes(self) -> list[web.RouteDef]:
        """Return those that EngineClient calls, and two of our own."""
        post, get, server = web.post, web.get, self.server
        return [
            post("/inference/v1/generate", self.generate),
            post("/update_weight_version", self.update),
            *(post(path, self.succeed) for path in ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache")),
            get("/weight_info", lambda _: respond({"weight_version": server.version})),
            get("/version", lambda _: respond({"version": "simulated"})),
            get("/health", lambda _: web.Response()),
            get("/simulation", lambda _: respond(server.figures())),
            post("/simulation/reset", self.reset),
        ]

    async def succeed(self, _: web.Request) -> web.Response:
        return await respond({"success": True})

    async def reset(self, _: web.Request) -> web.Response:
        self.server.figures()
        self.server.reset()
        return await respond({})

    async def update(self, request: web.Request) -> web.Response:
        self.server.version = orjson.loads(await request.read())["new_version"]
        return await respond({"success": True})

    async def generate(self, http: web.Request) -> web.Response:
        body = orjson.loads(await http.read())
        ids, params, parts = body["token_ids"], body["sampling_params"], body.get("content_parts") or []
        tokens = [self.images.count(part) for part in parts]
        uuids = [part["uuid"] for part in parts]
        prompt, blocks, rest = self.expand(ids, tokens, uuids)
        turn = self.turns.turn(params["seed"], self.turns.count(ids), params["max_tokens"])
        answer = asyncio.get_running_loop().create_future()
        await self.server.generate(Request(turn, prompt, blocks, rest, uuids, answer))
        complete = turn[-1] == self.turns.codec.end
        entries = [
            {"token_id": token, "logprob": -0.5, "rank": 1, "top_logprobs": [
                {"token_id": token, "logprob": -0.5, "rank": 1}
            ]}
            for token in turn
        ]  # fmt: skip
        choice = {
            "index": 0,
            "logprobs": {"content": entries},
            "finish_reason": "stop" if complete else "length",
            "stop_reason": turn[-1] if complete else None,
            "token_ids": turn,
            "weight_versions": [{"start": 0, "end": len(turn), "version": self.server.version}],
        }
        return await respond(
            {"request_id": "simulated", "model": "policy", "choices": [choice], "prompt_token_ids": prompt}
        )

    def expand(
        self, ids: list[int], tokens: list[int], uuids: list[str]
    ) -> tuple[list[int], list[tuple[int, int]], int]:
        """Return the expanded prompt, its blocks for the prefix cache at their simulated size, and the rest's size."""
        prompt: list[int] = []
        blocks: list[tuple[int, int]] = []
        image, name, number, rest = self.turns.codec.image, 0, 0, 0
        for start in range(0, len(ids), BLOCK):
            block, first = ids[start : start + BLOCK], number
            for token in block:
                if token == image:
                    prompt += [image] * tokens[number]
                    number += 1
                else:
                    prompt.append(token)
            size = len(block) + (number - first) * (self.server.latencies.image_tokens - 1)
            name = hash((name, *block, *uuids[first:number]))
            if len(block) == BLOCK:
                blocks.append((name, size))
            else:
                rest = size
        return prompt, blocks, rest


async def respond(value: object) -> web.Response:
    """Return a value as JSON."""
    return web.Response(body=orjson.dumps(value), content_type="application/json")


async def serve(options: argparse.Namespace) -> None:
    """Serve until standard input ends."""
    turns = Turns(Codec.load(options.vocabulary), Lengths(spread=options.spread), options.side)
    images, urls = Images(), []
    for _ in range(options.servers):
        app = web.Application(client_max_size=2**30)
        app.add_routes(Application(Server(options.slots, options.speed, Latencies()), turns, images).routes())
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
        await site.start()
        urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
    print(json.dumps(urls), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path, help="directory with a tokenizer.json")
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--spread", type=float, default=Lengths.spread)
    parser.add_argument("--side", type=int, default=112, help="of the pictures: tools crop half of it")
    asyncio.run(serve(parser.parse_args()))
