"""The exported chat template renders a conversation to exactly the tokens on which the policy was trained."""

import copy
from functools import cache

import numpy as np
import pytest
from chat_codecs import STOCK, THINKING, TRIMMING, WHOLE, qwen_tokenizer, stock_codec, stock_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkimg.conversation.codec import Codec
from thinkimg.conversation.episode import ConversationSpec, Episode, play_script
from thinkimg.conversation.picture import make_picture
from thinkimg.conversation.protocol import IMAGE_PART, Answer, Protocol, ToolCall, load_protocol, text_part
from thinkimg.conversation.protocols.think import Think
from thinkimg.conversation.question import state_question
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.conversation.template import write_template
from thinkimg.errors import UserError
from thinkimg.images.settings import ViewLimits
from thinkimg.records import AnswerType, Sample, StopReason, Trajectory, TurnKind

LIMITS = ViewLimits(min_pixels=28 * 28, max_pixels=4 * 28 * 28)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 120, 160, 3), dtype=np.uint8)
PICTURES = [make_picture(Image.fromarray(pixels), LIMITS) for pixels in PIXELS]
STATES = [(template, None) for template in ("tiny", *STOCK, THINKING)] + [
    (template, thinking) for template in TRIMMING for thinking in (True, False)
]
whole = pytest.param(WHOLE, None, marks=pytest.mark.long)
states = pytest.mark.parametrize("template, thinking", [*STATES, whole])
protocols = pytest.mark.parametrize("protocol", ["think", "qwen", "qwen_xml"])


@cache
def exported(template: str, thinking: bool | None, protocol: str):
    """The tokenizer with the template that an export gives it."""
    tokenizer = copy.copy(stock_tokenizer(template))
    tokenizer.chat_template = write_template(stock_codec(template, thinking), load_protocol(protocol))
    return tokenizer


def begin(
    template: str, thinking: bool | None, protocol: str, *, images: int = 2, system: str | None = None
) -> Episode:
    pictures = PICTURES[:images]
    hashes = tuple(picture.sha256 for picture in pictures)
    sample = Sample("s", " q?\n", "a", AnswerType.TEXT, ("a", "b"), hashes, "test", "train")
    talk = ConversationConfig(
        protocol=protocol, thinking=thinking, system=system, max_turn_tokens=4000, max_tokens=20_000
    )
    spec = ConversationSpec(talk, LIMITS, stock_codec(template, thinking))
    return Episode(sample, pictures, spec, policy="p", group_id="g", index=0)


def messages_of(episode: Episode, row: Trajectory, *, role: str) -> list[dict]:
    """The conversation as messages. role: of the tools' results, as "tool" or as "user" in the protocol's tags."""
    sizes = row.sizes[: len(episode.sample.images)]
    question = text_part(state_question(episode.sample, sizes, row.coordinates))
    messages = [{"role": "user", "content": [IMAGE_PART] * len(sizes) + [question]}]
    if system := episode.config.system or (
        episode.config.system is None and episode.protocol.system(tuple(episode.tools.values()), row.coordinates)
    ):
        messages.insert(0, {"role": "system", "content": system})
    for turn in row.turns:
        messages.append({"role": "assistant", "content": turn.text})
        content = [IMAGE_PART] * (turn.image is not None) + [text_part(turn.observation or "")]
        if turn.kind is TurnKind.TOOL and role == "user":
            content = episode.protocol.observation(turn.observation, image=turn.image is not None)
        if turn.observation is not None:
            messages.append({"role": role if turn.kind is TurnKind.TOOL else "user", "content": content})
    return messages


def script(protocol: Protocol) -> list[str]:
    crop = {"x": 0, "y": 0, "width": 28, "height": 28}
    return [
        protocol.render_turn("  I  look.\n\nThere", ToolCall("crop_image", crop)),
        " no call \n",
        protocol.render_turn("", ToolCall("flip_image", {"direction": "vertical", "image": "original"})),
        protocol.render_turn("So.", ToolCall("get_image_info", {"k": "</x>\n", "y": [1, {"z": None}]})),
        protocol.render_turn("x", Answer("b <i>\n4 c")),
    ]


