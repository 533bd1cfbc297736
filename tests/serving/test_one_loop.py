"""One loop: rollout, evaluation and endpoint sample by the same call."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from chat_server import CROP, VIEW, ChatServer, ScriptedClient, answer, data_uri, encode, show
from chat_server import picture as draw

from thinkimg.conversation.episode import ConversationSpec
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.engine import play
from thinkimg.engine.media import Media
from thinkimg.engine.play import EpisodeSpec, Sampler, SamplingMode
from thinkimg.images.decode import pixel_hash
from thinkimg.records import AnswerType, Sample

QUESTION = "Which colour? red"
IMAGE = draw()


class Table:
    """The images of a data set."""

    def decoded(self, sha256):
        return IMAGE


def sample_all(engine: ScriptedClient, modes: list[SamplingMode]) -> list:
    """The trajectories of one sample, as rollout (sampled) and evaluate (greedy) play it."""
    config = ConversationConfig(system="s")
    sample = Sample("s", QUESTION, ("red",), AnswerType.TEXT, (), (pixel_hash(IMAGE),), "test", "held_out")

    async def run():
        with ThreadPoolExecutor(2) as pool:
            spec = ConversationSpec(config, VIEW, engine.codec)
            sampler = Sampler(spec, Table(), "p", engine, Media(None), pool)
            jobs = [EpisodeSpec(sample, number, mode) for number, mode in enumerate(modes)]
            return [episode.trajectory() async for _, episode in sampler.sample(jobs)]

    return asyncio.run(run())


def answers_of_all() -> list[str]:
    """The answer of a rollout, of an evaluation, and of the endpoint."""
    script = lambda prompt, sampling: answer("red") if "Image 1:" in prompt else CROP  # noqa: E731
    rows = sample_all(ScriptedClient(script), [SamplingMode(1.0), SamplingMode(0.0)])
    server = ChatServer(ScriptedClient(script))
    try:
        message = server.ask(show(QUESTION, data_uri(encode(IMAGE)))).choices[0].message
    finally:
        server.close()
    return [*(row.answer for row in rows), message.content]


def test_the_same_conversation_everywhere():
    """Text for text, observation for observation: an endpoint's is the evaluation's."""
    engine = ScriptedClient(lambda prompt, sampling: answer("red") if "Image 1:" in prompt else CROP)
    (row,) = sample_all(engine, [SamplingMode(0.0)])
    prompts = [prompt for prompt, _ in engine.requests]
    server = ChatServer(engine)
    try:
        form = "Answer with as few words as possible."
        server.ask(show(f"{QUESTION}\n{form}", data_uri(encode(IMAGE))))
    finally:
        server.close()
    assert [prompt for prompt, _ in engine.requests[len(prompts) :]] == prompts
    assert row.answer == "red" and np.all(np.array(row.logprobs) == -1.0)


@pytest.mark.parametrize("where", ["sample_turn", "play_turns"])
def test_patching_the_sampling_call_changes_all(monkeypatch, where):
    assert answers_of_all() == ["red"] * 3

    async def other_turn(episode, *_):
        return episode.read(answer("patched"))

    async def other_turns(core, *_, **__):
        core.read(answer("patched"))
        yield core.turns[-1]

    monkeypatch.setattr(play, where, {"sample_turn": other_turn, "play_turns": other_turns}[where])
    assert answers_of_all() == ["patched"] * 3
