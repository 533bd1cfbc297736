"""Settings of a conversation: protocol, tools and limits."""

from typing import Annotated, Self

from pydantic import field_validator

from thinkimg.conversation.protocol import PROTOCOLS
from thinkimg.images.toolbox import load_tools, user_sources
from thinkimg.records import Coordinates
from thinkimg.settings import EntryName, Positive, Settings


class ConversationConfig(Settings):
    """Protocol, tools and limits of a conversation."""

    protocol: Annotated[str, EntryName(PROTOCOLS, "PROTOCOL")] | None = None
    """`think`, `qwen` or `qwen_xml`: how calls and answers are written; or the import path of a module of your own.
    null: the form in which the model's family was trained to call tools, `think` for one that was not."""
    coordinates: Coordinates | None = None
    """`pixels` of an image as the model sees it, or `thousandths` of its sides: how positions are written in calls,
    prompts and answers. null: those that the model's family was trained on."""
    thinking: bool | None = None
    """Thoughts of a model whose chat template opens them (Qwen3.5, Qwen3-VL Thinking): true to think, false to reply
    without. null: as the template does by itself."""
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

    @property
    def form(self) -> str:
        """Name of the protocol; `think` where neither the settings nor a model name one."""
        return self.protocol or "think"

    @property
    def unit(self) -> Coordinates:
        """Unit of positions; pixels where neither the settings nor a model name one."""
        return self.coordinates or Coordinates.PIXELS

    def completed(self, protocol: str, coordinates: Coordinates) -> Self:
        """Return the settings with those of a model's family in place of null."""
        chosen = {"protocol": self.protocol or protocol, "coordinates": self.coordinates or coordinates}
        return self.model_copy(update=chosen)

    @field_validator("tools")
    @classmethod
    def _there(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names:
            load_tools(names)
        return names

    def sources(self) -> dict[str, str]:
        return {**user_sources(self.tools)} | PROTOCOLS.sources((self.form,))
