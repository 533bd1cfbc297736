"""Settings of the image reward: who judges, and how. Part of the tree in config.py."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from thinkimg.models.clip import EmbeddingConfig
from thinkimg.settings import Settings


class TeacherConfig(Settings):
    """A larger model that judges, behind the OpenAI-compatible endpoint `where.teacher.url`."""

    model: str = "Qwen/Qwen2.5-VL-72B-Instruct"
    """Its name at the endpoint; "warmstart": the frozen first policy, which a loop serves on a second server of its own."""
    prefix: bool = True
    """Begin the reply for the model, so that its next token is the rating: vLLM and SGLang can, OpenAI's own API can't."""
    fallback: Literal["error", "self", "skip"] = "self"
    """Where the endpoint can't be reached: fail, take the policy's own judgement for whole groups, or have no value."""


class AttentionConfig(Settings):
    """Where attention is read; `thinkimg calibrate attention` finds both for a model."""

    layer: int = Field(22, ge=0)
    """Layer of the language model, from 0."""
    rows: Literal["text", "last"] = "text"
    """The query rows: all tokens of the text, or the last token of the prompt."""


ImageReward = Literal["self", "teacher", "attention", "embedding"]


class ImageConfig(Settings):
    """The reward of the processed image itself."""

    types: tuple[ImageReward, ...] = ("embedding",)
    """Who judges; each is a raw column of the scores. Without any there is no image reward."""
    weights: dict[ImageReward, Annotated[float, Field(ge=0)]] = {
        "self": 0.3, "teacher": 0.3, "attention": 0.2, "embedding": 0.2,
    }  # fmt: skip
    """Weight of each type in `image`, the part of the mix: those of `types` are divided by their sum. Applied with the mix."""
    which: Literal["final", "best", "mean"] = "final"
    """Which of a conversation's processed images counts."""
    only_if_right: bool = False
    """Count the image reward only where the answer is right; applied with the mix."""
    teacher: TeacherConfig = TeacherConfig()
    attention: AttentionConfig = AttentionConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()

    @model_validator(mode="after")
    def _weighted(self) -> Self:
        if not set(self.types) <= set(self.weights):
            raise ValueError("image.weights must have a weight for each of image.types")
        return self

    def scored(self) -> dict[str, Any]:
        """What of this defines scores; the rest defines the mix."""
        tree = self.model_dump(mode="json", exclude={"weights", "only_if_right"})
        return {name: value for name, value in tree.items() if name in ("types", "which") or name in self.types}
