"""System prompt of stored conversations: as their settings or their tokens have it, else rendered anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from thinkimg.config.load import describe_mistake
from thinkimg.conversation.codec import END, Codec
from thinkimg.conversation.episode import render_system_prompt
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.errors import UserError
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import Episodes
from thinkimg.tracking.records import LoopRecord

LEARNED = ("rollouts", "demonstrations")
"""Roles of the conversations that a policy was trained on."""


@dataclass(frozen=True)
class SystemPrompt:
    """System prompt of some conversations."""

    text: str
    is_stored: bool
    """False where this version of thinkimg rendered it: the tools' descriptions may have been others then."""


def find_system_prompt(
    loop: LoopRecord | None, conversation: Mapping[str, Any], episodes: Episodes | None, vocabulary: Path | None
) -> SystemPrompt:
    """Return the system prompt that a policy saw: the user's own, that of stored tokens, or the loop's.

    loop: as `find_loop` returns it. conversation: recorded settings. episodes: the conversations. vocabulary: directory
    of their tokenizer. Raises UserError where the prompt has to be rendered anew and can't be.
    """
    if conversation.get("system") is not None:
        return SystemPrompt(conversation["system"], is_stored=True)
    text = None
    if episodes is not None and vocabulary is not None:
        text = read_stored_prompt(episodes, vocabulary, conversation.get("thinking"))
    if text is None and loop is not None:
        text = loop.system
    return SystemPrompt(render_recorded(conversation), is_stored=False) if text is None else SystemPrompt(text, True)


def read_stored_prompt(episodes: Episodes, vocabulary: Path, thinking: bool | None) -> str | None:
    """Return the system prompt in the tokens of the first conversation; None where it can't be read."""
    if episodes.dropped or not episodes.has_table("trajectories"):
        return None
    try:
        codec = Codec.load(vocabulary, thinking=thinking)
        tokens = next((row["tokens"] for row in episodes.rows(["tokens"]) if codec.end in row["tokens"]), None)
        return None if tokens is None else decode_system_prompt(tokens, codec)
    except UserError:  # a damaged file, a template of another form
        return None


def decode_system_prompt(tokens: Sequence[int], codec: Codec) -> str | None:
    """Return the system prompt at the beginning of compact ids; None where the chat template begins otherwise."""
    _, before, after = codec.frame_system()
    message = codec.decode(tokens[: tokens.index(codec.end)])
    return message.removeprefix(before) if message.startswith(before) and after.startswith(END) else None


def render_recorded(conversation: Mapping[str, Any]) -> str:
    """Return the system prompt of recorded settings, as this version of thinkimg and of the tools renders it.

    Raises UserError for a protocol or a tool that is not on this machine, and for a setting that this version lacks.
    """
    try:
        return render_system_prompt(ConversationConfig(**conversation))
    except ValidationError as error:
        mistake = dict(error.errors()[0])
        mistake["loc"] = ("conversation", *mistake["loc"])
        message, hint = describe_mistake(mistake, {"conversation": conversation})
        if mistake["type"] != "value_error":
            hint = "Another version of thinkimg recorded it: take that version."
        raise UserError(f"The recorded system prompt can't be rendered: {message}", hint=hint) from None


def find_vocabulary(store: Store, episodes: Episodes) -> Path | None:
    """Return the tokenizer's directory of the policy that played or learned from conversations; None for none.

    Raises UserError where it is damaged.
    """
    for policy in store.list("policy"):
        played = "policy" in episodes.inputs and episodes.inputs["policy"].digest == policy.digest
        learned = any(role in policy.inputs and policy.inputs[role].digest == episodes.digest for role in LEARNED)
        names = [name for name in policy.files if name.endswith("/tokenizer.json")]
        if (played or learned) and names and not policy.dropped:
            return policy.checked(names[0]).parent
    return None
