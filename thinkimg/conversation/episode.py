"""Episode: one conversation as a state machine without I/O."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from PIL import Image

from thinkimg.conversation.chat import Chat
from thinkimg.conversation.codec import Codec
from thinkimg.conversation.picture import Picture
from thinkimg.conversation.protocol import IMAGE_PART, Content, load_protocol, text_part
from thinkimg.conversation.question import state_question
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.conversation.text_core import PendingCall, TextCore, dump_args
from thinkimg.conversation.tokens import ROLES, TokenError, TokenStream, expanded_length
from thinkimg.errors import UserError, describe_error
from thinkimg.images import toolbox
from thinkimg.images.settings import ViewLimits
from thinkimg.records import Coordinates, Sample, Trajectory


@dataclass(frozen=True)
class ConversationSpec:
    """Rules of all episodes, the size at which images are seen, and the policy's tokens."""

    conversation: ConversationConfig
    view: ViewLimits
    codec: Codec

    @classmethod
    def load(cls, conversation: ConversationConfig, view: ViewLimits, model: str | Path) -> Self:
        """Return the rules with the tokens of a model: a directory, or an id on the Hub. Raises UserError as Codec."""
        return cls(conversation, view, Codec.load(model, thinking=conversation.thinking))

    def __post_init__(self) -> None:
        assert self.codec.thinking is self.conversation.thinking, "the codec opens replies as the settings say"


class Episode(TextCore):
    """Conversation about one sample, or the next answer in a chat, with its token stream.

    While `stop` is None: send `prompt_ids` and `view_images` for at most budget() tokens, sampled with
    derive_seed(policy, sample_id, index, len(turns)). Check the engine's prompt with stream.check, and feed() the
    sampled tokens. If that returns a call, run() it and observe() its outcome. At the end trajectory() is the row, and
    `made_images` are the images of its tools.

    pictures: the sample's images in order, which its episodes share. policy: digest of the policy that plays. group_id,
    index: the group of rollouts, and the number in it. A prompt beyond the limits fails at once.
    """

    def __init__(
        self,
        sample: Sample | Chat,
        pictures: Sequence[Picture],
        spec: ConversationSpec,
        *,
        policy: str,
        group_id: str,
        index: int,
    ) -> None:
        assert [picture.sha256 for picture in pictures] == list(sample.images), "the pictures must be the sample's"
        super().__init__(pictures, spec.conversation, spec.view)
        self.sample, self.policy, self.group_id, self.index = sample, policy, group_id, index
        self.codec = spec.codec
        self._weights: list[str] = []
        prompt = render_prompt(sample, [picture.view.size for picture in pictures], self.config, self.codec)
        self.stream = TokenStream(self.codec, prompt, [picture.slot for picture in pictures])
        if excess := find_excess(self.stream.expanded_length, len(pictures), self.config):
            self.fail(excess)

    @property
    def prompt_ids(self) -> list[int]:
        """Compact token ids of the conversation so far."""
        return list(self.stream.ids)

    @property
    def view_images(self) -> list[tuple[str, Image.Image]]:
        """(uuid, view) of each placeholder of prompt_ids, in order."""
        return [(picture.uuid, picture.view) for picture in self.pictures]

    @property
    def made_images(self) -> dict[str, Image.Image]:
        """Full-resolution images that tools made, by content hash."""
        return {picture.sha256: picture.image for picture in self.pictures if picture.sha256 not in self.sample.images}

    def budget(self) -> int:
        """Return the number of tokens that the next turn may have."""
        return min(self.config.max_turn_tokens, self.config.max_tokens - self.stream.expanded_length)

    def feed(
        self, token_ids: Sequence[int], logprobs: Sequence[float], finish_reason: str, weights: str
    ) -> PendingCall | None:
        """Append a turn as the engine returned it; its last token is <|im_end|> unless the token limit came first.

        Returns a call whose outcome observe() must get before the next turn. Returns None if the episode has ended, or
        if the turn was malformed and an error was appended for the model. Tokens that break the engine's contract end
        the episode as FAILED.
        """
        assert self.stop is None and self._called is None, "no turn is due"
        complete = bool(token_ids) and token_ids[-1] == self.codec.end
        try:
            if not complete and finish_reason != "length":
                raise TokenError(f"The engine ended a turn ({finish_reason}) without <|im_end|>: {list(token_ids)}.")
            self.stream.append_sampled(token_ids, logprobs)
        except TokenError as error:
            self.fail(str(error))
            self.refused = True
            return None
        if weights not in self._weights[-1:]:
            self._weights.append(weights)
        written = self.codec.turn_start + self.codec.decode(token_ids[:-1] if complete else token_ids)
        return self.read(written, complete=complete, tokens=len(token_ids), weights=weights)

    def tell(self, content: Content, picture: Picture | None) -> bool:
        """Append a message as an observation, if a token of the next turn has room as well."""
        ids, slots = self.codec.observation(content), [picture.slot] if picture else []
        needed = expanded_length(ids, slots, self.codec.image) + 1
        if needed > self.config.max_tokens - self.stream.expanded_length:
            return False
        self.stream.append_observation(ids, slots)
        return super().tell(content, picture)

    def trajectory(self) -> Trajectory:
        """Return the row of an ended episode; its `weights` are the versions seen, joined by ">" if they changed."""
        assert self.stop is not None, "the episode goes on"
        return Trajectory(
            trajectory_id=f"{self.group_id}-{self.index}",
            sample_id=self.sample.sample_id,
            group_id=self.group_id,
            index=self.index,
            policy=self.policy,
            tokens=tuple(self.stream.ids),
            roles=tuple(ROLES.index(role) for role in self.stream.roles),
            logprobs=tuple(self.stream.logprobs),
            images=tuple(self.stream.images),
            grids=tuple(self.stream.grids),
            turns=tuple(self.turns),
            answer=self.answer,
            stop=self.stop,
            error=self.error,
            weights=">".join(self._weights),
            sizes=tuple(picture.view.size for picture in self.pictures),
            coordinates=self.config.unit,
        )


