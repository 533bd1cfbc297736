"""The judges at work: on a real vLLM server, and on endpoints that answer garbage, hang, or die half-way."""

import asyncio
import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from thinkimg.config.load import load_config
from thinkimg.conversation import compare
from thinkimg.engine.client import EngineClient
from thinkimg.engine.errors import EngineError
from thinkimg.engine.request import ImageRef
from thinkimg.engine.server import SERVED_NAME
from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.models.family import load_family
from thinkimg.resources import Resources
from thinkimg.rewards import judging
from thinkimg.rewards.context import JudgeContext
from thinkimg.rewards.judge import Judge
from thinkimg.rewards.judgement import Judgement, Pair
from thinkimg.rewards.judges import self as policy_judge
from thinkimg.rewards.judges import teacher
from thinkimg.rewards.views import Views
from thinkimg.stages.score import judge_pairs, judge_settings, name_ledger
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable, encode_lossless, image_writer
from thinkimg.store.manifest import Recipe
from thinkimg.trainer.forward.packing import ImageToken, compute_mrope_positions

QWEN = load_family("qwen2_5_vl")
QUESTIONS = ("Which way do the stripes run?", "The scene is too dark. Which letter is it?")


class World:
    """Images in an artifact, pairs of them, and a context whose policy is the model that `engine` serves."""

    def __init__(self, root: Path, model: Path, url: str, media: Path):
        self.root, self.store = root, Store(root / "store")
        rng = np.random.default_rng(3)
        sizes = [(112, 112), (56, 84), (84, 56), (28, 28)]
        pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        self.pictures = {pixel_hash(picture): picture for picture in pictures}

        def images(work):
            with work.part("images.parquet") as path, image_writer(path) as add:
                for sha in sorted(self.pictures):
                    add(sha, encode_lossless(self.pictures[sha]), *self.pictures[sha].size)

        def policy(work):
            import shutil

            with work.part("policy") as directory:
                shutil.copytree(model, directory / "model")

        self.table = self.store.build("dataset", Recipe("test", 1, 1, {}), images)[0]
        self.policy = self.store.build("policy", Recipe("warmstart", 1, 1, {}), policy)[0]
        self.url, self.media = url, media
        first, *others = self.pictures
        self.pairs = [Pair(question, first, other) for question in QUESTIONS for other in others]

    def teaching(self, **teacher) -> JudgeContext:
        """The context of settings of `image.teacher`, and of `where.teacher` as `where`."""
        where = {"url": f"{self.url}/v1", "timeout_s": 10, "retries": 0} | teacher.pop("where", {})
        settings = {"model": SERVED_NAME} | teacher
        # With one worker the pairs are asked about in their order.
        texts = f"image.teacher={json.dumps(settings)}", f"where.teacher={json.dumps(where)}", "where.workers=1"
        return self.context(*texts)

    def context(self, *overrides: str) -> JudgeContext:
        config = load_config("tiny", overrides)
        return JudgeContext(
            judge_settings(config), RunningServer(self, config.where), self.policy, self.policy, None,
            (self.table,), ImageTable([self.table]),
        )  # fmt: skip


class RunningServer(Resources):
    """Resources with the server that is running already, in place of one that a loop would start."""

    def __init__(self, world: World, where):
        super().__init__(where)
        self.world = world

    media = property(lambda self: self.world.media)

    async def engine(self, policy, settings, base):
        return EngineClient([self.world.url], media="file")


@pytest.fixture(scope="module")
def world(engine, tiny_models, media_dir, tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("judges"), tiny_models[0], engine.url, media_dir)


