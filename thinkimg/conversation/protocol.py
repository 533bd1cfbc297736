"""Protocols of a turn: they parse the model's untrusted text, render turns, and describe themselves to the model."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from thinkimg.errors import UserError
from thinkimg.images.tool import IMAGE_ARGUMENT, Tool
from thinkimg.records import Coordinates
from thinkimg.registry import Registry

PROTOCOLS = Registry("protocols", "thinkimg.conversation.protocols")
"""Each defines `PROTOCOL`, an instance of a Protocol."""

MAX_BRACKETS = 100  # of a call: a fixed limit on nesting, since Python's own depends on the caller's stack
MAX_DIGITS = 20  # of an integer in a call

UNITS = {
    Coordinates.PIXELS: "Coordinates are pixels of an image as you see it, at the size stated with it, "
    "from its top left corner.",
    Coordinates.THOUSANDTHS: "Coordinates, and a box's width and height, are thousandths of an image's sides: "
    "x=0, y=0 is its top left corner, x=1000, y=1000 its bottom right one.",
}
"""Unit of coordinates -> the sentence of the system prompt that explains it."""

Content = list[dict[str, str]]
"""Parts of a message in the chat template's form: IMAGE_PART, or text_part(…)."""
IMAGE_PART = {"type": "image"}
OPEN_THOUGHT, CLOSE_THOUGHT = "<think>", "</think>"


def text_part(value: str) -> dict[str, str]:
    """Return a text as a part of a message."""
    return {"type": "text", "text": value}


@dataclass(frozen=True)
class ToolCall:
    """Call as the model wrote it: any name, any JSON object of finite numbers and valid Unicode."""

    name: str
    args: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """Final answer of a conversation."""

    text: str
    """Not empty, without white space around."""


@dataclass(frozen=True)
class Malformed:
    """Turn that breaks the protocol."""

    reason: str
    """Sentence that tells the model how to correct itself; quotes nothing of its text."""


NO_END = Malformed("The thought never ends; close it with </think>, then write a call or an answer.")


