"""Token stream of a conversation: compact, only ever appended to, and checked against the engine's."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from thinkimg.conversation.codec import Codec
from thinkimg.records import Role

ROLES = list(Role)
Grid = tuple[int, int, int]
"""Patches (t, h, w) of an image."""


class TokenError(RuntimeError):
    """Tokens of the engine that can't become part of a conversation: the trajectory fails, the run goes on."""


class TokenMismatch(TokenError):
    """Expanded prompt of the engine that is not ours. ours, theirs: both lists of ids; index: the first difference."""

    def __init__(self, ours: list[int], theirs: list[int], image: int) -> None:
        self.ours, self.theirs = ours, theirs
        pairs = zip(ours, theirs, strict=False)
        self.index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        near = slice(max(0, self.index - 4), self.index + 5)
        super().__init__(
            f"The engine's prompt differs from ours at token {self.index}: ours has {len(ours)} tokens "
            f"({ours.count(image)} of images, as the grids say) and …{ours[near]}… there, "
            f"the engine's {len(theirs)} ({theirs.count(image)} of images) and …{theirs[near]}…."
        )


class ImageSlot(NamedTuple):
    """Image of a stream: content hash of its full resolution, patches (t, h, w) and tokens of its view."""

    sha256: str
    grid: Grid
    tokens: int


class TokenStream:
    """Tokens of a conversation, which grow at the end only; sampled tokens are kept as they came.

    ids: compact token ids, one placeholder per image. roles: one per id. logprobs: one per sampled id. images, grids,
    image_tokens: one per placeholder, in order; images are content hashes of the full resolution. expanded_length:
    number of tokens with the images expanded.
    """

    def __init__(self, codec: Codec, prompt: Sequence[int], images: Sequence[ImageSlot]) -> None:
        self.codec = codec
        self.ids: list[int] = []
        self.roles: list[Role] = []
        self.logprobs: list[float] = []
        self.images: list[str] = []
        self.grids: list[Grid] = []
        self.image_tokens: list[int] = []
        self.expanded_length = 0
        self._append(prompt, Role.PROMPT, images)

    def append_sampled(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Append a turn as the engine returned it. Raises TokenError, and appends nothing, if that is impossible."""
        if not ids or len(ids) != len(logprobs):
            raise TokenError(f"The engine returned {len(ids)} tokens with {len(logprobs)} log-probabilities.")
        if not all(map(math.isfinite, logprobs)):
            raise TokenError(f"The engine returned a log-probability that is not finite, among {list(logprobs)}.")
        if banned := set(ids) & set(self.codec.banned):
            raise TokenError(f"The engine sampled {sorted(banned)}, which are banned, in {list(ids)}.")
        if self.codec.end in ids[:-1]:
            raise TokenError(f"The engine went on after {self.codec.end}, the end of a turn, in {list(ids)}.")
        self._append(ids, Role.SAMPLED, ())
        self.logprobs += logprobs

    def append_observation(self, ids: Sequence[int], images: Sequence[ImageSlot]) -> None:
        """Append a message to the model (Codec.observation), which must follow a complete turn."""
        complete = self.roles[-1] is Role.SAMPLED and self.ids[-1] == self.codec.end
        assert complete, "an observation follows a complete turn"
        self._append(ids, Role.OBSERVATION, images)

    def _append(self, ids: Sequence[int], role: Role, images: Sequence[ImageSlot]) -> None:
        self.expanded_length += expanded_length(ids, images, self.codec.image)
        self.ids += ids
        self.roles += [role] * len(ids)
        self.images += [image.sha256 for image in images]
        self.grids += [image.grid for image in images]
        self.image_tokens += [image.tokens for image in images]

    def expanded(self) -> list[int]:
        """Return the ids on which engine and trainer compute: each placeholder repeated as its image has tokens."""
        return np.repeat(self.ids, expansion(self.ids, self.image_tokens, self.codec.image)).tolist()

    def check(self, engine_prompt_ids: Sequence[int]) -> None:
        """Raise TokenMismatch unless the prompt, as the engine expanded it, equals ours, its image tokens included.

        Called with a generation's prompt before that generation is appended.
        """
        ours, theirs = self.expanded(), list(engine_prompt_ids)
        if ours != theirs:
            raise TokenMismatch(ours, theirs, self.codec.image)


def expanded_length(ids: Sequence[int], images: Sequence[ImageSlot], image_token: int) -> int:
    """Return the number of tokens of compact ids with their images expanded."""
    return int(expansion(ids, [image.tokens for image in images], image_token).sum())


def expansion(ids: Sequence[int], image_tokens: Sequence[int], image_token: int) -> np.ndarray:
    """Return how many tokens each compact id stands for: (T,) int64, 1 or the next image's tokens for a placeholder.

    image_tokens: number of tokens of each image. image_token: id of the placeholder.
    """
    placeholders = np.asarray(ids) == image_token
    assert placeholders.sum() == len(image_tokens), f"{placeholders.sum()} placeholders for {len(image_tokens)} images"
    counts = np.ones(len(ids), dtype=np.int64)
    counts[placeholders] = image_tokens
    return counts
