"""Context of image judges: their settings, the policies, the images, and the engine and trainer."""

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
from thinkimg.conversation.picture import Picture, make_picture
from thinkimg.engine.settings import EngineSettings
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

ROOM = 512  # tokens; a server's limit is a multiple of it, so that slightly longer prompts need no new server


class JudgeSettings(Settings):
    """All settings that a judgement depends on."""

    image: ImageConfig
    view: ViewLimits
    """Limits of the size at which judges see the images."""
    model: ModelConfig
    token_budget: int
    """Tokens per micro-batch of the trainer, which measures attention."""
    base: BaseSource = Field(exclude=True)

    def engine(self, prompts: Iterable[Sequence[int]]) -> EngineSettings:
        """Return the limits of a server for these prompts, of two images each, and one token more."""
        image = self.view.most_tokens + 1
        tokens = max(map(len, prompts)) + 2 * image + 1
        return EngineSettings(
            dtype=self.model.precision,
            max_tokens=ROOM * ceil(tokens / ROOM),
            max_images=2,
            max_pixels=self.view.max_pixels,
        )

    def hashed(self, *asked: object) -> str:
        """Return the sha256 of a judge's question: its texts and settings, and the size at which it sees the images."""
        content = [*asked, *self.view.model_dump().values()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class JudgeContext:
    """Policies, images and resources that a judge may use; `expect` and `judged` may be called from any thread."""

    settings: JudgeSettings
    resources: Resources
    policy: Policy | None
    """Policy that made the rollouts."""
    first: Policy | None
    """First policy of the loop, which a "warmstart" teacher is."""
    clip: Clip | None
    """Artifact of the small CLIP, if image.embedding names it."""
    tables: Sequence[Artifact]
    """Artifacts that hold the images."""
    images: ImageTable
    expect: Callable[[int], None] = lambda count: None
    """Called with the number of judgements that are about to be made."""
    judged: Callable[[int], None] = lambda count: None
    """Called with the number of judgements made since the last call."""

    @cached_property
    def codec(self) -> Codec:
        """Codec of the policy that made the rollouts."""
        assert self.policy is not None
        return Codec.load(self.policy.vocabulary)

    def picture(self, sha256: str) -> Picture:
        """Return an image and the view of it that the model sees."""
        return make_picture(self.images.decoded(sha256), self.settings.view)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Map in threads: decoding, resizing and hashing release the interpreter's lock."""
        with ThreadPoolExecutor(self.resources.where.workers) as pool:
            return list(pool.map(function, items))
