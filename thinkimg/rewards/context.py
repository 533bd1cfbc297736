"""What a judge finds at its place of work: the pictures, the policy whose rollouts these are, and its machines."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from thinkimg.config import Config
from thinkimg.conversation.picture import Picture, picture
from thinkimg.rewards.judgement import Identity, Judgement, Pair

if TYPE_CHECKING:
    from thinkimg.conversation.codec import Codec
    from thinkimg.resources import Machines
    from thinkimg.store.artifacts import Artifact
    from thinkimg.store.image_table import ImageTable


class Judge(Protocol):
    """What a module of an image component defines besides NAME and score."""

    def identity(self, bench: "Bench") -> Identity: ...

    def judge(self, pairs: Sequence[Pair], bench: "Bench") -> list[Judgement]:
        """One judgement per pair, in order; a pair that can't be judged has one without a value."""


@dataclass
class Bench:
    """policy: who made the rollouts. founder: the first policy, which a "warmstart" teacher is. clip: the artifact of the
    small CLIP, if config.image.embedding asks for it. tables: artifacts that hold the images."""

    config: Config
    crew: "Machines"
    policy: "Artifact"
    founder: "Artifact | None"
    clip: "Artifact | None"
    tables: "Sequence[Artifact]"
    images: "ImageTable"
    expect: Callable[[int], None] = lambda count: None
    judged: Callable[[int], None] = lambda count: None
    """Told how many pairs are to be judged, and how many more have been; from whatever thread."""

    @cached_property
    def codec(self) -> "Codec":
        from thinkimg.conversation.codec import Codec

        return Codec.load(self.crew.vocabulary(self.policy))

    def hashed(self, *settings: object) -> str:
        """sha256 of how a judge asks: its settings, and the limits under which it sees the pictures."""
        images = self.config.images
        asked = [*settings, images.min_pixels, images.max_pixels]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def picture(self, sha256: str) -> Picture:
        """An image and what the model sees of it."""
        return picture(self.images.decoded(sha256), self.config.images)

    def map(self, function: Callable, items: Sequence) -> list:
        """In threads: decoding, resizing and hashing let go of the interpreter."""
        with ThreadPoolExecutor(self.config.where.workers) as pool:
            return list(pool.map(function, items))
