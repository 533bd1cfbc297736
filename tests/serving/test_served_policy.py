"""Endpoint over the real engine: a policy answers as in an evaluation, in a crowd, and after the engine was killed."""

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import httpx
import openai
import pytest
from chat_server import LIMITS, Endpoint, data_uri, encode, picture, show
from processes import title

from thinkimg.config.load import load_config
from thinkimg.conversation.episode import ConversationSpec, Episode
from thinkimg.conversation.question import list_choices, state_form
from thinkimg.engine.client import EngineClient
from thinkimg.engine.play import EpisodeSpec, Sampler, SamplingMode
from thinkimg.images.decode import pixel_hash
from thinkimg.records import AnswerType, Sample
from thinkimg.resources import Resources
from thinkimg.serving.keeper import EngineKeeper
from thinkimg.serving.serve import Sources, connect_once, in_a_thread, make_connect, make_service
from thinkimg.stages.rollout import settings_of
from thinkimg.watchdog import descendants

SETTINGS = [
    "conversation.max_turn_tokens=24", "conversation.max_turns=3", "where.engine.max_num_seqs=32", "where.workers=2",
]  # fmt: skip
IMAGES = {pixel_hash(image): image for image in (picture(seed, (150 + 9 * seed, 120)) for seed in range(6))}


class Table:
    """The images of a data set."""

    def decoded(self, sha256):
        return IMAGES[sha256]


def make_sample(number: int, sha256: str) -> Sample:
    question = "Which way do the stripes run? " * (1 + number % 3)
    choices = ("vertical", "horizontal") if number % 2 else ()
    return Sample(f"s{number}", question, ("vertical",), AnswerType.EXACT, choices, (sha256,), "test", "held_out")


@pytest.fixture(scope="module")
def served(tiny_models, tmp_path_factory):
    """A random policy behind an endpoint with an engine of its own."""
    config = load_config("tiny", [*SETTINGS, f"where.store={tmp_path_factory.mktemp('served')}"])
    model, settings = tiny_models[0], settings_of(config)
    policy = SimpleNamespace(digest="d" * 64, is_full=True, model_directory=model, vocabulary=model)
    with Resources(config.where, say=lambda line: None) as resources, ExitStack() as stack:
        connect = make_connect(policy, settings, resources)
        asyncio.run(connect_once(connect))
        keeper = EngineKeeper(in_a_thread(connect))
        endpoint = Endpoint(make_service(policy, settings, resources, Sources(LIMITS, None, ()), keeper, stack))
        samples = [make_sample(number, sha256) for number, sha256 in enumerate(IMAGES)]
        yield SimpleNamespace(
            endpoint=endpoint, resources=resources, samples=samples, policy=policy, settings=settings, images=Table()
        )
        endpoint.close()


def ask(served, sample, **options):
    """The completion of a sample, in the words of training."""
    form = state_form(sample, served.settings.conversation.unit)
    text = "\n".join([sample.question, *list_choices(sample.choices), form])
    urls = [data_uri(encode(served.images.decoded(sha))) for sha in sample.images]
    return served.endpoint.ask(show(text, *urls), **options)


def evaluate(served) -> dict[str, Episode]:
    """Sample id -> its greedy conversation, as the stage `evaluate` samples it."""

    async def run():
        engine: EngineClient = await make_connect(served.policy, served.settings, served.resources)()
        service = served.endpoint.service
        spec = ConversationSpec.load(served.settings.conversation, served.settings.images, served.policy.vocabulary)
        async with engine:
            sampler = Sampler(spec, served.images, served.policy.digest, engine, service.media, service.pool)
            jobs = [EpisodeSpec(sample, 0, SamplingMode(0.0)) for sample in served.samples]
            return {job.sample.sample_id: episode async for job, episode in sampler.sample(jobs)}

    return asyncio.run(run())


def texts_of(episode) -> str:
    return "\n\n".join("\n".join(filter(None, [turn.text, turn.observation])) for turn in episode.turns)


def test_the_policy_answers_as_in_an_evaluation(served):
    episodes = evaluate(served)
    for stream in (False, True):
        for sample in served.samples:
            episode, done = episodes[sample.sample_id], ask(served, sample, stream=stream)
            if stream:
                deltas = [chunk.choices[0].delta.model_dump() for chunk in done]
                content, reasoning = ("".join(d.get(name) or "" for d in deltas) for name in ("content", "reasoning"))
            else:
                content, reasoning = done.choices[0].message.content, done.choices[0].message.reasoning
                assert done.usage.completion_tokens == sum(turn.tokens for turn in episode.turns)
                assert done.usage.total_tokens == episode.stream.expanded_length
            assert (content, reasoning) == (episode.answer or "?", texts_of(episode)) and reasoning


def test_seeds_tell_sampled_answers_apart_and_bring_them_back(served):
    sample = served.samples[0]
    first, again, other = (
        ask(served, sample, temperature=1.0, seed=seed).choices[0].message.reasoning for seed in (1, 1, 2)
    )
    assert first == again != other


def test_32_at_once_get_what_each_gets_alone(served):
    samples = [served.samples[i % len(served.samples)] for i in range(32)]
    alone = {key: texts_of(episode) for key, episode in evaluate(served).items()}
    with ThreadPoolExecutor(32) as pool:
        crowd = list(pool.map(lambda sample: ask(served, sample).choices[0].message.reasoning, samples))
    assert crowd == [alone[sample.sample_id] for sample in samples]


def test_a_killed_engine_is_started_again_behind_the_endpoint(served):
    """Requests under way get 503, those of the next seconds too; then the same answers come again.

    What the server has started ends with it, though nobody ends it: its port is not kept open.
    """
    before = ask(served, served.samples[0]).choices[0].message.reasoning
    child = served.resources._servers["engine"].each[0]._child
    (server,) = (pid for pid in descendants(child.pid) if title(pid).split()[1:3] == ["-m", "thinkimg.engine.serve"])
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(keep_asking, served) for _ in range(8)]
        time.sleep(1)
        os.kill(child.pid, signal.SIGSTOP)  # the watchdog, which would end the rest
        os.kill(server, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while left := [title(pid) for pid in descendants(child.pid) if "VLLM" in title(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        assert {future.result() for future in asked} == {503}
    assert httpx.get(f"{served.endpoint.url}/health").status_code == 503
    deadline = time.monotonic() + 240
    while httpx.get(f"{served.endpoint.url}/health", timeout=60).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert ask(served, served.samples[0]).choices[0].message.reasoning == before
    assert served.resources._servers["engine"].each[0]._child.pid != child.pid


def keep_asking(served) -> int:
    """Ask until there is an error, and return its status."""
    while True:
        try:
            ask(served, served.samples[0], temperature=1.0)
        except openai.APIStatusError as error:
            return error.status_code
