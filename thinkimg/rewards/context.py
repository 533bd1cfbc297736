"""Context handed to image judges: their settings, the policies, the images, and the engine and trainer."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import TypeVar

from pydantic import Field

from thinkimg.conversation.codec import Codec
from thinkimg.conversation.picture import Picture, picture
from thinkimg.engine.settings import EngineSettings
from thinkimg.images.patches import MERGE, PATCH
from thinkimg.images.settings import ViewLimits
from thinkimg.models.base import BaseSource
from thinkimg.models.settings import ModelConfig
from thinkimg.resources import Resources
from thinkimg.rewards.settings import ImageConfig
from thinkimg.settings import Settings
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Clip, Policy
from thinkimg.store.manifest import Artifact

T = TypeVar("T")
R = TypeVar("R")

ROOM = 512  # tokens: a server's limit is a multiple, so that the next prompt fits as well


class JudgeSettings(Settings):
    """All settings that a judgement depends on."""

    image: ImageConfig
    view: ViewLimits
    """Limits under which a judge that is shown views sees the images."""
    model: ModelConfig
    token_budget: int
    """Tokens per micro-batch of the trainer, which reads attention."""
    base: BaseSource = Field(exclude=True)

    def engine(self, prompts: Iterable[Sequence[int]]) -> EngineSettings:
        """What a server has to allow for prompts with two images each, and one token more."""
        image = self.view.max_pixels // (MERGE * PATCH) ** 2 + 1
        tokens = max(map(len, prompts)) + 2 * image + 1
        return EngineSettings(
            dtype=self.model.dtype, max_tokens=ROOM * ceil(tokens / ROOM), max_images=2, max_pixels=self.view.max_pixels
        )

    def hashed(self, *asked: object) -> str:
        """sha256 of how a judge asks: what it says, and the limits under which it sees the pictures."""
        content = [*asked, self.view.min_pixels, self.view.max_pixels]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class JudgeContext:
    """policy: the one that made the rollouts. first: the first policy, which a "warmstart" teacher is. clip: the artifact of
    the small CLIP, if image.embedding asks for it. tables: artifacts that hold the images.

    expect, judged: called with how many pairs are to be judged, and how many more have been; from whatever thread.
    """

    settings: JudgeSettings
    resources: Resources
    policy: Policy | None
    first: Policy | None
    clip: Clip | None
    tables: Sequence[Artifact]
    images: ImageTable
    expect: Callable[[int], None] = lambda count: None
    judged: Callable[[int], None] = lambda count: None

    @cached_property
    def codec(self) -> Codec:
        assert self.policy is not None
        return Codec.load(self.policy.vocabulary)

    def picture(self, sha256: str) -> Picture:
        """An image and what the model sees of it."""
        return picture(self.images.decoded(sha256), self.settings.view)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """In threads: decoding, resizing and hashing let go of the interpreter."""
        with ThreadPoolExecutor(self.resources.where.workers) as pool:
            return list(pool.map(function, items))
