"""The engine against a real vLLM server on the CPU with a tiny Qwen2.5-VL; its client also against fakes that fail."""

import asyncio
import hashlib
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from fake_engine import PLAIN, generate_many, image
from PIL import Image
from processes import title

from thinkimg.engine import server as server_module
from thinkimg.engine.client import EngineClient, EngineUnavailable
from thinkimg.engine.errors import EngineError
from thinkimg.engine.request import ImageRef, Sampling
from thinkimg.engine.server import Server, ServerSettings
from thinkimg.engine.settings import EngineSettings
from thinkimg.errors import UserError

SETTINGS = ServerSettings(EngineSettings(dtype="float32", max_tokens=2048, max_images=16, max_pixels=10**6))
SIZES = [(112, 84), (28, 28), (56, 196), (140, 28), (84, 84)]


@pytest.fixture(scope="module")
def tokenizer(tiny_models):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_models[0])


@pytest.fixture(scope="module")
def picture(media_dir):
    """picture(i): a reference to the i-th random image, of size SIZES[i % 5]."""

    def make(index: int) -> ImageRef:
        width, height = SIZES[index % len(SIZES)]
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = media_dir / f"{index}.png"
        if not path.exists():
            Image.fromarray(pixels).save(path)
        return ImageRef(uuid=hashlib.sha256(pixels.tobytes() + bytes([width])).hexdigest(), path=path)

    return make


@pytest.fixture(scope="module")
def sampling(tokenizer) -> Sampling:
    vision = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    return Sampling(
        temperature=1.0,
        max_tokens=24,
        seed=1,
        stop_token_ids=(tokenizer.convert_tokens_to_ids("<|im_end|>"),),
        banned_token_ids=tuple(tokenizer.convert_tokens_to_ids(vision)),
    )


def prompt(tokenizer, question: str) -> list[int]:
    text = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text)["input_ids"]


