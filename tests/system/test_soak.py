"""Nothing grows: many trajectories with images through rollout and scoring, and a store with a million rows."""

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from aiohttp import web
from paths import REPOSITORY, SUPPORT
from PIL import Image
from rewards_rows import call, failed, final, malformed, sample, trajectory
from soak_child import ROUNDS, SAMPLES, SIZE

from thinkimg import records
from thinkimg.conversation.codec import Codec
from thinkimg.records import AnswerType, to_row
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe

pytestmark = pytest.mark.long

CHILD = [sys.executable, SUPPORT / "soak_child.py"]
ROWS = 5000  # of a part
MARGIN_MB = 24


class ScriptedEngine:
    """Speaks vLLM's tokens-in-tokens-out interface: crops twice, to a place that the seed decides, then answers."""

    def __init__(self, model: Path):
        self.codec, self.version = Codec.load(model), ""
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._serve, args=[started], daemon=True)
        self._thread.start()
        started.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_get("/health", lambda request: asyncio.sleep(0, web.Response()))
        app.router.add_get(
            "/weight_info", lambda request: asyncio.sleep(0, web.json_response({"weight_version": self.version}))
        )
        runner = web.AppRunner(app, access_log=None)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        sizes = [
            Image.open(io.BytesIO(base64.b64decode(part["url"].split(",")[1]))).size for part in body["content_parts"]
        ]
        pads = iter([width // 28 * (height // 28) for width, height in sizes])
        prompt = [
            one for token in body["token_ids"] for one in [token] * (next(pads) if token == self.codec.image else 1)
        ]
        sampled = self.codec.encode(self._turn(len(sizes), body["sampling_params"]["seed"])) + [self.codec.end]
        choice = {
            "token_ids": sampled,
            "logprobs": {"content": [{"logprob": -0.5}] * len(sampled)},
            "finish_reason": "stop",
            "weight_versions": [{"version": self.version}],
        }
        return web.json_response({"choices": [choice], "prompt_token_ids": prompt})

    @staticmethod
    def _turn(images: int, seed: int) -> str:
        if images > 2:
            return "<think>Seen.</think><answer>vertical</answer>"
        args = {"x": seed % 8, "y": seed // 8 % 8, "width": 28 + seed // 64 % 28, "height": 28 + seed // 2048 % 28}
        return f"<think>Closer.</think><tool>{json.dumps({'name': 'crop_image', 'args': args})}</tool>"


def test_rollouts_and_scores_hold_nothing_back(tiny_models, tmp_path):
    """2,048 conversations with three images each, in eight iterations of one process."""
    engine = ScriptedEngine(tiny_models[0])
    (tmp_path / "tmp").mkdir()
    environment = {"TMPDIR": str(tmp_path / "tmp")}
    try:
        with child("rollouts", tmp_path, tiny_models[0], **environment) as process:
            engine.version = json.loads(process.stdout.readline())["policy"]
            process.stdin.write(f"{engine.url}\n")
            process.stdin.flush()
            found = [json.loads(line) for line in process.stdout]
        assert process.returncode == 0
    finally:
        engine.close()
    print(*({name: one[name] for name in ("memory", "fds", "threads", "temporary")} for one in found), sep="\n")
    assert len(found) == ROUNDS and ROUNDS * SAMPLES * SIZE >= 2000
    assert all(
        one["trajectories"] == SAMPLES * SIZE and one["stop/answer"] == 1 and one["tool/ok"] > 0.9 for one in found
    )
    warm = found[1:]  # the first iteration loads what all of them use
    for what in ("fds", "threads", "temporary"):
        assert len({one[what] for one in warm}) == 1, what
    early, late = ([one["memory"] for one in half] for half in (warm[:3], warm[3:]))
    assert min(late) < min(early) + MARGIN_MB, "what is held, without what the allocators keep now and then"


def test_a_million_rows_take_no_more_memory_than_some(tmp_path):
    peaks = {}
    for parts in (20, 200):
        root = tmp_path / str(parts)
        make_store(root, parts)
        with child("rows", root) as process:
            peaks[parts] = json.loads(process.stdout.read())
        assert process.returncode == 0
        assert peaks[parts]["rows"] == peaks[parts]["scored"] == parts * ROWS
    print(*peaks.values(), sep="\n")
    few, many = peaks.values()
    assert all(many[when] < few[when] + 64 for when in ("list", "open", "score"))


def child(command: str, *arguments: Path, **environment: str) -> subprocess.Popen:
    argv = [*map(str, CHILD), command, *map(str, arguments)]
    found = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.Popen(argv, env=found, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def make_store(root: Path, parts: int) -> None:
    """A data set of one sample, and rollouts in which one part is repeated."""
    store, sha = Store(root), "ab" * 32
    image = pa.Table.from_pylist(
        [{"sha256": sha, "data": b"never decoded", "width": 8, "height": 8}], records.image_schema()
    )

    def data(work):
        rows = [to_row(sample("red", AnswerType.CHOICE, ("red", "blue")))]
        work.table("samples.parquet", pa.Table.from_pylist(rows, records.sample_schema()))
        work.table("images.parquet", image)

    def played(work):
        kinds = [
            trajectory(call(x=1), final("red"), answer="red"), trajectory(answer="blue"),
            trajectory(malformed()), failed(),
        ]  # fmt: skip
        rows = [
            to_row(
                replace(
                    kinds[i % 4], trajectory_id=f"t{i}", index=i % 4, tokens=tuple(range(i, i + 200)), roles=(0,) * 200
                )
            )
            for i in range(ROWS)
        ]
        work.table("trajectories-00000.parquet", pa.Table.from_pylist(rows, records.trajectory_schema()))
        template = work.path("trajectories-00000.parquet").read_bytes()
        for number in range(1, parts):
            with work.part(f"trajectories-{number:05}.parquet") as path:
                path.write_bytes(template)
        work.table("images-00000.parquet", image)

    dataset, _ = store.build("dataset", Recipe("prepare", 1, 1, {}), data)
    store.build("rollouts", Recipe("rollout", 1, 1, {}, {"dataset": dataset.reference}), played)
