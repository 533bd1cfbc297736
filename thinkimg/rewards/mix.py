"""The mix: what the raw reward columns are worth, and what `image` stands for in it."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from thinkimg.errors import UserError
from thinkimg.grpo.advantages import mix_rewards
from thinkimg.registry import short_name
from thinkimg.rewards.settings import ImageConfig

IMAGE = "image"
"""In a mix: the weighted mean of the columns that config.image.types names. No component has this name."""
CONDITION, RIGHT = "answer", 0.5
"""From this value of this column on an answer counts as right: choices are 0 or 1, text and boxes lie between."""


@dataclass(frozen=True)
class Mix:
    """Weights of raw columns, as config and recipes have them.

    weights: name -> weight >= 0, where `image` may be a name. types: what `image` stands for, column -> weight; they are
    divided by their sum. Their order means nothing: floats are added in that of the names, so that a mix read back from a
    manifest, whose keys are sorted, gives the same bits.
    """

    weights: Mapping[str, float]
    types: Mapping[str, float]
    only_if_right: bool = False

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Self:
        """From plain JSON with `mix` and, where that names it, `image`: a config, a train stage's recipe, a user's file."""
        image = tree.get("image") or {}
        weights = image.get("weights", {})
        types = {name: weights.get(name, 0.0) for name in map(short_name, image.get("types", ()))}
        return cls(tree["mix"], types, image.get("only_if_right", False))

    @classmethod
    def of_settings(cls, mix: Mapping[str, float], image: ImageConfig) -> Self:
        """From `mix` and `image` of a config."""
        return cls(mix, {name: image.weights[name] for name in image.columns}, image.only_if_right)

    def slice(self) -> dict[str, Any]:
        """What of it defines a train stage's output. Without `image` in the mix its settings are no part of it."""
        found: dict[str, Any] = {"mix": dict(self.weights)}
        if IMAGE in self.weights:
            weights = dict(self.types)
            found[IMAGE] = {"types": sorted(weights), "weights": weights, "only_if_right": self.only_if_right}
        return found

    def check(self, known: Iterable[str]) -> None:
        """Raise UserError where it names a column that is not `known`, or an image reward of nothing."""
        known = list(known)
        if self.weights.get(IMAGE, 0) > 0 and not sum(self.types.values()) > 0:
            raise UserError(
                "The mix names 'image', but no image reward has a weight.", hint="Set image.types and image.weights."
            )
        for name in self.weights:
            if name != IMAGE and name not in known:
                raise UserError(
                    f"The mix names '{name}', which is no reward component.",
                    hint=f"There are {', '.join([*known, IMAGE])}.",
                )
        for name in self.columns():
            if name not in known:
                raise UserError(
                    f"The mix needs the column '{name}', which is not scored.", hint=f"There are {', '.join(known)}."
                )

    def parts(self) -> list[tuple[str, str, float]]:
        """(name in the mix, raw column, weight > 0), sorted: what the total is the sum of."""
        found = []
        types = sorted(self.types.items())
        whole = sum(share for _, share in types)
        for name, weight in sorted(self.weights.items()):
            if weight > 0 and name == IMAGE:
                found += [(name, column, weight * share / whole) for column, share in types if share > 0]
            elif weight > 0:
                found.append((name, name, weight))
        return found

    def columns(self) -> list[str]:
        """The raw columns that totals are made of, each once; with only_if_right also the one of the condition."""
        names = [column for _, column, _ in self.parts()]
        conditional = self.only_if_right and self.weights.get(IMAGE, 0) > 0
        return list(dict.fromkeys([*names, *([CONDITION] if conditional else [])]))

    def values(self, components: Mapping[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
        """(name in the mix, raw column) -> (N,) float64: the column, under the condition where there is one; NaN where missing.

        A wrong row's image reward is 0 whether or not it could be judged. One whose answer could not be judged is missing.
        """
        found = {}
        for name, column, _ in self.parts():
            values = components[column]
            if name == IMAGE and self.only_if_right:
                answer = components[CONDITION]
                values = np.where(np.isnan(answer), np.nan, np.where(answer >= RIGHT, values, 0.0))
            found[name, column] = values
        return found

    def totals(
        self, components: Mapping[str, np.ndarray], groups: np.ndarray, valid: np.ndarray | None = None
    ) -> np.ndarray:
        """(N,) float64: the weighted sum, missing values replaced by their group's mean; see mix_rewards for the shapes.

        Raises UserError if a column was not scored.
        """
        self.check(components)
        weights = {(name, column): weight for name, column, weight in self.parts()}
        return mix_rewards(self.values(components), weights, groups, valid)

    def readable(self) -> str:
        """As people write it: `answer 0.5 + image 0.2 (self 0.7, embedding 0.3; only if right)`."""
        texts = []
        for name, weight in self.weights.items():
            text = f"{name} {weight:g}"
            if name == IMAGE and weight > 0:
                inside = ", ".join(f"{column} {share:g}" for column, share in self.types.items())
                text += f" ({inside}{'; only if right' if self.only_if_right else ''})"
            texts.append(text)
        return " + ".join(texts) or "nothing"


def read_mix(tree: Any, where: str, default: Mix, known: Collection[str]) -> Mix:
    """The mix of a user's file: `mix`, and `image` with types, weights, only_if_right; what it leaves out is `default`'s.

    Raises UserError, naming the file, for anything else in it.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("mix"), dict):
        raise UserError(f"{where} has no mix.", hint="Write it as `mix: {answer: 0.8, image: 0.2}`.")
    image = tree.get("image", {})
    unknown = [name for name in tree if name not in ("mix", "image")]
    unknown += [f"image.{name}" for name in image if name not in ("types", "weights", "only_if_right")] \
        if isinstance(image, dict) else ["image"]  # fmt: skip
    if unknown:
        raise UserError(
            f"{where} has '{unknown[0]}', which is no part of a mix.",
            hint="There are mix, image.types, image.weights and image.only_if_right.",
        )
    weights = image.get("weights", {})
    types = image.get("types", list(weights) or list(default.types))
    conditional = image.get("only_if_right", default.only_if_right)
    if not isinstance(types, list) or not isinstance(weights, dict) or not isinstance(conditional, bool):
        raise UserError(f"{where} has image settings that do not fit.", hint="See `thinkimg schema`.")
    for name, weight in [*tree["mix"].items(), *weights.items()]:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UserError(f"{where} has the weight {weight!r} for '{name}', which is no number from 0 on.")
    found = {name: float(weights.get(name, default.types.get(name, 0.0))) for name in map(short_name, types)}
    mix = Mix({name: float(weight) for name, weight in tree["mix"].items()}, found, conditional)
    try:
        mix.check(known)
    except UserError as error:
        raise UserError(f"{where}: {error.message}", hint=error.hint) from None
    return mix
