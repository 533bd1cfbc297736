"""What a judge is asked and what it finds: a pair of images, who judges, and the judgement."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thinkimg.images.coordinates import Box


@dataclass(frozen=True)
class Pair:
    """One processed image beside the sample's own image that it was made from; content hashes of the full resolution.

    region: what of the original it shows (left, top, right, bottom in shares of its sides), None where that is no box.
    """

    question: str
    original: str
    processed: str
    region: Box | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Identity:
    """Who judges: component, model, digest of its weights, hash of the prompt or settings."""

    judge: str
    model: str
    weights: str
    prompt: str

    def key(self, pair: Pair) -> str:
        """Name of this judge's judgement of a pair: equal content, equal key, in whatever run."""
        content = [self.judge, self.model, self.weights, self.prompt, pair.question, pair.original, pair.processed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Judgement:
    """What a judge found: value in [0, 1], or None and the reason. evidence is plain JSON, the distribution included.

    by: who judged. unreachable: the judge could not be asked at all, so that somebody else may be.
    """

    value: float | None
    reason: str | None
    evidence: dict[str, Any]
    by: Identity | None = None
    unreachable: bool = False


Judgements = Mapping[tuple[str, Pair], Judgement]
"""By (component, pair)."""
