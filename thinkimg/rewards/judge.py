"""Judge: a module that judges processed images, behind the name of its column."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from thinkimg.registry import source_digest
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.context import JudgeContext, JudgeSettings
from thinkimg.rewards.judgement import JudgeIdentity, Judgement, Pair
from thinkimg.rewards.pairs import score_images
from thinkimg.rewards.settings import JUDGES, ImageConfig


@dataclass(frozen=True)
class Judge:
    """Judge of a column. Its module defines `judge`; for what else it may define, the defaults are stated here."""

    name: str
    module: ModuleType

    @property
    def uses(self) -> frozenset[str]:
        """Names of the resources that it occupies (engine, teacher, trainer): the module's `USES`, by default none."""
        return frozenset(getattr(self.module, "USES", ()))

    @property
    def is_own(self) -> bool:
        """True for a user's own judge."""
        return not self.module.__name__.startswith(f"{JUDGES.package}.")

    def prompt(self, settings: JudgeSettings) -> str:
        """Return the hash of its question, which enters the scores' fingerprint; with the precision of a model it asks.

        By default that of its settings. The code of a user's own judge counts, too.
        """
        if hasattr(self.module, "prompt"):
            asked = self.module.prompt(settings)
            return settings.hashed(asked, source_digest(self.module)) if self.is_own else asked
        own = getattr(settings.image, self.name, None)
        return settings.hashed(own and own.model_dump(mode="json"), source_digest(self.module))

    def identity(self, context: JudgeContext) -> JudgeIdentity:
        """Return the identity under which its judgements are stored for good. By default it depends on no weights."""
        if hasattr(self.module, "identity"):
            identity = self.module.identity(context)
            code = context.settings.hashed(identity.prompt, source_digest(self.module))
            return replace(identity, prompt=code) if self.is_own else identity
        return JudgeIdentity(self.name, self.module.__name__, "", self.prompt(context.settings))

    def start(self, context: JudgeContext, questions: set[str]) -> None:
        """Start what it judges with, when rollouts have only begun; by default nothing.

        questions: the longest of those that it may be asked about.
        """
        if hasattr(self.module, "start"):
            self.module.start(context, questions)

    def judge(self, pairs: Sequence[Pair], context: JudgeContext) -> list[Judgement]:
        """Return one judgement per pair, in order; for a pair that can't be judged it has no value."""
        return self.module.judge(pairs, context)

    def score(self, batch: Batch) -> list[Score]:
        """Return one score per trajectory, in order; by default from the judgements of the images in image.which."""
        return self.module.score(batch) if hasattr(self.module, "score") else score_images(self.name, batch)


def load_judges(image: ImageConfig) -> dict[str, Judge]:
    """Return column -> judge of each of `image.types`, and `self` where a teacher falls back on it."""
    names = dict(zip(image.columns, image.types, strict=True))
    if "teacher" in names and image.teacher.fallback == "self":
        names.setdefault("self", "self")
    return {column: Judge(column, JUDGES[name]) for column, name in names.items()}
