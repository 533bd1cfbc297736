"""Tasks of another framework: our questions as texts and pictures, and our rules on the conversations about them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from PIL import Image

from thinkimg.config.tree import Config
from thinkimg.conversation.episode import render_system_prompt
from thinkimg.conversation.picture import Picture, make_picture
from thinkimg.conversation.protocol import IMAGE_PART, text_part
from thinkimg.conversation.question import state_question
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.conversation.text_core import TextCore
from thinkimg.images.settings import ViewLimits
from thinkimg.records import Sample, StopReason, Trajectory
from thinkimg.registry import short_name
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.part import add_failed
from thinkimg.rewards.settings import RULES, RewardsConfig


@dataclass(frozen=True)
class Tasks:
    """Rules of all tasks: of the conversation, of what is seen, and of the rewards."""

    conversation: ConversationConfig
    view: ViewLimits
    rewards: RewardsConfig

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the rules of the config. Raises UserError where the model's family can't be known."""
        return cls(config.talk(), config.view(), config.rewards)

    @property
    def system(self) -> str:
        """System prompt; empty for none."""
        return render_system_prompt(self.conversation)

    def make_pictures(self, images: Iterable[Image.Image]) -> list[Picture]:
        """Return the pictures of full-resolution RGB images."""
        return [make_picture(image, self.view) for image in images]

    def messages(self, sample: Sample, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
        """Return the system prompt, unless it is empty, and the question: a place for each picture, then the text."""
        text = state_question(sample, [picture.view.size for picture in pictures], self.conversation.unit)
        question = {"role": "user", "content": [IMAGE_PART] * len(pictures) + [text_part(text)]}
        return [{"role": "system", "content": self.system}, question] if self.system else [question]

    def begin(self, pictures: Sequence[Picture]) -> TextCore:
        """Return a conversation in which the model is to speak next."""
        return TextCore(pictures, self.conversation, self.view)

    @property
    def rules(self) -> dict[str, Callable[[Batch], list[Score]]]:
        """Rules by name: those that are shipped, then `rewards.rules`."""
        return {short_name(path): RULES[path].score for path in (*RULES.shipped, *self.rewards.rules)}

    def score(self, rule: str, conversations: Sequence[tuple[Sample, TextCore]]) -> list[float | None]:
        """Return a rule's value of each conversation, None where it is missing.

        A conversation without an end counts as one that ran out of turns. The rule sees none that failed.
        """
        rows = [make_row(sample, core, number) for number, (sample, core) in enumerate(conversations)]
        played = [row for row in rows if row.stop is not StopReason.FAILED]
        samples = {sample.sample_id: sample for sample, _ in conversations}
        images = Images({picture.sha256: picture.image for _, core in conversations for picture in core.pictures})
        batch = Batch(played, samples, self.rewards, images, tools=self.conversation.tools)
        return [score.value for score in add_failed(rows, self.rules[rule](batch))]


@dataclass(frozen=True)
class Images:
    """Images by hash in memory, in place of an artifact's ImageTable."""

    images: dict[str, Image.Image]

    def decoded(self, sha256: str) -> Image.Image:
        """Return the image in RGB at full resolution. Raises KeyError for an unknown hash."""
        return self.images[sha256]


def make_row(sample: Sample, core: TextCore, index: int) -> Trajectory:
    """Return a conversation as a row without tokens, as rules read it."""
    return Trajectory(
        trajectory_id=f"{sample.sample_id}-{index}",
        sample_id=sample.sample_id,
        group_id=sample.sample_id,
        index=index,
        policy="",
        tokens=(),
        roles=(),
        logprobs=(),
        images=tuple(picture.sha256 for picture in core.pictures),
        grids=tuple(picture.grid for picture in core.pictures),
        turns=tuple(core.turns),
        answer=core.answer,
        stop=core.stop or StopReason.MAX_TURNS,
        error=core.error,
        weights="",
        sizes=tuple(picture.view.size for picture in core.pictures),
        coordinates=core.config.unit,
    )