def expanded(tokenizer, token_ids: list[int], images: list[ImageRef]) -> list[int]:
    """Qwen2.5-VL's own count of pads: one per 28 x 28 pixels."""
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    pending = [Image.open(image.path).size for image in images]
    result = []
    for token in token_ids:
        width, height = pending.pop(0) if token == pad else (28, 28)
        result += [token] * (width // 28 * (height // 28))
    assert not pending
    return result


async def converse(client, tokenizer, picture, sampling, index: int) -> list:
    """Two turns of a conversation; between them an observation with another image, as after a tool call."""
    images = [picture(index)]
    ids = prompt(tokenizer, f"Question {index % 3}?")
    turns = []
    for turn in range(2):
        generation = await client.generate(ids, images, replace(sampling, seed=1000 * index + turn))
        assert generation.prompt_token_ids == expanded(tokenizer, ids, images)
        turns.append(generation)
        ids = ids + generation.token_ids + prompt(tokenizer, "Observation")
        images = [*images, picture(index + 100 + turn)]
    return turns


def converse_all(urls, tokenizer, picture, sampling, order, **client_options) -> dict[int, list]:
    async def run():
        async with EngineClient(urls, **{"media": "file"} | client_options) as client:
            done = await asyncio.gather(*(converse(client, tokenizer, picture, sampling, i) for i in order))
        return dict(zip(order, done, strict=True))

    return asyncio.run(run())


def ask(urls, call):
    """The result of one coroutine function of an EngineClient."""

    async def run():
        async with EngineClient(urls, media="file") as client:
            return await call(client)

    return asyncio.run(run())


def test_seeds_reproduce_whatever_else_runs(engine, tokenizer, picture, sampling):
    """Bit-equal tokens and log-probabilities: in another order, one by one, cached or not, as files or as data."""
    order = list(range(24))
    first = converse_all([engine.url], tokenizer, picture, sampling, order)
    random.Random(0).shuffle(order)
    assert converse_all([engine.url], tokenizer, picture, sampling, order, media="data") == first
    ask([engine.url], lambda client: client._post(engine.url, "/reset_prefix_cache", {}))
    some = order[:4]
    assert converse_all([engine.url], tokenizer, picture, sampling, some, concurrency=1) == {i: first[i] for i in some}
    generations = [generation for turns in first.values() for generation in turns]
    assert len({tuple(generation.token_ids) for generation in generations}) == len(generations)
    assert {generation.weight_version for generation in generations} == {"v0"}
    for generation in generations:
        assert len(generation.logprobs) == len(generation.token_ids) <= sampling.max_tokens
        assert (generation.finish_reason == "stop") == (generation.token_ids[-1] in sampling.stop_token_ids)


def test_stop_tokens_are_ours_alone(engine, tokenizer, picture, sampling):
    """A turn ends at the tokens given, which are kept, and not at the model's own end token."""
    ids, images = prompt(tokenizer, "Stop?"), [picture(0)]
    end = sampling.stop_token_ids[0]
    all_but_end = tuple(token for token in range(len(tokenizer)) if token != end)
    only_end = replace(sampling, banned_token_ids=all_but_end, max_tokens=3)
    generation = ask([engine.url], lambda client: client.generate(ids, images, only_end))
    assert (generation.token_ids, generation.finish_reason) == ([end], "stop")
    assert generation.logprobs == [0.0]  # of what is left after the ban
    endless = replace(only_end, stop_token_ids=())
    generation = ask([engine.url], lambda client: client.generate(ids, images, endless))
    assert (generation.token_ids, generation.finish_reason) == ([end] * 3, "length")


def test_banned_tokens_never_appear_and_the_rest_is_renormalised(engine, tokenizer, picture, sampling):
    ids, images = prompt(tokenizer, "Banned?"), [picture(1)]
    allowed = [40, 41, 42, 43, 44]
    banned = tuple(token for token in range(len(tokenizer)) if token not in allowed)
    hot = replace(sampling, banned_token_ids=banned, temperature=2.0, max_tokens=64)
    generation = ask([engine.url], lambda client: client.generate(ids, images, hot))
    assert set(generation.token_ids) == set(allowed)
    free = ask([engine.url], lambda client: client.next_token_logprobs(ids, images, allowed))
    weights = [math.exp(logprob / hot.temperature) for logprob in free]
    expected = math.log(weights[allowed.index(generation.token_ids[0])] / sum(weights))
    assert generation.logprobs[0] == pytest.approx(expected, abs=1e-5)


def test_next_token_logprobs_are_those_of_transformers(engine, tiny_models, tokenizer, picture, sampling):
    """Also after other weights were loaded in place: tied embeddings are where vLLM's reload_weights fails on a CPU."""
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    image, candidates = picture(0), list(range(100))
    text = tokenizer.decode(prompt(tokenizer, "How many?"))
    inputs = AutoProcessor.from_pretrained(tiny_models[0])(
        text=[text], images=[Image.open(image.path)], return_tensors="pt"
    )

    async def reload_and_compare(client):
        samples = []
        for name, directory in [("v1", tiny_models[1]), ("v0", tiny_models[0])]:
            await client.load_weights(directory, name)
            assert await client.versions() == {engine.url: name}
            logprobs = await client.next_token_logprobs(prompt(tokenizer, "How many?"), [image], candidates)
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
            with torch.no_grad():
                expected = model(**inputs).logits[0, -1].log_softmax(-1)[candidates]
            np.testing.assert_allclose(logprobs, expected.numpy(), atol=1e-4)
            samples.append(await client.generate(prompt(tokenizer, "How many?"), [image], sampling))
        assert samples[0].token_ids != samples[1].token_ids
        assert [sample.weight_version for sample in samples] == ["v1", "v0"]

    ask([engine.url], reload_and_compare)


def test_a_server_that_waits_keeps_no_core_busy(engine, tokenizer, picture, sampling):
    """Without `engine.serve` the worker polls for its next task for a second after each, and the scheduler polls for
    the worker's answer all the time.
    """
    processes = psutil.Process(engine.pid).children(recursive=True)
    schedulers = [process for process in processes if "EngineCore" in title(process.pid)]

    def spent(processes) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before, started = spent(schedulers), time.monotonic()
    converse_all([engine.url], tokenizer, picture, sampling, range(6))
    assert spent(schedulers) - before < 0.6 * (time.monotonic() - started)
    before, started = spent(processes), time.monotonic()
    time.sleep(0.8)
    assert spent(processes) - before < 0.5 * (time.monotonic() - started)


def test_sleep_and_wake_up_leave_the_answers_as_they_were(engine, tokenizer, picture, sampling):
    """As far as a CPU tells: its server takes both requests and keeps its memory."""
    server = Server("owner/qwen2.5-vl-x", log_path=Path("never"), version="v0", settings=replace(SETTINGS, sleeps=True))
    server.url, server._child = engine.url, SimpleNamespace(alive=True)

    async def answer():
        async with EngineClient([engine.url], media="file") as client:
            return (await client.generate(prompt(tokenizer, "Which?"), [picture(0)], sampling)).token_ids

    before = asyncio.run(answer())
    server.sleep()
    server.wake()
    assert asyncio.run(answer()) == before
    assert "--enable-sleep-mode" in server_module.server_command("owner/qwen2.5-vl-x", 1, server.settings)


def test_failed_reload_does_not_go_by_the_old_name(engine, tiny_models, tmp_path):
    async def run(client):
        try:
            with pytest.raises(EngineError, match="collective_rpc"):
                await client.load_weights(tmp_path / "missing", "v2")
            assert await client.versions() == {engine.url: "loading v2"}
        finally:
            await client.load_weights(tiny_models[0], "v0")
        assert await client.versions() == {engine.url: "v0"}

    ask([engine.url], run)


@pytest.mark.parametrize("stop_at", range(1, 8))
def test_a_kill_while_weights_are_loaded_leaves_no_paused_server_with_a_name_that_anybody_trusts(stop_at):
    """The server as far as it matters here; whoever comes next loads unless it reports the wanted version."""
    server = {"version": "old", "paused": False, "weights": "old"}

    class Killed(BaseException):
        pass

    async def run():
        async with EngineClient(["http://nowhere"], media="data") as client:
            posts = 0

            async def post(url, path, body):
                nonlocal posts
                posts += 1
                if posts >= stop_at:
                    raise Killed
                if path == "/update_weight_version":
                    server["version"] = body["new_version"]
                elif path == "/collective_rpc":
                    server["weights"] = Path(body["kwargs"]["path"]).name
                elif path.partition("?")[0] in ("/pause", "/resume"):
                    server["paused"] = path.startswith("/pause")
                return {"success": True}

            client._post = post
            await client.load_weights(Path("new"), "new")

    if stop_at < 7:
        with pytest.raises(Killed):
            asyncio.run(run())
    else:
        asyncio.run(run())
        assert server["version"] == "new"
    assert server["version"] not in ("old", "new") or server == {
        "version": server["version"], "paused": False, "weights": server["version"]
    }  # fmt: skip


def test_refused_requests_are_told_at_once(engine, tokenizer, picture, sampling):
    ids = prompt(tokenizer, "Refused?")
    outside = ImageRef(uuid="outside", path=Path("/etc/hostname"))
    with pytest.raises(EngineError, match="allowed-local-media-path"):
        ask([engine.url], lambda client: client.generate(ids, [outside], sampling))
    with pytest.raises(EngineError, match="maximum model length"):
        ask([engine.url], lambda client: client.generate([50] * 3000, [], sampling))


def test_missing_model_is_the_users_mistake(tmp_path):
    for model in (tmp_path / "missing", tmp_path, "missing"):
        with pytest.raises(UserError, match=str(model)):
            Server(model, log_path=tmp_path / "log", version="v0", settings=SETTINGS).start()


@pytest.mark.parametrize(
    ("code", "seconds", "message"),
    [
        (
            "print('ValueError: torch says: out of memory'); exit(7)",
            60,
            ["status 7", "torch says", "Hint: lower gpu_memory"],
        ),
        (
            "print('INFO Starting to load model x', flush=True); import time; time.sleep(60)",
            1,
            ["not ready after 1 s", "Starting to load model x"],
        ),
    ],
)
def test_server_that_does_not_come_up(tiny_models, tmp_path, monkeypatch, code, seconds, message):
    monkeypatch.setattr(server_module, "server_command", lambda *_: [sys.executable, "-c", code])
    lines = []
    server = Server(tiny_models[0], log_path=tmp_path / "log", version="v0", settings=SETTINGS, progress=lines.append)
    with pytest.raises(EngineError) as failure:
        server.start(timeout=seconds)
    assert all(part in str(failure.value) for part in message)
    assert not server.alive
    phases = [line.rpartition(" (")[0] for line in lines]
    assert phases == ["engine: loading vLLM", "engine: loading the model's weights"][: 1 + ("load model" in code)]


def test_transient_failures_are_retried_and_versions_joined(fakes):
    (fake,) = fakes([503, 500])
    (generation,) = generate_many([fake.url], 1)
    assert len(fake.bodies) == 3
    assert generation.weight_version == "a>b"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_sent_again(fakes, status):
    (fake,) = fakes([status])
    with pytest.raises(EngineError, match=f"{status}: no luck") as failure:
        generate_many([fake.url], 1)
    assert len(fake.bodies) == 1 and not isinstance(failure.value, EngineUnavailable)


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429])
def test_what_a_server_would_answer_to_any_request_is_no_fault_of_this_one(fakes, status):
    """A key, an adapter that was lost: the conversation is not to fail for it."""
    (fake,) = fakes([status] * 100)
    with pytest.raises(EngineUnavailable, match=f"{status}: no luck"):
        generate_many([fake.url], 1)
    assert len(fake.bodies) > 1


def test_retries_end(fakes):
    (fake,) = fakes([503] * 100)
    with pytest.raises(EngineError, match="503: no luck"):
        generate_many([fake.url], 1)
    assert 1 < len(fake.bodies) < 10


def test_a_dead_server_is_stood_in_for(fakes):
    fake, dead = fakes([], [])
    dead.close()
    assert len(generate_many([dead.url, fake.url], 20)) == 20
    assert len(fake.bodies) == 20


def test_prompts_about_one_image_share_a_server(fakes):
    servers = fakes([], [], [])
    generate_many([fake.url for fake in servers], 60, concurrency=3)
    homes = [{body["content_parts"][0]["uuid"] for body in fake.bodies} for fake in servers]
    assert sum(map(len, homes)) == 10  # no image at two servers
    assert sum(map(bool, homes)) > 1


def test_a_crowd_about_one_image_is_spread(fakes):
    servers = fakes([], [])

    async def run():
        async with EngineClient([fake.url for fake in servers], media="data") as client:
            await asyncio.gather(*(client.generate([5], [image(0)], PLAIN) for _ in range(40)))

    asyncio.run(run())
    assert all(len(fake.bodies) > 5 for fake in servers)