class Protocol(ABC):
    """Form of a turn: a thought, then exactly one call or one answer, and nothing after it."""

    open_call: ClassVar[str]
    close_call: ClassVar[str]
    args_key: ClassVar[str]
    call_form: ClassVar[str]
    """Call as shown to the model, on one line."""
    turn_form: ClassVar[str]
    """Thought before the call or answer, as shown to the model."""

    @property
    def call_example(self) -> str:
        """Call as shown in the system prompt."""
        return self.call_form

    @property
    def tags(self) -> tuple[str, str, str, str]:
        """Opening and closing tag of a call, and of an answer."""
        return self.open_call, self.close_call, "<answer>", "</answer>"

    @abstractmethod
    def split(self, turn: str) -> tuple[str, str] | Malformed:
        """Return (thought, rest) of a turn without white space around; the thought may hold none of the tags."""

    @abstractmethod
    def render_thought(self, thought: str) -> str:
        """Return a thought as the beginning of a turn."""

    @abstractmethod
    def render_call(self, name: str, args: dict[str, Any]) -> str:
        """Return a call as the end of a turn."""

    @abstractmethod
    def observation(self, value: str, *, image: bool) -> Content:
        """Return a tool's result as the content of a user's message; an image precedes the text."""

    def parse(self, turn: str) -> ToolCall | Answer | Malformed:
        """Parse a turn, in time linear in its length. Never raises, whatever the text is."""
        if not is_unicode(turn):
            return Malformed("Write valid Unicode text only.")
        parts = self.split(turn.strip())
        if isinstance(parts, Malformed):
            return parts
        thought, rest = parts
        form = f"After the thought write exactly one {self.call_form} or one <answer>…</answer>, and nothing else."
        for opening, closing in (self.tags[:2], self.tags[2:]):
            if rest.startswith(opening) and rest.endswith(closing):
                body = rest[len(opening) : -len(closing)]
                if any(tag in part for tag in self.tags for part in (thought, body)):
                    return Malformed(form)
                return self.parse_call(body) if opening == self.open_call else parse_answer(body)
        return Malformed(form)

    def parse_call(self, body: str) -> ToolCall | Malformed:
        """Parse the text between a call's tags, in time linear in its length. Never raises."""
        try:
            call = parse_json(body)
        except ValueError as error:
            return Malformed(f"The call is not valid JSON ({error}); write {self.call_form}.")
        if not isinstance(call, dict) or call.keys() != {"name", self.args_key}:
            return Malformed(f'The call must have exactly "name" and "{self.args_key}"; write {self.call_form}.')
        name, args = call["name"], call[self.args_key]
        if not isinstance(name, str) or not isinstance(args, dict):
            return Malformed(f'"name" must be a string and "{self.args_key}" an object; write {self.call_form}.')
        return ToolCall(name, args)

    def render_turn(self, thought: str, action: ToolCall | Answer) -> str:
        """Return the turn that parses as `action`; thought and answer must hold none of the protocol's tags."""
        if isinstance(action, ToolCall):
            turn = self.render_thought(thought) + self.render_call(action.name, action.args)
        else:
            turn = f"{self.render_thought(thought)}<answer>{action.text}</answer>"
        assert self.parse(turn) == action, f"the turn parses as another action: {turn}"
        return turn

    def follow(self, turn: str, start: str) -> str:
        """Return the rest of a written turn after `start`, an opened thought or nothing (Codec.turn_start).

        The thought is closed where the turn has it without tags: after an opened thought the model must close it.
        """
        if not start or turn.startswith(start):
            return turn.removeprefix(start)
        if turn.startswith(OPEN_THOUGHT):
            return turn.removeprefix(OPEN_THOUGHT).lstrip("\n")
        parts = self.split(turn.strip())
        if isinstance(parts, Malformed) or CLOSE_THOUGHT in turn or not parts[1]:
            return turn
        thought, rest = parts
        return f"{thought.rstrip()}\n{CLOSE_THOUGHT}\n\n{rest}".lstrip("\n")

    def system(self, tools: Sequence[Tool], coordinates: Coordinates = Coordinates.PIXELS) -> str:
        """Return the default system prompt, which describes the protocol, the coordinates and every tool."""
        answer = f"{self.turn_form}<answer>your answer</answer>"
        if not tools:
            return f"Answer the question about the image. Think first, then answer, and write nothing else:\n{answer}"
        lines = [
            "Answer the question about the image. Think first, then call one tool or answer, and write nothing else:",
            f"{self.turn_form}{self.call_example}",
            answer,
            "The result of a call is shown to you as the next image.",
            UNITS[coordinates],
            f"Every tool also takes {IMAGE_ARGUMENT}.",
            "Tools:",
        ]
        return "\n".join(lines + [f"- {tool.signature()}: {' '.join(tool.description.split())}" for tool in tools])


def load_protocol(name: str) -> Protocol:
    """Return the protocol of that name or import path. Raises UserError where there is none."""
    protocol = PROTOCOLS.member(name, "PROTOCOL")
    if not isinstance(protocol, Protocol):
        raise UserError(f"The PROTOCOL of {name} is no Protocol.", hint="PROTOCOL = Mine(), of class Mine(Protocol)")
    return protocol


def parse_answer(body: str) -> Answer | Malformed:
    """Parse the text between the answer's tags."""
    answer = body.strip()
    return Answer(answer) if answer else Malformed("The answer is empty; write it between <answer> and </answer>.")


def render_json(name: str, args_key: str, args: dict[str, Any]) -> str:
    """Return a call as JSON in which no value can be taken for a tag."""
    # "<" occurs in strings only.
    return json.dumps({"name": name, args_key: args}, ensure_ascii=False).replace("<", "\\u003c")


def parse_json(body: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, with a reason fit for the model, if it is not plain JSON.

    Refused are NaN, Infinity, numbers that overflow, integers of many digits, a key twice, lone surrogates, deep
    nesting.
    """
    if body.count("[") + body.count("{") > MAX_BRACKETS:
        raise ValueError("too many brackets")
    value = json.loads(
        body, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_integer
    )
    if not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise ValueError("a string is not valid Unicode")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _constant(literal: str) -> float:
    raise ValueError(f"{literal} is no number in JSON")


def _float(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _integer(literal: str) -> int:
    if len(literal.lstrip("-")) > MAX_DIGITS:
        raise ValueError("a number has too many digits")
    return int(literal)


def is_unicode(value: str) -> bool:
    """Tell whether a text can be stored as UTF-8: json.loads makes lone surrogates from escapes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
