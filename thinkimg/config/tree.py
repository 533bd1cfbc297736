"""The tree of settings: a union of the sections' own, each defined beside its code."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from thinkimg.conversation.settings import ConversationConfig
from thinkimg.data.settings import DataConfig
from thinkimg.engine.settings import EvaluateConfig, RolloutConfig
from thinkimg.images.settings import ImagesConfig
from thinkimg.models.clip import OWN as OWN_CLIP
from thinkimg.models.settings import ModelConfig
from thinkimg.resource_settings import ResourcesConfig
from thinkimg.rewards.settings import ImageConfig, RewardsConfig
from thinkimg.settings import Positive, Settings, without_password
from thinkimg.tracking.settings import TrackingConfig
from thinkimg.trainer.settings import TrainConfig, WarmstartConfig


class WhereConfig(ResourcesConfig):
    """On what machines and how fast: recorded, never fingerprinted."""

    tracking: TrackingConfig = TrackingConfig()

    def public(self) -> dict[str, Any]:
        tree = super().public()
        tree["tracking"]["uri"] = tree["tracking"]["uri"] and without_password(tree["tracking"]["uri"])
        return tree


class Config(Settings):
    """Everything that a loop needs."""

    preset: str = "development"
    """Name of the preset or path of the YAML file that this came from."""
    iterations: Positive = 10
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    images: ImagesConfig = ImagesConfig()
    conversation: ConversationConfig = ConversationConfig()
    warmstart: WarmstartConfig = WarmstartConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    image: ImageConfig = ImageConfig()
    mix: dict[str, Annotated[float, Field(ge=0)]] = {"format": 0.2, "tool": 0.3, "answer": 0.3, "image": 0.2}
    """Weight of each reward component; applied when advantages are computed, so that another mix needs no new
    scores."""
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    on_alarm: Literal["warn", "stop"] = "warn"
    """What an alarm does to the loop (see thinkimg/analysis/alarms.py): tell, or tell and end it. Not part of what the
    loop is."""
    where: WhereConfig = WhereConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmstart.checkpoint is not None and self.model.adaptation == "lora":
            raise ValueError("warmstart.checkpoint is for full fine-tuning: with LoRA set model.path to the checkpoint")
        return self

    @property
    def has_demonstrations(self) -> bool:
        """Whether the warm start has something to imitate: the built-in puzzles have scripts, other data needs a
        file."""
        own = self.warmstart.demonstrations is not None
        return self.warmstart.checkpoint is None and (self.data.source == "puzzles" or own)

    @property
    def compares_pairs(self) -> bool:
        """Whether the policy also learns to compare images."""
        return self.has_demonstrations and self.data.source == "puzzles" and self.warmstart.pairs > 0

    @property
    def has_own_clip(self) -> bool:
        """Whether scores need the small CLIP that is trained on the puzzles."""
        return "embedding" in self.image.types and self.image.embedding.model == OWN_CLIP
