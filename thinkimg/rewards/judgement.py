"""Judgement of a pair of images, and the identity of its judge."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thinkimg.images.coordinates import Box


@dataclass(frozen=True)
class Pair:
    """Processed image beside the sample's own image that it was made from: content hashes of the full resolution."""

    question: str
    original: str
    processed: str
    region: Box | None = field(default=None, compare=False)
    """Part of the original that it shows: left, top, right, bottom in shares of its sides; None where that is no box.
    """


@dataclass(frozen=True)
class JudgeIdentity:
    """Identity of a judge: component, model, digest of its weights, hash of the prompt or settings."""

    judge: str
    model: str
    weights: str
    prompt: str

    def key(self, pair: Pair) -> str:
        """Return the key of this judge's judgement of a pair, equal for equal content in any run."""
        content = [self.judge, self.model, self.weights, self.prompt, pair.question, pair.original, pair.processed]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Judgement:
    """Value of a pair in [0, 1], or None and the reason."""

    value: float | None
    reason: str | None
    evidence: dict[str, Any]
    """Plain JSON, the distribution included."""
    by: JudgeIdentity | None = None
    unreachable: bool = False
    """True if the judge could not be asked at all, so that another one may be."""
    refused: bool = field(default=False, compare=False)
    """True if the judge's server refused this pair or garbled its answer; no column of the ledger."""


Judgements = Mapping[tuple[str, Pair], Judgement]
"""(component, pair) -> judgement."""
