"""Conversations of data sets: turns with their roles, and the question and answer that a record holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thinkimg.data.records.values import PLACEHOLDER, final_answer, refuse
from thinkimg.data.texts.literals import read_literal

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "bot": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
"""Role of a turn by the name that a data set gives to it."""
CALLS = ("<tool_call>", "<code>", "<grounding>", '"actions"')
"""Marks of a call of a tool, which is no answer."""


@dataclass(frozen=True)
class Turn:
    """Turn of a conversation. text: with `<image>` at the place of each image."""

    role: str
    text: str
    images: tuple[Any, ...] = ()
    """Images that the turn itself holds."""


@dataclass(frozen=True)
class Exchange:
    """Question and answer of a conversation."""

    question: str
    answer: str | None
    images: tuple[Any, ...] = ()
    """Images that the question itself holds."""
    is_trajectory: bool = field(default=False)
    """True where the answer follows calls of tools, whose results have images of their own."""


def read_turns(value: Any) -> tuple[Turn, ...]:
    """Return the turns of messages (role, content) or of a sharegpt conversation (from, value); also from a text.

    Raises RowRefused for anything else.
    """
    value = read_literal(value)
    if isinstance(value, str):
        return (Turn("user", value),)
    if not isinstance(value, list | tuple) or not value:
        raise refuse("the conversation is no list of turns")
    return tuple(_read_turn(turn) for pair in value for turn in _split_pair(pair))


def is_conversation(value: Any) -> bool:
    """Tell whether a value is a list of turns, or a text that holds one."""
    value = read_literal(value)
    first = _split_pair(value[0])[0] if isinstance(value, list | tuple) and value else None
    return isinstance(first, Mapping) and _role(first) != ""


def read_exchange(turns: tuple[Turn, ...]) -> Exchange:
    """Return the question and the answer of a conversation; answer is None where no assistant speaks.

    Where tools are called in between, the answer is the last turn's. Raises RowRefused where there are several
    questions, or none.
    """
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken or spoken[0].role != "user":
        raise refuse("the conversation does not begin with a question")
    question, replies = spoken[0], [turn for turn in spoken if turn.role == "assistant"]
    if not replies:
        if len(spoken) > 1:
            raise refuse(f"the prompt has {len(spoken)} turns of the user, not one")
        return Exchange(question.text, None, question.images)
    if spoken[-1].role != "assistant":
        raise refuse("the conversation does not end with an answer")
    users = sum(turn.role == "user" for turn in spoken)
    tagged = ["<answer>" in turn.text for turn in replies]
    called = [any(mark in turn.text for mark in CALLS) for turn in replies]
    is_trajectory = len(spoken) > 2
    has_one_answer = all(called[:-1]) or (tagged[-1] and sum(tagged) == 1)
    if spoken[1].role != "assistant" or (users > 1 and not has_one_answer):
        raise refuse(f"the conversation has {len(replies)} answers to {users} questions, not one")
    if not tagged[-1] and called[-1]:
        raise refuse("the conversation ends with a call of a tool, not with an answer")
    return Exchange(question.text, final_answer(replies[-1].text), question.images, is_trajectory)


def images_of(exchange: Exchange, images: Any) -> Any:
    """Return those of a record's images that belong to the question; a trajectory has images of its tools, too.

    images: value of the image column; None where the turns hold them. Raises RowRefused where it is unclear.
    """
    if images is None:
        return list(exchange.images)
    count = exchange.question.count(PLACEHOLDER)
    if not exchange.is_trajectory or not isinstance(images, list | tuple) or len(images) == 1:
        return images
    if not 0 < count <= len(images):
        raise refuse(f"it is unclear which of {len(images)} images belong to the question")
    return list(images[:count])


def _role(turn: Mapping[str, Any]) -> str:
    name = turn.get("role") or turn.get("from")
    return ROLES.get(name.lower(), "") if isinstance(name, str) else ""


def _split_pair(turn: Any) -> tuple[Any, ...]:
    """Return the turns of an object with the texts of two, `{user, assistant}`; any other turn alone."""
    if isinstance(turn, Mapping) and isinstance(turn.get("user"), str) and isinstance(turn.get("assistant"), str):
        return tuple({"role": role, "content": turn[role]} for role in ("user", "assistant"))
    return (turn,)


def _read_turn(turn: Any) -> Turn:
    if not isinstance(turn, Mapping) or not (role := _role(turn)):
        raise refuse("a turn of the conversation has no role")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if content is None and role == "assistant":  # beside "tool_calls"
        return Turn(role, CALLS[0])
    if isinstance(content, str):
        return Turn(role, content + (CALLS[0] if turn.get("tool_calls") else ""))
    if not isinstance(content, list | tuple):
        raise refuse("a turn of the conversation has no text")
    texts, images = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and _is_image(part):
            texts.append(PLACEHOLDER)
            images += [image for name in ("image", "image_url", "url", "path") if (image := part.get(name))][:1]
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise refuse("a turn of the conversation holds something else than texts and images")
    return Turn(role, "\n".join(texts), tuple(images))


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("image", "image_url") or ("type" not in part and part.get("image") is not None)
