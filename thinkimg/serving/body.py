"""Bodies of requests: what a client sends, checked, and read as a question with its history."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from thinkimg.errors import shorten
from thinkimg.serving.refusal import Refusal

MAX_MESSAGES = 1000
"""Messages of a request, and parts of a message, at most."""
MAX_TEXT = 2**20
"""Characters of all texts, at most: more is no prompt that any model takes, and costs minutes to encode."""
MAX_VALUES = 2**18
"""Commas and opening brackets of a body, at most: 60 MiB of empty lists would stop the endpoint for 40 s. The base64 of
a picture has none of them."""
TOO_LONG = "context_length_exceeded"
"""OpenAI's code for what exceeds the conversation."""
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]


class Lenient(BaseModel):
    """Object whose unknown keys are accepted: clients send many."""

    model_config = ConfigDict(extra="ignore", strict=True)


class ImageUrl(Lenient):
    """Address of a picture."""

    url: str


class TextPart(Lenient):
    """Text within a message."""

    type: Literal["text"]
    text: Text


class ImagePart(Lenient):
    """Picture within a message."""

    type: Literal["image_url"]
    image_url: ImageUrl | str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class BodyMessage(Lenient):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=MAX_MESSAGES)] | None = None


class StreamOptions(Lenient):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class Body(Lenient):
    """Body of POST /v1/chat/completions, as far as it is heeded or refused."""

    model: str
    messages: Annotated[list[BodyMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(max_length=8)] | None = None
    n: Literal[1] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None


@dataclass(frozen=True)
class UserMessage:
    """Message of a user: its text, and the addresses of its pictures."""

    text: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """Request that can be played, if its pictures can be read."""

    model: str
    messages: tuple[UserMessage, ...]
    replies: tuple[str, ...]
    """Answers to all messages but the last, as the client has seen them."""
    temperature: float
    seed: int
    answer_tokens: int | None
    """Tokens of the answer that is shown, at most."""
    sampled_tokens: int | None
    """Tokens of all turns, at most."""
    stream: bool
    stream_usage: bool
    pictures: bool
    """Send the pictures of the turns."""


def read_body(content: bytes, names: Sequence[str]) -> Question:
    """Return the question in a request's body. names: of the model, the last of them with pictures.

    Raises Refusal.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise Refusal("The body has too many values.")
    try:
        body = Body.model_validate_json(content)
    except ValidationError as error:
        raise explain(error) from None
    if body.model not in names:
        message = f"The model {shorten(ascii(body.model), 80)} does not exist; there is {' and '.join(names)}."
        raise Refusal(message, status=404, param="model", code="model_not_found")
    messages, replies = read_messages(body.messages)
    return Question(
        model=body.model,
        messages=messages,
        replies=replies,
        temperature=body.temperature or 0.0,
        seed=body.seed or 0,
        answer_tokens=body.max_tokens,
        sampled_tokens=body.max_completion_tokens,
        stream=bool(body.stream),
        stream_usage=bool(body.stream_options and body.stream_options.include_usage),
        pictures=body.model == names[-1] or "image" in (body.modalities or ()),
    )


def read_messages(messages: Sequence[BodyMessage]) -> tuple[tuple[UserMessage, ...], tuple[str, ...]]:
    """Return the user's messages and the replies between them; the system's text goes before the first question.

    Raises Refusal where user and assistant do not take turns, or the last message is not the user's.
    """
    count = 0
    while count < len(messages) and messages[count].role in ("system", "developer"):
        count += 1
    system, turns = messages[:count], messages[count:]
    expected = ["user" if number % 2 == 0 else "assistant" for number in range(len(turns))]
    if [turn.role for turn in turns] != expected or len(turns) % 2 == 0:
        wanted = "Messages must be the system's, if any, then the user's and the assistant's in turn, the user's last."
        raise Refusal(wanted, param="messages")
    texts = [join_text(message) for message in [*system, *turns]]
    if sum(map(len, texts)) > MAX_TEXT:
        raise Refusal(f"The messages have more than {MAX_TEXT:,} characters.", param="messages", code=TOO_LONG)
    if any(list_images(message) for message in [*system, *turns[1::2]]):
        raise Refusal("Pictures belong into messages of the user.", param="messages")
    asked = texts[count:]
    asked[0] = "\n".join([*filter(None, texts[:count]), asked[0]])
    users = [UserMessage(text, tuple(list_images(turn))) for text, turn in zip(asked[::2], turns[::2], strict=True)]
    if not users[-1].text.strip() and not users[-1].images:
        raise Refusal("The last message is empty.", param="messages")
    return tuple(users), tuple(asked[1::2])


def join_text(message: BodyMessage) -> str:
    """Return the text of a message, its parts joined by line breaks."""
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content if isinstance(part, TextPart))
    return message.content or ""


def list_images(message: BodyMessage) -> list[str]:
    """Return the addresses of a message's pictures, in order."""
    parts = message.content if isinstance(message.content, list) else []
    urls = [part.image_url for part in parts if isinstance(part, ImagePart)]
    return [url if isinstance(url, str) else url.url for url in urls]


def explain(error: ValidationError) -> Refusal:
    """Return the refusal for the first mistake of a body."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = [str(step) for step in first["loc"]]
    if not path:
        return Refusal(f"The body is no JSON object of this form: {shorten(first['msg'])}.")
    unsupported = {
        "n": "Only n = 1 is supported.",
        "tools": "Tools of a client are not supported: the policy uses its own.",
        "functions": "Functions of a client are not supported: the policy uses its own tools.",
        "logprobs": "logprobs are not supported.",
    }
    if path[0] in unsupported and first["type"] != "missing":
        return Refusal(unsupported[path[0]], param=path[0], code="unsupported_parameter")
    return Refusal(f"{shorten('.'.join(path), 80)}: {shorten(first['msg'])}.", param=path[0])
