"""Episode: one conversation as a state machine without I/O."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

from PIL import Image

from thinkimg.conversation.codec import Codec
from thinkimg.conversation.picture import Picture, make_picture, model_view_size
from thinkimg.conversation.protocol import IMAGE_PART, Answer, Content, Malformed, ToolCall, load_protocol, text_part
from thinkimg.conversation.question import state_question, state_size
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.conversation.tokens import ROLES, TokenError, TokenStream, expanded_length
from thinkimg.errors import UserError, describe_error
from thinkimg.images import toolbox
from thinkimg.images.settings import ViewLimits
from thinkimg.images.tool import Tool
from thinkimg.records import CallStatus, Coordinates, Sample, StopReason, Trajectory, Turn, TurnKind


@dataclass(frozen=True)
class Outcome:
    """Result of a tool call, and the picture of its image if it has one."""

    result: toolbox.ToolResult
    picture: Picture | None = None


@dataclass(frozen=True)
class PendingCall:
    """Tool call that waits to be run: pure CPU work, for a pool of threads."""

    call: ToolCall
    images: tuple[Image.Image, ...]
    tools: Mapping[str, Tool]
    limits: ViewLimits
    coordinates: Coordinates

    def run(self) -> Outcome:
        """Run the tool. A wrong call is an outcome with an error; an exception is a bug (see Episode.fail)."""
        if not self.tools or not self.images:
            missing = "images" if self.tools else "tools"
            error = f"There are no {missing} here; give an answer."
            return Outcome(toolbox.ToolResult(len(self.images) - 1, error=error))
        sizes = partial(model_view_size, limits=self.limits)
        result = toolbox.run_tool(self.call.name, self.call.args, self.images, sizes, self.tools, self.coordinates)
        return Outcome(result, make_picture(result.image, self.limits) if result.image else None)


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


class Episode:
    """Conversation about one sample.

    While `stop` is None: send `prompt_ids` and `view_images` for at most budget() tokens, sampled with
    derive_seed(policy, sample_id, index, len(turns)). Check the engine's prompt with stream.check, and feed() the
    sampled tokens. If that returns a call, run() it and observe() its outcome. At the end trajectory() is the row, and
    `made_images` are the images of its tools.

    pictures: the sample's images in order, which its episodes share. policy: digest of the policy that plays. group_id,
    index: the group of rollouts, and the number in it. A prompt beyond the limits fails at once.
    """

    def __init__(
        self,
        sample: Sample,
        pictures: Sequence[Picture],
        spec: ConversationSpec,
        *,
        policy: str,
        group_id: str,
        index: int,
    ) -> None:
        assert [picture.sha256 for picture in pictures] == list(sample.images), "the pictures must be the sample's"
        self.sample, self.policy, self.group_id, self.index = sample, policy, group_id, index
        self.config, self.view, self.codec = spec.conversation, spec.view, spec.codec
        self.protocol = load_protocol(self.config.form)
        self.tools = toolbox.load_tools(self.config.tools)
        self.pictures = list(pictures)
        self.turns: list[Turn] = []
        self.answer: str | None = None
        self.stop: StopReason | None = None
        self.error: str | None = None
        self.refused = False
        """True if the engine or a tool failed on it, so that it is played a second time."""
        self.passing = False
        """True if machine or network failed (errors.is_passing), so that it never becomes a row."""
        self._weights: list[str] = []
        self._called: Turn | None = None  # the turn whose call is pending
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
        turn = Turn(written, TurnKind.MALFORMED, tokens=len(token_ids), weights=weights)
        if not complete:
            self._end(StopReason.TRUNCATED, replace(turn, error="The turn reached its token limit."))
            return None
        match self.protocol.parse(written):
            case Answer(answer):
                self.answer = answer
                self._end(StopReason.ANSWER, replace(turn, kind=TurnKind.ANSWER))
                return None
            case Malformed(reason):
                message = f"Error: {reason}"
                self._reply(replace(turn, error=reason, observation=message), [text_part(message)])
                return None
            case ToolCall(name, args) as call:
                self._called = replace(turn, kind=TurnKind.TOOL, tool=name, args=dump_args(args))
                images = tuple(picture.image for picture in self.pictures)
                return PendingCall(call, images, self.tools, self.view, self.config.unit)

    def observe(self, outcome: Outcome) -> None:
        """Append the outcome of the call that feed() returned, as an observation for the model."""
        turn, result, new = self._called, outcome.result, outcome.picture
        assert turn is not None, "no call is pending"
        self._called = None
        turn = replace(turn, source=result.source if self.pictures else None)
        error = result.error
        if new and len(self.pictures) >= self.config.max_images:
            error = f"No more than {self.config.max_images} images can be shown; give an answer."
        if error:
            message = f"Error: {error}"
            turn = replace(turn, status=CallStatus.ERROR, error=error, observation=message)
            self._reply(turn, self.protocol.observation(message, image=False))
        elif new:
            twin = next((picture for picture in self.pictures if picture.sha256 == new.sha256), None)
            message = state_size(len(self.pictures), new.view.size, self.config.unit)
            status = CallStatus.DUPLICATE if twin else CallStatus.OK
            turn = replace(turn, status=status, image=new.sha256, observation=message)
            self._reply(turn, self.protocol.observation(message, image=True), twin or new)
        else:
            turn = replace(turn, status=CallStatus.OK, observation=result.text)
            self._reply(turn, self.protocol.observation(result.text, image=False))

    def _reply(self, turn: Turn, content: Content, new: Picture | None = None) -> None:
        ids, slots = self.codec.observation(content), [new.slot] if new else []
        needed = expanded_length(ids, slots, self.codec.image) + 1
        last = len(self.turns) + 1 == self.config.max_turns
        if needed > self.config.max_tokens - self.stream.expanded_length:
            # The model does not see the result, so the row has none: a turn's image is always one of the stream's.
            status = turn.status and CallStatus.ERROR
            error = turn.error or "The conversation has no room for the result."
            turn = replace(turn, status=status, error=error, image=None, observation=None)
            return self._end(StopReason.MAX_TURNS if last else StopReason.MAX_TOKENS, turn)
        self.stream.append_observation(ids, slots)
        self.pictures += [new] if new else []
        self.turns.append(turn)
        self.stop = StopReason.MAX_TURNS if last else None

    def _end(self, stop: StopReason, turn: Turn) -> None:
        self.turns.append(turn)
        self.stop = stop

    def fail(self, error: str) -> None:
        """End the episode as FAILED, with an error of engine, tool or tokens in its row."""
        if self._called:
            self.turns.append(replace(self._called, status=CallStatus.ERROR, error=error))
            self._called = None
        self.stop, self.error, self.answer = StopReason.FAILED, error, None

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
    sample: Sample, sizes: Sequence[tuple[int, int]], conversation: ConversationConfig, codec: Codec
) -> list[int]:
    """Return the compact ids of the first prompt: the system's, the images, and the text of the question."""
    content = [IMAGE_PART] * len(sizes) + [text_part(state_question(sample, sizes, conversation.unit))]
    return codec.prompt(render_system_prompt(conversation), content)


def render_system_prompt(conversation: ConversationConfig) -> str:
    """Return the user's own system prompt, or the one that describes protocol and tools."""
    if conversation.system is not None:
        return conversation.system
    return _default_system(conversation.form, conversation.tools, conversation.unit)


@cache
def _default_system(protocol: str, tools: tuple[str, ...] | None, coordinates: Coordinates) -> str:
    return load_protocol(protocol).system(tuple(toolbox.load_tools(tools).values()), coordinates)


def dump_args(args: dict[str, Any]) -> str:
    """Return the arguments as JSON, equal for equal arguments."""
    return json.dumps(args, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def derive_seed(policy: str, sample_id: str, index: int, turn: int) -> int:
    """Return the sampling seed of a turn, in [0, 2**63)."""
    identity = json.dumps([policy, sample_id, index, turn]).encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:8]) >> 1