@states
@protocols
def test_a_played_conversation_renders_to_the_tokens_of_its_stream(template, thinking, protocol):
    for images, system in ((2, None), (1, ""), (0, " s \n")):
        episode = begin(template, thinking, protocol, images=images, system=system)
        row = play_script(episode, script(episode.protocol))
        assert row.stop is StopReason.ANSWER and len(row.turns) == 5, row.error
        assert all(turn.text.startswith(episode.codec.turn_start) for turn in row.turns)
        tokenizer = exported(template, thinking, protocol)
        for role in ("tool", "user"):
            messages = messages_of(episode, row, role=role)
            assert tokenizer.apply_chat_template(messages, return_dict=False) == list(row.tokens)
            ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            for end in ends:  # the prompt of each turn
                ids = tokenizer.apply_chat_template(messages[:end], add_generation_prompt=True, return_dict=False)
                assert ids == list(row.tokens[: len(ids)]) and row.roles[len(ids)] == 1 != row.roles[len(ids) - 1]
        start = episode.codec.turn_start
        bare = [message | {"content": text} for message in messages if (text := message["content"])]
        for message in bare:
            if message["role"] == "assistant":  # as a server returns it, without what the prompt began
                message["content"] = message["content"].removeprefix(start)
        assert tokenizer.apply_chat_template(bare, return_dict=False) == list(row.tokens)
        switched = tokenizer.apply_chat_template(messages, enable_thinking=not thinking, return_dict=False)
        assert switched == list(row.tokens)


@pytest.mark.parametrize("template", TRIMMING)
def test_the_stock_template_renders_other_tokens(template):
    episode = begin(template, None, "qwen_xml")
    row = play_script(episode, script(episode.protocol))
    messages = messages_of(episode, row, role="tool")
    assert stock_tokenizer(template).apply_chat_template(messages, return_dict=False)[:-1] != list(row.tokens)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(STATES), st.sampled_from(["think", "qwen", "qwen_xml"]),
       st.lists(st.lists(st.integers(0, 500), max_size=12), min_size=1, max_size=4))  # fmt: skip
def test_whatever_was_sampled_its_text_is_rendered(state, protocol, turns):
    episode = begin(*state, protocol)
    for ids in turns:
        if episode.stop is None:
            ids = [i for i in ids if i not in episode.codec.banned and i != episode.codec.end]
            assume(episode.feed([*ids, episode.codec.end], [0.0] * (len(ids) + 1), "stop", "v") is None)
    assume(all("\ufffd" not in turn.text for turn in episode.turns))
    episode.fail("it ends here")
    row = episode.trajectory()
    assert [turn.kind for turn in row.turns] == [TurnKind.MALFORMED] * len(turns)
    messages = messages_of(episode, row, role="user")
    text = exported(*state, protocol).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == episode.codec.decode(row.tokens)


class Between(Think):
    """A protocol that writes something between the image and the text of a result."""

    def observation(self, value, *, image):
        return [*[IMAGE_PART, text_part("shows ")] * image, text_part(value)]


def test_what_was_never_trained_on_is_refused():
    tokenizer, user = exported("qwen3_5_think", None, "qwen"), {"role": "user", "content": "q"}
    call = {"role": "assistant", "content": "t", "tool_calls": [{"function": {"name": "n", "arguments": {}}}]}
    for messages, options, said in (
        ([user, call], {}, "as one text"),
        ([user, {"role": "assistant", "content": "x", "reasoning_content": "t"}], {}, "as one text"),
        ([user, {"role": "system", "content": "s"}], {}, "no place for a message of role system"),
        ([user, {"role": "critic", "content": "s"}], {}, "no place for a message of role critic"),
        ([{"role": "user", "content": [{"type": "video"}]}], {}, "a text or an image"),
        ([user], {"tools": [{"type": "function", "function": {"name": "n"}}]}, "Pass no tools"),
    ):
        with pytest.raises(Exception, match=said):
            tokenizer.apply_chat_template(messages, tokenize=False, **options)
    other = copy.copy(stock_tokenizer("qwen3_vl"))
    other.chat_template = write_template(stock_codec("qwen3_vl"), Between())
    with pytest.raises(Exception, match="role tool"):
        other.apply_chat_template([user, {"role": "tool", "content": "r"}], tokenize=False)


def test_a_template_that_changes_the_system_prompt_is_refused():
    tokenizer = copy.copy(qwen_tokenizer())
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'][:0] }}{% endif %}" + (
        stock_tokenizer("qwen3_vl").chat_template.replace("messages[0].content", "'s'")
    )
    with pytest.raises(UserError, match="system prompt"):
        write_template(Codec(tokenizer), load_protocol("think"))