def reference(world: World, pair: Pair, *, swapped: bool) -> list[float]:
    """Log-probabilities of the two ratings by transformers."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(world.policy.path("policy/model"), dtype=torch.float32)
    context = world.context()
    shown = [
        context.picture(sha)
        for sha in ((pair.processed, pair.original) if swapped else (pair.original, pair.processed))
    ]
    codec, grids = context.codec, np.array([one.grid for one in shown])
    compact = np.array(compare.encode_comparison(codec, pair.question))
    counts = np.ones(len(compact), dtype=int)
    counts[compact == codec.image] = [one.grid[1] * one.grid[2] // 4 for one in shown]
    tokens = np.repeat(compact, counts)
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(tokens)[None], image_grid_thw=torch.from_numpy(grids),
            pixel_values=torch.from_numpy(np.concatenate([QWEN.processor.extract_patches(one.view) for one in shown])),
            position_ids=torch.from_numpy(compute_mrope_positions(tokens, ImageToken(codec.image, 2), grids))[:, None],
        ).logits[0, -1]  # fmt: skip
    return logits.log_softmax(-1)[compare.rating_tokens(codec)].tolist()


def test_the_policys_judgement_is_the_distribution_of_one_step_in_both_orders(world):
    found = policy_judge.judge(world.pairs, world.context())
    assert len(found) == len(world.pairs)
    for pair, one in list(zip(world.pairs, found, strict=True))[::3]:
        forward, backward = (reference(world, pair, swapped=swapped) for swapped in (False, True))
        np.testing.assert_allclose(one.evidence["logprobs"], [forward, backward], atol=2e-3)
        expected = [1 / (1 + np.exp(forward[0] - forward[1])), 1 / (1 + np.exp(backward[1] - backward[0]))]
        assert one.value == pytest.approx(np.mean(expected), abs=1e-3)


def lend(context: JudgeContext, folder: Path | None, pair: Pair) -> list[ImageRef]:
    async def see() -> list[ImageRef]:
        with Views(context, folder, 1) as views:
            async with views.lend(pair) as images:
                return images

    return asyncio.run(see())


def test_the_endpoint_sees_the_very_prompt_of_the_policys_judgement(world):
    """Two ways to the same distribution: our tokens, and messages through the endpoint's chat template."""
    from openai import OpenAI

    context, pair = world.context(), world.pairs[1]
    urls = [image.url("data") for image in lend(context, None, pair)]
    request = teacher.build_messages(pair.question, urls, prefix=True)
    request["extra_body"] |= {"return_tokens_as_token_ids": True}
    with OpenAI(base_url=f"{world.url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model=SERVED_NAME, max_tokens=1, temperature=0, logprobs=True, top_logprobs=20, **request
        )
    entries = answer.choices[0].logprobs.content[0].top_logprobs
    ids = [int(entry.token.removeprefix("token_id:")) for entry in entries]

    async def ask() -> list[float]:
        async with EngineClient([world.url], media="file") as engine:
            with Views(context, world.media, 1) as views:
                async with views.lend(pair) as shown:
                    tokens = compare.encode_comparison(context.codec, pair.question)
                    return await engine.next_token_logprobs(tokens, shown, ids)

    np.testing.assert_allclose([entry.logprob for entry in entries], asyncio.run(ask()), atol=1e-3)
    assert len(set(ids)) == 20


def top(*pairs) -> dict:
    """A chat completion with these top tokens."""
    entries = [{"token": token, "logprob": value, "bytes": None} for token, value in pairs]
    first = {"token": "1", "logprob": -1.0, "bytes": None, "top_logprobs": entries}
    message = {"role": "assistant", "content": "1"}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": {"content": [first]}}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


GOOD = top(("1", -2.0), (" 2", -1.0), ("x", -3.0))


@contextmanager
def endpoint(answers):
    """A server on localhost: answers(n) gives the n-th answer (status, body), None hangs; yields its URL."""
    count, lock, stop = [0], threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                count[0] += 1
                number = count[0]
            self.answer(answers(number))

        def do_GET(self):  # the probe
            self.answer((200, b'{"object": "list", "data": []}') if answers(0) else None)

        def answer(self, found):
            if found is None:
                stop.wait(30)
                return
            status, body = found
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        stop.set()
        server.shutdown()
        server.server_close()


