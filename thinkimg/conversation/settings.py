"""Settings of a conversation: protocol, tools and limits."""

from typing import Annotated

from pydantic import field_validator

from thinkimg.conversation.protocol import PROTOCOLS
from thinkimg.images.toolbox import load_tools, user_sources
from thinkimg.settings import EntryName, Positive, Settings


class ConversationConfig(Settings):
    """Protocol, tools and limits of a conversation."""

    protocol: Annotated[str, EntryName(PROTOCOLS, "PROTOCOL")] = "think"
    """`think` or `qwen`: how calls and answers are written; or the import path of a module of your own."""
    tools: tuple[str, ...] | None = None
    """Names of the tools on offer; null: all eleven, []: none. One of your own goes by the import path of its module,
    such as my_project.tools.magnify, which the model calls magnify, or by the name of an entry point of the group
    thinkimg.tools."""
    system: str | None = None
    """System prompt; null: a description of the protocol and of every tool, made from their code."""
    max_turns: Positive = 5
    """Turns of the model in one conversation."""
    max_images: Positive = 8
    """Images in one conversation, the sample's own included."""
    max_turn_tokens: Positive = 512
    """Tokens that the model may write in one turn."""
    max_tokens: Positive = 8192
    """Tokens of a conversation, images expanded."""

    @field_validator("tools")
    @classmethod
    def _there(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names:
            load_tools(names)
        return names

    def sources(self) -> dict[str, str]:
        return {**user_sources(self.tools)} | PROTOCOLS.sources((self.protocol,))