def play_script(episode: Episode, turns: Sequence[str]) -> Trajectory:
    """Feed written turns as if they were sampled (log-probability 0), tools and limits included.

    Returns the trajectory with the token stream of a policy that samples these texts. Where the chat template opens a
    thought, a turn goes on from there (Protocol.follow). It is FAILED if the script does not end with the episode.
    Raises UserError for a tool that breaks.
    """
    for number, turn in enumerate(turns):
        if episode.stop is not None:
            episode.fail(f"The script goes on after turn {number}, which ended the conversation ({episode.stop}).")
            break
        budget = episode.budget()
        ids = [*episode.codec.encode(episode.protocol.follow(turn, episode.codec.turn_start)), episode.codec.end]
        finish = "stop" if len(ids) <= budget else "length"
        if pending := episode.feed(ids[:budget], [0.0] * len(ids[:budget]), finish, "scripted"):
            try:
                outcome = pending.run()
            except Exception as error:  # a tool of ours or of the user's is broken
                message = f"The tool {pending.call.name} broke: {describe_error(error)}."
                raise UserError(message, hint=f"It was called with {dump_args(pending.call.args)}.") from error
            episode.observe(outcome)
    if episode.stop is None:
        episode.fail("The script ends before the conversation does.")
    return episode.trajectory()


def find_excess(length: int, images: int, conversation: ConversationConfig) -> str | None:
    """Return the reason why a prompt of so many tokens and images can never be asked; None where it can."""
    if images > conversation.max_images:
        return f"The sample has {images} images, conversation.max_images is {conversation.max_images}."
    if length >= conversation.max_tokens:
        return f"The prompt has {length} tokens, conversation.max_tokens is {conversation.max_tokens}."
    return None


def measure_prompt(sample: Sample, sizes: Sequence[tuple[int, int]], spec: ConversationSpec) -> int:
    """Return the number of tokens of a sample's prompt, images expanded. sizes: those that the model sees."""
    prompt = render_prompt(sample, sizes, spec.conversation, spec.codec)
    return len(prompt) + sum(spec.view.count_tokens(size) - 1 for size in sizes)


def render_prompt(
    sample: Sample | Chat, sizes: Sequence[tuple[int, int]], conversation: ConversationConfig, codec: Codec
) -> list[int]:
    """Return the compact ids of the first prompt: the system's, the images, and the text of the question.

    Those of a chat go on with each reply and the user's next message.
    """
    system = render_system_prompt(conversation)
    if isinstance(sample, Chat):
        first, *rest = sample.contents(sizes, conversation.unit)
        protocol = load_protocol(conversation.form)
        replies = [protocol.follow(turn, codec.turn_start) for turn in sample.turns(protocol)]
        return codec.prompt(system, first, list(zip(replies, rest, strict=True)))
    content = [IMAGE_PART] * len(sizes) + [text_part(state_question(sample, sizes, conversation.unit))]
    return codec.prompt(system, content)


def render_system_prompt(conversation: ConversationConfig) -> str:
    """Return the user's own system prompt, or the one that describes protocol and tools."""
    if conversation.system is not None:
        return conversation.system
    return _default_system(conversation.form, conversation.tools, conversation.unit)


@cache
def _default_system(protocol: str, tools: tuple[str, ...] | None, coordinates: Coordinates) -> str:
    return load_protocol(protocol).system(tuple(toolbox.load_tools(tools).values()), coordinates)


def derive_seed(policy: str, sample_id: str, index: int, turn: int) -> int:
    """Return the sampling seed of a turn, in [0, 2**63)."""
    identity = json.dumps([policy, sample_id, index, turn]).encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:8]) >> 1
