"""From presets and overrides to a config: sparse YAML, dotted overrides; a setting that is not known is refused."""

import difflib
import json
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from thinkimg.config.tree import Config
from thinkimg.errors import UserError
from thinkimg.rewards.settings import ImageConfig
from thinkimg.settings import Composite, Settings, Variant

RENAMED = {"rewards.number_tolerance": "rewards.answer.number_tolerance"}
"""Old name of a setting -> its name now."""


def presets() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("thinkimg.presets").iterdir() if p.name.endswith(".yaml")
    )


def sections(model: type[Settings], path: str = "") -> Iterator[tuple[str, type[Variant] | type[Composite]]]:
    """Yield the sections that are made of registries' entries, by their dotted names."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Variant | Composite):
            yield f"{path}{name}", kind
        elif isinstance(kind, type) and issubclass(kind, Settings):
            yield from sections(kind, f"{path}{name}.")


SECTIONS = dict(sections(Config))
CHOOSERS = {f"{path}.{kind.chooser}" for path, kind in SECTIONS.items()}
"""data.source, image.types and the like: they decide which other settings there are."""


def load(preset: str = "development", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Return the resolved config of a preset (a name or the path of a YAML file) with overrides like
    "train.loss.beta=0.01".

    The working directory is put onto sys.path, for a user's own modules. Raises UserError with one sentence for an
    unknown preset or key and for a value that does not fit.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    tree = {"preset": Path(preset).stem if preset.endswith((".yaml", ".yml")) else preset} | read_preset(preset)
    for key, value in sorted(map(parse, overrides), key=lambda change: change[0] not in CHOOSERS):
        if key in CHOOSERS:
            tree = merge(tree, nest(key.split("."), value))
            continue
        if key.startswith("mix."):  # one weight of the mix, and not a mix of this one alone
            tree.setdefault("mix", dict(Config.model_fields["mix"].default))
        if key.startswith("image.weights."):
            weights = ImageConfig.model_fields["weights"].default
            tree["image"] = merge({"weights": weights}, tree.get("image", {}))
        assign(tree, key.split("."), value)
    return validate(tree)


def parse(override: str) -> tuple[str, Any]:
    """Return (dotted name, value) of an override. Raises UserError where it is none."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"The override '{override}' has no value.", hint="Write it as a.b=value.")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"The value of '{override}' is no YAML.", hint="Quote texts with special characters.") from None


