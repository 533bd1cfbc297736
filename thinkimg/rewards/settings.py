"""Settings of the rewards: rules, a user's own functions, and the judges of the processed image.

A rule's and a judge's own settings lie beside it.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import model_validator

from thinkimg.models.family import Family
from thinkimg.registry import Registry, short_name
from thinkimg.rewards.user_function import load_function
from thinkimg.settings import Composite, EntryName, Name, Weight

RULES = Registry("rules", "thinkimg.rewards.rules")
"""Each defines `score(batch)`, and `Settings` where it has some."""
JUDGES = Registry("judges", "thinkimg.rewards.judges")
"""Each defines `judge(pairs, context)`, and what else `judge.Judge` asks of it."""


class RewardsConfig(Composite):
    """Rules and functions that score trajectories."""

    registry = RULES
    chooser = "rules"
    always = RULES.shipped

    rules: tuple[Annotated[str, EntryName(RULES, "score")], ...] = ()
    """Rules beside those in thinkimg/rewards/rules, which always score: import paths of modules of your own, such as
    my_project.rules.brevity. Each is a raw column of the scores."""
    functions: tuple[Name, ...] = ()
    """Your own rewards by import path `package.module:function`; each is `fn(completions, **columns) -> list[float]`.
    """

    def sources(self) -> dict[str, str]:
        """Return path -> sha256 of a user's own code, that of the functions included."""
        return super().sources() | {path: load_function(path).digest for path in self.functions}


class ImageConfig(Composite):
    """Reward of the processed image itself."""

    registry = JUDGES
    chooser = "types"

    types: tuple[Annotated[str, EntryName(JUDGES, "judge")], ...] = ("embedding",)
    """Judges of the processed image: files in thinkimg/rewards/judges, or import paths of modules of your own, such as
    my_project.judges.sharpness. Each is a raw column of the scores. Without any there is no image reward."""
    weights: dict[str, Weight] = {
        "self": 0.3, "teacher": 0.3, "attention": 0.2, "embedding": 0.2,
    }  # fmt: skip
    """Weight of each column in `image`, the part of the mix: those of `types` are divided by their sum. Applied with
    the mix."""
    which: Literal["final", "best", "mean"] = "final"
    """Processed image of a conversation that counts: the last, the best, or the mean of all."""
    only_if_right: bool = False
    """Count the image reward only where the answer is right; applied with the mix."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the raw columns of `types`."""
        return tuple(map(short_name, self.types))

    @model_validator(mode="after")
    def _weighted(self) -> Self:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"image.types has two judges of the same name: {', '.join(self.types)}")
        if missing := set(self.columns) - set(self.weights):
            raise ValueError(
                f"image.weights must have a weight for each of image.types, and has none for {min(missing)}"
            )
        if unknown := set(self.weights) - {*JUDGES, *self.columns}:
            raise ValueError(f"image.weights has '{min(unknown)}', which is no judge of image.types")
        return self

    def completed(self, family: Family) -> Self:
        """Return the settings with those of the model's family in place of null, where a judge has such."""
        judges: dict[str, Any] = {name: getattr(self, name, None) for name in self.columns}
        own = {name: judge.completed(family) for name, judge in judges.items() if hasattr(judge, "completed")}
        return self.model_copy(update=own)

    def fingerprinted(self) -> dict[str, Any]:
        """Return the settings that enter the fingerprint of scores; the others belong to the mix."""
        return self.model_dump(mode="json", exclude={"weights", "only_if_right"})
