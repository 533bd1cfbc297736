"""Replies in OpenAI's form: the answer, the turns that led to it as reasoning, and their pictures."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from thinkimg.conversation.episode import Episode
from thinkimg.conversation.text_core import TextCore
from thinkimg.images.coordinates import Frame
from thinkimg.records import Role, Turn, TurnKind
from thinkimg.serving.body import Question
from thinkimg.tracking.traces import draw_box, image_content

NO_ANSWER = "?"
"""Content without an answer. Evaluators take the letters of a word such as "none" for a choice, and retry nothing."""
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": the policy is at work\n\n"


class Reply:
    """Reply to one question, from the turns as they end."""

    def __init__(self, episode: Episode, question: Question) -> None:
        self.episode, self.question = episode, question
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": question.model}
        self._reasoning = ""
        self._images: list[dict[str, Any]] = []

    def add(self, turn: Turn) -> dict[str, Any]:
        """Take a turn, and return it as the delta of a stream."""
        text = ("\n\n" if self._reasoning else "") + turn_text(turn)
        images = draw_turn(self.episode, turn) if self.question.pictures else []
        parts = {"turn": describe_turn(self.episode, turn)} if self.question.pictures else {}
        self._reasoning += text
        self._images += images
        return say(text) | parts | ({"images": images} if images else {})

    def completion(self) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        content, reason = self._finish()
        message = {"role": "assistant", "content": content, **say(self._reasoning)}
        if self.question.pictures:
            message["images"] = self._images
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": self._usage()}

    def chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        """Return a delta as an event."""
        usage = {"usage": None} if self.question.stream_usage else {}
        return event(self._chunk([{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]) | usage)

    def last_chunks(self) -> Iterator[bytes]:
        """Yield the events after the last turn: the answer, the reason for the end, the usage if wanted."""
        content, reason = self._finish()
        yield self.chunk({"content": content})
        yield self.chunk({}, reason)
        if self.question.stream_usage:
            yield event(self._chunk([]) | {"usage": self._usage()})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": choices}

    def _finish(self) -> tuple[str, str]:
        """Return (content, finish_reason); the content is never empty."""
        answer, limit = self.episode.answer, self.question.answer_tokens
        if answer is None:
            return NO_ANSWER, "length"
        ids = self.episode.codec.encode(answer)
        if limit is None or len(ids) <= limit:
            return answer, "stop"
        # A token may hold a part of a character.
        return self.episode.codec.decode(ids[:limit]).rstrip("\ufffd").strip() or NO_ANSWER, "length"

    def _usage(self) -> dict[str, Any]:
        """Return the tokens: sampled ones are the completion's, all others, images expanded, the prompt's."""
        stream = self.episode.stream
        sampled = sum(role is Role.SAMPLED for role in stream.roles)
        shown = min(sampled, len(self.episode.codec.encode(self.episode.answer or "")))
        return {
            "prompt_tokens": stream.expanded_length - sampled,
            "completion_tokens": sampled,
            "total_tokens": stream.expanded_length,
            "completion_tokens_details": {"reasoning_tokens": sampled - shown},
        }


def say(text: str) -> dict[str, Any]:
    """Return reasoning under both names that clients read."""
    return {"reasoning_content": text, "reasoning": text}


def turn_text(turn: Turn) -> str:
    """Return a turn as text: what the policy wrote, and what came back."""
    return "\n".join(filter(None, [turn.text, turn.observation]))


def describe_turn(core: TextCore, turn: Turn) -> dict[str, Any]:
    """Return a turn in its parts. thought: None where the turn breaks the protocol, and `text` is all there is."""
    parts = core.protocol.split(turn.text.strip()) if turn.kind is not TurnKind.MALFORMED else None
    return {
        "text": turn.text,
        "thought": parts[0].strip() if isinstance(parts, tuple) else None,
        "tool": turn.tool,
        "args": json.loads(turn.args) if turn.args is not None else None,
        "observation": turn.observation,
        "error": turn.error,
    }


def draw_turn(core: TextCore, turn: Turn) -> list[dict[str, Any]]:
    """Return the pictures of a turn that has just ended: its source with the box that was cut out, then the result."""
    if turn.image is None:
        return []
    assert turn.source is not None and turn.args is not None
    source, tool = core.pictures[turn.source], core.tools[turn.tool or ""]
    parts = [image_content(core.pictures[-1].image)]
    box = tool.cut(json.loads(turn.args), core.config.unit.extent(source.view.size))
    if box:
        frame = Frame(source.image.size, source.view.size, core.config.unit)
        parts.insert(0, image_content(draw_box(source.image, frame.box_to_full(box))))
    return parts


def event(body: dict[str, Any]) -> bytes:
    """Return a body as an event of a stream."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"
