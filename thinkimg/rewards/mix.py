"""Mix: the weights of the raw reward columns, and the columns that `image` stands for in it."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
from pydantic import AfterValidator, Field, StrictBool, ValidationError

from thinkimg.errors import UserError
from thinkimg.grpo.advantages import mix_rewards
from thinkimg.registry import short_name
from thinkimg.rewards.settings import ImageConfig
from thinkimg.settings import Settings

IMAGE = "image"
"""Name in a mix of the weighted mean of the columns in config.image.types. No component has this name."""
CONDITION, RIGHT = "answer", 0.5
"""Column and least value of a right answer: choices are 0 or 1, text and boxes lie between."""
_Weight = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Mix:
    """Weights of raw columns, as config and recipes state them.

    The order of names means nothing: floats are added in the order of the sorted names. A mix read back from a
    manifest, whose keys are sorted, so gives the same bits.
    """

    weights: Mapping[str, float]
    """Name -> weight >= 0; `image` may be a name."""
    types: Mapping[str, float]
    """Columns that `image` stands for -> weight; they are divided by their sum."""
    only_if_right: bool = False
    """Count the image reward only where the answer is right."""

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Self:
        """Return the mix of a config or a train stage's recipe as JSON: `mix` and, where that names it, `image`."""
        image = tree.get("image") or {}
        weights = image.get("weights", {})
        types = {name: weights.get(name, 0.0) for name in map(short_name, image.get("types", ()))}
        return cls(tree["mix"], types, image.get("only_if_right", False))

    @classmethod
    def from_config(cls, mix: Mapping[str, float], image: ImageConfig) -> Self:
        """Return the mix of a config's `mix` and `image`."""
        return cls(mix, {name: image.weights[name] for name in image.columns}, image.only_if_right)

    def fingerprinted(self) -> dict[str, Any]:
        """Return the settings that enter a train stage's fingerprint; those of `image` only if the mix names it."""
        tree: dict[str, Any] = {"mix": dict(self.weights)}
        if IMAGE in self.weights:
            weights = dict(self.types)
            tree[IMAGE] = {"types": sorted(weights), "weights": weights, "only_if_right": self.only_if_right}
        return tree

    def check(self, scored: Iterable[str]) -> None:
        """Raise UserError where the mix names a column that is not scored, or an image reward of nothing."""
        scored = list(scored)
        if self.weights.get(IMAGE, 0) > 0 and not sum(self.types.values()) > 0:
            raise UserError(
                "The mix names 'image', but no image reward has a weight.", hint="Set image.types and image.weights."
            )
        for name in self.weights:
            if name != IMAGE and name not in scored:
                raise UserError(
                    f"The mix names '{name}', which is no reward component.",
                    hint=f"There are {', '.join([*scored, IMAGE])}.",
                )
        for name in self.columns():
            if name not in scored:
                raise UserError(
                    f"The mix needs the column '{name}', which is not scored.", hint=f"There are {', '.join(scored)}."
                )

    def terms(self) -> list[tuple[str, str, float]]:
        """Return the terms of the total, sorted: (name in the mix, raw column, weight > 0)."""
        terms = []
        types = sorted(self.types.items())
        total = sum(share for _, share in types)
        for name, weight in sorted(self.weights.items()):
            if weight > 0 and name == IMAGE:
                terms += [(name, column, weight * share / total) for column, share in types if share > 0]
            elif weight > 0:
                terms.append((name, name, weight))
        return terms

    def columns(self) -> list[str]:
        """Return the raw columns of the total, each once; with only_if_right also the column of the condition."""
        names = [column for _, column, _ in self.terms()]
        conditional = self.only_if_right and self.weights.get(IMAGE, 0) > 0
        return list(dict.fromkeys([*names, *([CONDITION] if conditional else [])]))

    def values(self, components: Mapping[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
        """Return (name in the mix, raw column) -> (N,) float64, with the condition applied; NaN where missing.

        A wrong row's image reward is 0, judged or not. A row whose answer could not be judged has none.
        """
        values = {}
        for name, column, _ in self.terms():
            values[name, column] = components[column]
            if name == IMAGE and self.only_if_right:
                answer = components[CONDITION]
                conditional = np.where(answer >= RIGHT, components[column], 0.0)
                values[name, column] = np.where(np.isnan(answer), np.nan, conditional)
        return values

    def totals(
        self, components: Mapping[str, np.ndarray], groups: np.ndarray, valid: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the weighted sums, (N,) float64, with missing values replaced by their group's mean; see mix_rewards.

        Raises UserError if a column was not scored.
        """
        self.check(components)
        weights = {(name, column): weight for name, column, weight in self.terms()}
        return mix_rewards(self.values(components), weights, groups, valid)

    def describe(self) -> str:
        """Return the mix for people: `answer 0.5 + image 0.2 (self 0.7, embedding 0.3; only if right)`."""
        texts = []
        for name, weight in self.weights.items():
            text = f"{name} {weight:g}"
            if name == IMAGE and weight > 0:
                inside = ", ".join(f"{column} {share:g}" for column, share in self.types.items())
                text += f" ({inside}{'; only if right' if self.only_if_right else ''})"
            texts.append(text)
        return " + ".join(texts) or "nothing"


def check_weights(weights: dict[str, float]) -> dict[str, float]:
    """Return the weights of a mix. Raises UserError where none is above 0."""
    if not any(weights.values()):
        raise UserError(
            "The mix has no weight above 0: there would be nothing to learn.", hint="Write it as mix={answer: 1.0}."
        )
    return weights


class ImageOverrides(Settings):
    """Image settings of a mix file."""

    types: list[str] | None = None
    weights: dict[str, _Weight] = {}
    only_if_right: StrictBool | None = None


class MixFile(Settings):
    """File of a user that states a mix."""

    mix: Annotated[dict[str, _Weight], AfterValidator(check_weights)]
    image: ImageOverrides = ImageOverrides()


PROBLEMS = {"model_type": "it is no mapping", "missing": "it is missing", "extra_forbidden": "a mix has no such part"}


def read_mix(tree: Any, path: str, default: Mix, scored: Collection[str]) -> Mix:
    """Return the mix of a user's file: `mix`, and `image` with types, weights, only_if_right.

    Settings that the file leaves out are those of `default`. Raises UserError, naming the file, if it does not fit.
    """
    try:
        file = MixFile.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "mix"
        hint = "Write it as `mix: {answer: 0.8, image: 0.2}`; image.types, .weights and .only_if_right may follow."
        problem = PROBLEMS.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise UserError(f"{path} does not fit at '{name}': {problem}.", hint=hint) from None
    image, types = file.image, file.image.types
    names = map(short_name, types if types is not None else list(image.weights) or default.types)
    columns = {name: image.weights.get(name, default.types.get(name, 0.0)) for name in names}
    mix = Mix(file.mix, columns, default.only_if_right if image.only_if_right is None else image.only_if_right)
    try:
        mix.check(scored)
    except UserError as error:
        raise UserError(f"{path}: {error.message}", hint=error.hint) from None
    return mix
