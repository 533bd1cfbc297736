"""Batch of trajectories that a reward component scores, and the scores that it returns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from thinkimg.records import Sample, Trajectory
from thinkimg.rewards.judgement import Judgements
from thinkimg.rewards.sentences import Verdicts
from thinkimg.rewards.settings import ImageConfig, RewardsConfig
from thinkimg.store.image_table import ImageTable
from thinkimg.store.manifest import canonical_json


class Status(StrEnum):
    """Kind of a score's value."""

    OK = "ok"
    ZERO = "zero"  # with a reason
    MISSING = "missing"  # with the reason why it could not be judged; null in tables, NaN in arrays


@dataclass(frozen=True)
class Score:
    """Score of one trajectory by one component; `evidence` is plain JSON, for people.

    A value of 0 and a missing value have a reason. Values are in [0, 1], but a user's function may leave that range.
    """

    value: float | None
    status: Status
    reason: str | None = None
    evidence: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.status is Status.MISSING), self
        assert (self.value == 0) == (self.status is Status.ZERO), self
        assert self.value is None or math.isfinite(self.value), self
        assert self.reason or self.status is Status.OK, self

    @classmethod
    def of(cls, value: float, if_zero: str, evidence: dict[str, Any] | None = None) -> Self:
        """Return a score that is present; `if_zero` is its reason if the value is 0."""
        return cls(value, Status.OK, None, evidence) if value else cls.zero(if_zero, evidence)

    @classmethod
    def zero(cls, reason: str, evidence: dict[str, Any] | None = None) -> Self:
        """Return a score of 0 with its reason."""
        return cls(0.0, Status.ZERO, reason, evidence)

    @classmethod
    def missing(cls, reason: str, evidence: dict[str, Any] | None = None) -> Self:
        """Return a score that is missing, with the reason."""
        return cls(None, Status.MISSING, reason, evidence)

    def row(self) -> dict[str, Any]:
        """Return the score as a row of the scores' table."""
        evidence = None if self.evidence is None else canonical_json(self.evidence)
        return {"value": self.value, "status": str(self.status), "reason": self.reason, "evidence": evidence}


@dataclass(frozen=True)
class Batch:
    """Trajectories to score, whole groups, with all that a component may look at."""

    trajectories: Sequence[Trajectory]
    samples: Mapping[str, Sample]
    """sample_id -> sample, at least for those of the trajectories."""
    config: RewardsConfig
    images: ImageTable | None = None
    """Images of the data set and of the rollouts; None where no component needs them."""
    image: ImageConfig | None = None
    judgements: Judgements = field(default_factory=dict)
    """Judgements of the processed images, which the image components score by."""
    tools: tuple[str, ...] | None = None
    """`conversation.tools` of the rollouts."""
    verdicts: Verdicts = field(default_factory=dict)
    """Verdicts on answers to questions whose right answers are sentences."""

    def sample(self, trajectory: Trajectory) -> Sample:
        """Return the sample that a trajectory is about."""
        return self.samples[trajectory.sample_id]