def at(url: str, **settings) -> dict:
    return {"url": url, "timeout_s": 1, "retries": 0, "concurrency": 1} | settings


@pytest.mark.parametrize(
    "body, reason",
    [
        (b"not json at all", "can't be read"),
        (b"{}", "can't be read"),
        (top(), "not among"),
        (top(("1", -0.1), ("yes", -2.0)), "not among"),
        ({**GOOD, "choices": []}, "can't be read"),
    ],
)
def test_garbage_is_missing_with_its_reason(world, body, reason):
    """What can't be read is the endpoint's fault, so that another judge may be asked; the model's own choice is not."""
    with endpoint(lambda n: (200, body)) as url:
        found = teacher.judge(world.pairs[:2], world.teaching(where=at(url)))
    assert all(one.value is None and reason in one.reason for one in found), found
    assert all(one.unreachable == (reason == "can't be read") for one in found)


def test_tokens_with_and_without_a_space_are_one_rating(world):
    with endpoint(lambda n: (200, top(("1", np.log(0.2)), (" 1", np.log(0.1)), ("2", np.log(0.6))))) as url:
        (one,) = teacher.judge(world.pairs[:1], world.teaching(where=at(url)))
    assert one.evidence["preferences"] == pytest.approx([2 / 3, 1 / 3])


def test_an_endpoint_that_dies_half_way_is_asked_no_more(world):
    asked = []

    def answers(number):
        asked.append(number)
        return (200, GOOD) if 0 < number <= 4 else None  # two pairs; then it hangs, the probe included

    with endpoint(answers) as url:
        found = teacher.judge(world.pairs, world.teaching(where=at(url)))
    assert [one.value is not None for one in found] == [True, True, False, False, False, False]
    assert all(one.unreachable for one in found[2:]) and "No answer" in found[2].reason
    assert max(asked) == 5


def test_a_request_that_fails_alone_does_not_condemn_the_endpoint(world):
    for status, lost in ((400, False), (503, True)):  # a refused request is a failed judgement of its row alone

        def answers(number, status=status):
            return (status, {"error": {"message": "too large"}}) if number == 1 else (200, GOOD)

        with endpoint(answers) as url:
            found = teacher.judge(world.pairs[:3], world.teaching(where=at(url)))
        assert [one.unreachable for one in found] == [lost, False, False] and "too large" in found[0].reason
        assert [one.value is None for one in found] == [True, False, False]


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_wrong_or_lacking_is_the_users_to_mend_and_nobody_judges_instead(world, status):
    with (
        endpoint(lambda number: (status, {"error": {"message": "no key"}})) as url,
        pytest.raises(
            UserError, match=f"does not let us in.*{status}.*no key.*where.teacher.api_key_env=OPENAI_API_KEY"
        ),
    ):
        teacher.judge(world.pairs, world.teaching(where=at(url)))


@pytest.mark.parametrize(
    "where, apart, starts", [({}, True, True), ({}, False, False), ({"url": "http://h/v1"}, True, False)]
)
def test_the_loops_own_teacher_starts_before_it_is_asked_where_nobody_waits_for_it(
    world, monkeypatch, where, apart, starts
):
    """And a start that fails is told when it is asked, as the fallback has it."""
    context = world.teaching(model=teacher.FROZEN if not where else SERVED_NAME, where={"url": None} | where)
    asked: list[int] = []

    def fail(first, engine, base):
        asked.append(engine.max_tokens)
        raise EngineError("no memory")

    monkeypatch.setattr(type(context.resources), "teacher", lambda self, *arguments: fail(*arguments))
    monkeypatch.setattr(Resources, "start_apart", apart)
    teacher.start(context, set(QUESTIONS))
    assert len(asked) == starts
    if not where:
        assert all(one.unreachable and "no memory" in one.reason for one in teacher.judge(world.pairs, context))


