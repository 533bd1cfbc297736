"""Text core of a conversation: turns are parsed, tools run, and results become messages; no tokens.

    text of a turn ──► read ──► PendingCall.run ──► Outcome ──► observe ──► tell ──► the model

Training, evaluation and endpoint play it with a token stream (episode.Episode). Adapters to other frameworks, which
keep tokens of their own, play it as it is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image

from thinkimg.conversation.picture import Picture, make_picture, model_view_size
from thinkimg.conversation.protocol import Answer, Content, Malformed, ToolCall, load_protocol, text_part
from thinkimg.conversation.question import state_size
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.images import toolbox
from thinkimg.images.settings import ViewLimits
from thinkimg.images.tool import Tool
from thinkimg.records import CallStatus, Coordinates, StopReason, Turn, TurnKind


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
        """Run the tool. A wrong call is an outcome with an error; an exception is a bug (see TextCore.fail)."""
        if not self.tools or not self.images:
            missing = "images" if self.tools else "tools"
            error = f"There are no {missing} here; give an answer."
            return Outcome(toolbox.ToolResult(len(self.images) - 1, error=error))
        sizes = partial(model_view_size, limits=self.limits)
        result = toolbox.run_tool(self.call.name, self.call.args, self.images, sizes, self.tools, self.coordinates)
        return Outcome(result, make_picture(result.image, self.limits) if result.image else None)


class TextCore:
    """Conversation as texts and pictures.

    While `stop` is None: read() a turn of the model. If that returns a call, run() it and observe() its outcome. Each
    message to the model goes through tell(); the latest is `message`.

    pictures: those of the question, in order. view: sizes at which the model sees images.
    """

    def __init__(self, pictures: Sequence[Picture], config: ConversationConfig, view: ViewLimits) -> None:
        self.config, self.view = config, view
        self.protocol = load_protocol(config.form)
        self.tools = toolbox.load_tools(config.tools)
        self.pictures = list(pictures)
        self.turns: list[Turn] = []
        self.message: Content = []
        self.answer: str | None = None
        self.stop: StopReason | None = None
        self.error: str | None = None
        self.refused = False
        """True if the engine or a tool failed on it, so that it is played a second time."""
        self.passing = False
        """True if machine or network failed (errors.is_passing), so that it never becomes a row."""
        self._called: Turn | None = None  # the turn whose call is pending

    def read(
        self, written: str, *, complete: bool = True, tokens: int = 0, weights: str | None = None
    ) -> PendingCall | None:
        """Take the text of a turn. complete: False where a token limit cut it off. tokens, weights: as in Turn.

        Returns a call whose outcome observe() must get before the next turn. Returns None if the conversation has
        ended, or if the turn was malformed and the model was told so.
        """
        assert self.stop is None and self._called is None, "no turn is due"
        turn = Turn(written, TurnKind.MALFORMED, tokens=tokens, weights=weights)
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
        """Tell the model the outcome of the call that read() returned."""
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

    def tell(self, content: Content, picture: Picture | None) -> bool:
        """Show the model a message, with the picture that stands in it; False, and nothing is shown, without room."""
        self.message = content
        return True

    def _reply(self, turn: Turn, content: Content, new: Picture | None = None) -> None:
        last = len(self.turns) + 1 == self.config.max_turns
        if not self.tell(content, new):
            return self._end(StopReason.MAX_TURNS if last else StopReason.MAX_TOKENS, withhold(turn))
        self.pictures += [new] if new else []
        self.turns.append(turn)
        self.stop = StopReason.MAX_TURNS if last else None

    def _end(self, stop: StopReason, turn: Turn) -> None:
        self.turns.append(turn)
        self.stop = stop

    def fail(self, error: str) -> None:
        """End the conversation as FAILED, with an error of engine, tool or tokens."""
        if self._called:
            self.turns.append(replace(self._called, status=CallStatus.ERROR, error=error))
            self._called = None
        self.stop, self.error, self.answer = StopReason.FAILED, error, None


def withhold(turn: Turn) -> Turn:
    """Return a turn whose result the model does not see: a turn's image is always one that was shown."""
    status, error = turn.status and CallStatus.ERROR, turn.error or "The conversation has no room for the result."
    return replace(turn, status=status, error=error, image=None, observation=None)


def dump_args(args: dict[str, Any]) -> str:
    """Return the arguments as JSON, equal for equal arguments."""
    return json.dumps(args, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