def read_preset(preset: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the tree of a preset, merged over the one that it extends (by name, or by a path relative to its own
    file)."""
    path = Path(preset)
    if preset in seen:
        raise UserError(f"The preset {preset} extends itself: {' -> '.join([*seen, preset])}.")
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"There is no preset file {preset}.", hint=f"Presets by name: {', '.join(presets())}.")
        text = path.read_text(encoding="utf-8")
    elif preset in presets():
        text = resources.files("thinkimg.presets").joinpath(f"{preset}.yaml").read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(preset, presets(), 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(presets())}, or the path of a .yaml file."
        raise UserError(f"There is no preset named '{preset}'.", hint=hint)
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"The preset {preset} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"The preset {preset} is no mapping of settings.", hint="Start from `thinkimg schema`.")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if str(base).endswith((".yaml", ".yml")):
        base = str(path.parent / base)
    return merge(read_preset(str(base), (*seen, preset)), tree)


def merge(base: Mapping[str, Any], top: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return top over base, mappings merged key by key; `mix` is replaced whole, since half of another mix is no mix.

    Where top chooses other entries of a registry, what base says of its own entries goes.
    """
    merged = dict(base)
    for key, value in top.items():
        deep = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "mix"
        merged[key] = merge(base[key], value, f"{path}.{key}".strip(".")) if deep else value
    kind = SECTIONS.get(path)
    if kind is None or kind.chooser not in top:
        return merged
    gone = names(kind, base) - names(kind, merged) - top.keys()
    return {key: value for key, value in merged.items() if key not in gone}


def names(kind: type[Variant] | type[Composite], section: Mapping[str, Any]) -> set[str]:
    """Return the names of the settings that a section has; none where it names an entry that is not there, which
    validation says."""
    try:
        return set(kind.names(section))
    except UserError:
        return set()


def nest(keys: list[str], value: Any) -> dict[str, Any]:
    """Return the tree that holds the value under the keys, and nothing else."""
    tree: dict[str, Any] = {}
    assign(tree, keys, value)
    return tree


def assign(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Put the value under the keys, in place."""
    for key in keys[:-1]:
        inner = tree.get(key)
        tree[key] = inner = dict(inner) if isinstance(inner, dict) else {}
        tree = inner
    tree[keys[-1]] = value


def validate(tree: dict[str, Any]) -> Config:
    """Return the config. Raises UserError with one sentence for the first setting that does not fit."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(*explain(dict(error.errors()[0]), tree)) from None


def explain(error: dict[str, Any], tree: Mapping[str, Any]) -> tuple[str, str]:
    """Return one sentence and a hint for pydantic's first complaint."""
    *above, last = where = [str(part) for part in error["loc"]] or [""]
    name, place = ".".join(where), ".".join(above)
    if name in RENAMED:
        return f"The setting '{name}' is now called '{RENAMED[name]}'.", ""
    if error["type"] == "extra_forbidden":
        kind = SECTIONS.get(place)
        if kind is not None and (owners := kind.owners(last)):
            return belongs(name, kind, owners, place)
        known = kind.names(subtree(above, tree)) if kind else list(section(above, tree).model_fields)
        near = difflib.get_close_matches(last, known, 1)
        hint = f"At {place or 'the top level'} there are {', '.join(known)}."
        return f"There is no setting '{name}'.", f"Did you mean {'.'.join([*above, near[0]])}?" if near else hint
    if error["type"] == "missing":
        return f"The setting '{name}' is missing.", " ".join(
            (section(above, tree).model_fields[last].description or "").split()
        )
    if error["type"] == "value_error":
        cause = error["ctx"]["error"]
        message, hint = (cause.message, cause.hint) if isinstance(cause, UserError) else (str(cause), "")
        return message if message.endswith(".") else f"{message}.", hint
    given = json.dumps(error["input"], default=str)
    return f"The setting '{name}' does not fit ({given}): {error['msg']}.", "See `thinkimg schema`."


def belongs(name: str, kind: type[Variant] | type[Composite], owners: list[str], place: str) -> tuple[str, str]:
    """Return one sentence and a hint for a setting of entries that are not in use."""
    chooser = f"{place}.{kind.chooser}"
    if issubclass(kind, Variant):
        listed = " or ".join([", ".join(owners[:-1]), owners[-1]]) if len(owners) > 1 else owners[0]
        choice = f"{chooser}={owners[0]}" if len(owners) == 1 else f"{chooser} to one of them"
        return f"The setting '{name}' belongs to {kind.chooser} {listed}.", f"Set {choice}, or leave it out."
    return f"The setting '{name}' belongs to {owners[0]}, which is not among {chooser}.", "Add it, or leave this out."


def subtree(path: list[str], tree: Any) -> Mapping[str, Any]:
    """Return what a tree says at a path; empty where it says nothing there."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def section(path: list[str], tree: Mapping[str, Any]) -> type[Settings]:
    """Return the class of the settings at a path of a tree."""
    kind: type[Settings] = Config
    for depth, part in enumerate(path):
        said = subtree(path[:depth], tree)
        entries = kind.entries(said) if issubclass(kind, Composite) else {}
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else entries.get(part)
        options = [annotation, *getattr(annotation, "__args__", ())]
        kind = next((one for one in options if isinstance(one, type) and issubclass(one, Settings)), Settings)
        if issubclass(kind, Variant):
            kind = kind.choose(subtree(path[: depth + 1], tree))
    return kind
