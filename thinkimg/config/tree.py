"""Tree of settings: the sections, each defined beside its code."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from thinkimg.conversation.settings import ConversationConfig
from thinkimg.data.settings import DataConfig
from thinkimg.engine.settings import EvaluateConfig, RolloutConfig
from thinkimg.images.settings import ImagesConfig, ViewLimits
from thinkimg.models.clip import OWN_CLIP
from thinkimg.models.family import Family, family_of
from thinkimg.models.settings import ModelConfig
from thinkimg.redaction import without_query
from thinkimg.resource_settings import ResourcesConfig
from thinkimg.rewards.mix import check_weights
from thinkimg.rewards.settings import ImageConfig, RewardsConfig
from thinkimg.settings import Seed, Settings, Weight
from thinkimg.tracking.settings import TrackingConfig
from thinkimg.trainer.settings import TrainConfig, WarmstartConfig

Iterations = Annotated[int, Field(ge=1, le=1_000_000)]


class WhereConfig(ResourcesConfig):
    """Machines, addresses and speed: recorded in manifests, in no fingerprint."""

    tracking: TrackingConfig = TrackingConfig()
    functions_allow: tuple[str, ...] = ()
    """Modules that the overrides of a deployment's run may name as user code, with the modules below them. What the
    preset file names needs no entry. On the command line every module is allowed."""

    def public(self) -> dict[str, Any]:
        """Return the settings as they may be recorded, without passwords."""
        tree = super().public()
        tree["tracking"]["uri"] = tree["tracking"]["uri"] and without_query(tree["tracking"]["uri"])
        return tree


class LoopConfig(Settings):
    """Order in which a loop's stages run."""

    lag: Literal[0, 1] = 0
    """Steps by which the policy that plays is behind. 0: each iteration's rollouts are played by the policy that is
    then trained. 1: by the policy before it, so that the next rollouts are played during the training. The loss
    corrects for it."""


class Config(Settings):
    """All settings of a loop."""

    preset: str = "development"
    """Name of the preset or path of the YAML file that this came from."""
    iterations: Iterations = 10
    """Iterations of the loop: rollouts, scores, training, evaluation."""
    loop: LoopConfig = LoopConfig()
    seed: Seed = 0
    """Seed of warm start, rollouts and training; the data have `data.seed`."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    images: ImagesConfig = ImagesConfig()
    conversation: ConversationConfig = ConversationConfig()
    warmstart: WarmstartConfig = WarmstartConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    image: ImageConfig = ImageConfig()
    mix: Annotated[dict[str, Weight], AfterValidator(check_weights)] = {
        "format": 0.2, "tool": 0.3, "answer": 0.3, "image": 0.2,
    }  # fmt: skip
    """Weight of each reward component; applied when advantages are computed, so that another mix needs no new
    scores."""
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    on_alarm: Literal["warn", "stop"] = "warn"
    """Reaction to an alarm: report it, or report it and end the loop. In no fingerprint."""
    where: WhereConfig = WhereConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmstart.checkpoint is not None and self.model.adaptation == "lora":
            raise ValueError("warmstart.checkpoint is for full fine-tuning: with LoRA set model.path to the checkpoint")
        if self.loop.lag and not self.train.loss.vllm_importance_sampling_correction:
            raise ValueError("loop.lag=1 needs train.loss.vllm_importance_sampling_correction=true")
        if self.loop.lag and self.where.exclusive and not self.where.engine.urls:
            raise ValueError(
                "loop.lag=1 gains nothing where engine and trainer take turns in the memory: give them devices of "
                "their own (where.engine.devices, where.trainer.devices), or keep both (where.engine.keep, "
                "where.trainer.keep)"
            )
        return self

    def public(self) -> dict[str, Any]:
        """Return the settings as they may be shown, without passwords."""
        return self.model_dump(mode="json") | {"where": self.where.public()}

    def family(self) -> Family:
        """Return the family of the model that training starts from. Raises UserError where it can't be known."""
        return family_of(self.model, self.warmstart.checkpoint)

    def view(self) -> ViewLimits:
        """Return the limits of what the model sees, on its own grid. Raises UserError as `family`."""
        return ViewLimits.of(self.images, self.family().processor)

    def talk(self) -> ConversationConfig:
        """Return the settings of a conversation, those of the model's family in place of null.

        Raises UserError as `family`, where one of them is null.
        """
        talk = self.conversation
        if talk.protocol is not None and talk.coordinates is not None:
            return talk
        family = self.family()
        return talk.completed(family.protocols[0], family.coordinates)

    @property
    def has_demonstrations(self) -> bool:
        """True if the warm start has conversations to imitate: the puzzles have scripts, other data needs a file."""
        has_file = self.warmstart.demonstrations is not None
        return self.warmstart.checkpoint is None and (self.data.source == "puzzles" or has_file)

    @property
    def compares_pairs(self) -> bool:
        """True if the policy also learns to compare images."""
        return self.has_demonstrations and self.data.source == "puzzles" and self.warmstart.pairs > 0

    @property
    def has_own_clip(self) -> bool:
        """True if scores need the small CLIP that is trained on the puzzles."""
        return "embedding" in self.image.types and self.image.embedding.model == OWN_CLIP