def test_without_a_fallback_the_stage_stops_with_one_sentence(world):
    context = world.teaching(fallback="error", where=at("http://127.0.0.1:9/v1"))
    with pytest.raises(UserError, match="can't be asked") as caught:
        teacher.judge(world.pairs[:1], context)
    assert "fallback=self" in caught.value.hint
    nowhere = world.teaching(model="Qwen/X", where={"url": None})
    with pytest.raises(UserError, match="has no endpoint"):
        teacher.judge(world.pairs[:1], nowhere)


def test_what_was_judged_before_is_not_judged_again(world):
    context = world.context()
    calls: list[int] = []

    def judge(pairs, context):
        calls.append(len(pairs))
        return policy_judge.judge(pairs, context)

    module = ModuleType(policy_judge.__name__)
    module.identity, module.judge = policy_judge.identity, judge
    counting = Judge("self", module)
    first = judging.ask_judge(counting, world.pairs[:4], context, lambda component, keys: {})
    table = judging.build_ledger({("self", pair): one for pair, one in zip(world.pairs, first, strict=False)})
    scores, _ = world.store.build(
        "scores", Recipe("score", 1, 1, {"n": 1}), lambda work: work.table("judgements-self-00000.parquet", table)
    )
    known = judging.make_lookup(world.store, "of other rollouts")
    again = judging.ask_judge(counting, world.pairs, context, known)
    assert calls == [4, 2] and again[:4] == first
    assert judging.read_ledger(scores.path("judgements-self-00000.parquet")) == {
        ("self", pair): one for pair, one in zip(world.pairs, first, strict=False)
    }


def test_an_image_that_cannot_be_read_is_missing_and_one_of_one_colour_is_worth_nothing(world):
    context = world.context()
    gone = Pair(QUESTIONS[0], world.pairs[0].original, "0" * 64)
    found = judging.reject_unfit(gone, context)
    assert found.value is None and "can't be read" in found.reason
    assert judging.reject_unfit(world.pairs[0], context) is None
    stored = "1" * 64

    def images(work):
        with work.part("images.parquet") as path, image_writer(path) as add:
            add(stored, encode_lossless(world.pictures[world.pairs[0].original]), 112, 112)

    context.images.add(world.store.build("dataset", Recipe("test", 1, 1, {"hash": "wrong"}), images)[0])
    found = judging.reject_unfit(Pair(QUESTIONS[0], world.pairs[0].original, stored), context)
    assert found.value is None and "have another hash" in found.reason


def test_a_judge_that_fails_takes_nothing_from_the_others(world, monkeypatch):
    asked, failing = [], ["broken"]

    def judge_named(name):
        def judge(pairs, context):
            asked.append((name, len(pairs)))
            if name in failing:
                raise RuntimeError("no luck")
            return [Judgement(0.5, None, {}) for _ in pairs]

        module = ModuleType(f"own_judges.{name}")
        module.judge, module.__file__ = judge, None
        return module

    for name in ("broken", "calm"):  # a user's own
        monkeypatch.setitem(sys.modules, f"own_judges.{name}", judge_named(name))
    context = world.context("image.types=[own_judges.broken, own_judges.calm]", "image.weights={broken: 1, calm: 1}")
    pairs = set(world.pairs)
    with world.store.create("scores", Recipe("score", 1, 1, {"n": 2})) as work:
        with pytest.raises(RuntimeError, match="no luck"):
            judge_pairs(work, context, 0, pairs, lambda component, keys: {})
        assert work.has(name_ledger(0, "calm")) and not work.has(name_ledger(0, "broken"))
        failing.clear()
        judge_pairs(work, context, 0, pairs, lambda component, keys: {})
        assert sorted(asked) == [("broken", 6), ("broken", 6), ("calm", 6)]
        artifact = work.publish()
    assert artifact.table("judgements").num_rows == 12


def test_asking_is_async_safe_from_a_thread(world):
    """Judges run side by side in threads, each with an event loop of its own."""
    found = asyncio.run(asyncio.to_thread(policy_judge.judge, world.pairs[:1], world.context()))
    assert 0 <= found[0].value <= 1
