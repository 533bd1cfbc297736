"""What every reward component is given, and what it gives back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from thinkimg.records import Sample, Trajectory
from thinkimg.rewards.judgement import Judgements
from thinkimg.rewards.settings import ImageConfig, RewardsConfig
from thinkimg.store.image_table import ImageTable
from thinkimg.store.manifest import canonical


class Status(StrEnum):
    """What kind of value a score has."""

    OK = "ok"
    ZERO = "zero"  # the trajectory earned nothing, and the reason says why
    MISSING = "missing"  # it could not be judged, and the reason says why; null in tables, NaN in arrays


@dataclass(frozen=True)
class Score:
    """One component's judgement of one trajectory; evidence is plain JSON, for people.

    A value of 0 and a missing value have a reason, and the value is in [0, 1] (a user's function may leave that range).
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
        """A present value; `if_zero` is the reason in case that it is 0."""
        return cls(value, Status.OK, None, evidence) if value else cls.zero(if_zero, evidence)

    @classmethod
    def zero(cls, reason: str, evidence: dict[str, Any] | None = None) -> Self:
        return cls(0.0, Status.ZERO, reason, evidence)

    @classmethod
    def missing(cls, reason: str, evidence: dict[str, Any] | None = None) -> Self:
        return cls(None, Status.MISSING, reason, evidence)

    def row(self) -> dict[str, Any]:
        """As schemas.score_fields has it."""
        evidence = None if self.evidence is None else canonical(self.evidence)
        return {"value": self.value, "status": str(self.status), "reason": self.reason, "evidence": evidence}


@dataclass(frozen=True)
class Batch:
    """Trajectories to score, whole groups, with all that a component may look at.

    samples: by sample_id, at least those of the trajectories. images: those of the data set and of the rollouts by hash;
    None where no component needs one. image, judgements: what the image components need, which the judges have made.
    tools: `conversation.tools` of the rollouts.
    """

    trajectories: Sequence[Trajectory]
    samples: Mapping[str, Sample]
    config: RewardsConfig
    images: ImageTable | None = None
    image: ImageConfig | None = None
    judgements: Judgements = field(default_factory=dict)
    tools: tuple[str, ...] | None = None

    def sample(self, trajectory: Trajectory) -> Sample:
        return self.samples[trajectory.sample_id]
