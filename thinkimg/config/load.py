"""Loading of a config from a sparse YAML preset and dotted overrides; an unknown setting is refused."""

import difflib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from thinkimg.config.tree import Config
from thinkimg.config.values import read_value, read_yaml_file, shown, split_override
from thinkimg.errors import UserError
from thinkimg.registry import allow_user_modules
from thinkimg.rewards.settings import ImageConfig
from thinkimg.settings import Composite, Settings, Variant
from thinkimg.user_paths import expand_path

RENAMED = {"rewards.number_tolerance": "rewards.answer.number_tolerance"}
"""Old name of a setting -> its name now."""


def list_presets() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("thinkimg.presets").iterdir() if p.name.endswith(".yaml")
    )


def find_sections(model: type[Settings], path: str = "") -> Iterator[tuple[str, type[Variant] | type[Composite]]]:
    """Yield (dotted name, class) of the sections whose settings depend on entries of a registry."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Variant | Composite):
            yield f"{path}{name}", kind
        elif isinstance(kind, type) and issubclass(kind, Settings):
            yield from find_sections(kind, f"{path}{name}.")


SECTIONS = dict(find_sections(Config))
CHOOSERS = {f"{path}.{kind.chooser}" for path, kind in SECTIONS.items()}
"""Names such as data.source and image.types: they decide which other settings there are."""


def load_config(preset: str = "development", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Return the config of a preset with overrides such as "train.loss.beta=0.01".

    preset: a name or the path of a YAML file. A user's own modules may lie in the working directory.
    Raises UserError, with one sentence, for an unknown preset or key and for a value that does not fit.
    """
    allow_user_modules()
    tree = {"preset": Path(preset).stem if is_file_name(preset) else preset} | read_preset(preset)
    for key, text in sorted(map(split_override, overrides), key=lambda change: rank_override(change[0])):
        value = read_value(key, text, find_kind(key.split("."), tree))
        if key in CHOOSERS:
            tree = merge(tree, nest(key.split("."), value))
            continue
        if key == "preset":
            raise UserError("An override can't choose the preset.", hint="Choose it by --preset.")
        if key.startswith("mix."):  # a single weight changes the default mix, it does not replace it
            tree.setdefault("mix", dict(Config.model_fields["mix"].default))
        if key.startswith("image.weights."):
            weights = ImageConfig.model_fields["weights"].default
            tree["image"] = merge({"weights": weights}, tree.get("image", {}))
        assign(tree, key.split("."), value)
    return validate(tree)


def rank_override(key: str) -> int:
    """Return the place of an override among the others: what decides which settings there are comes first."""
    return 0 if key in CHOOSERS else 1 if key == "data.path" else 2


def is_file_name(preset: str) -> bool:
    """Tell whether a preset is named by its file."""
    return preset.endswith((".yaml", ".yml"))


def read_preset(preset: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the tree of a preset, merged over the preset that it extends.

    `extends` is a name, or a path relative to the preset's own file. seen: the presets that extend this one.
    """
    if is_file_name(preset):
        path = Path(expand_path(preset)).absolute()
        if not path.is_file():
            raise UserError(f"There is no preset file {preset}.", hint=f"Presets by name: {', '.join(list_presets())}.")
    elif preset in list_presets():
        path = Path(str(resources.files("thinkimg.presets"))) / f"{preset}.yaml"
    else:
        near = difflib.get_close_matches(preset, list_presets(), 1)
        hint = (
            f"Did you mean {near[0]}?"
            if near
            else f"There are {', '.join(list_presets())}, or the path of a .yaml file."
        )
        raise UserError(f"There is no preset named '{shown(preset)}'.", hint=hint)
    name = str(path.resolve())
    if name in seen:
        raise UserError(f"The preset {preset} extends itself: {' -> '.join([*seen, name])}.")
    tree = read_yaml_file(path) or {}
    if not isinstance(tree, dict):
        raise UserError(f"The preset {preset} is no mapping of settings.", hint="Start from `thinkimg schema`.")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    base = str(path.parent / expand_path(str(base))) if is_file_name(str(base)) else str(base)
    return merge(read_preset(base, (*seen, name)), tree)


def merge(base: Mapping[str, Any], top: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return top over base, mappings merged key by key; `mix` is replaced, as part of another mix is no mix.

    Where top chooses other entries of a registry, the settings of base's entries are removed.
    """
    merged = dict(base)
    for key, value in top.items():
        deep = isinstance(value, dict) and isinstance(base.get(key), dict) and key != "mix"
        merged[key] = merge(base[key], value, f"{path}.{key}".strip(".")) if deep else value
    kind = SECTIONS.get(path)
    if kind is None or kind.chooser not in top:
        return merged
    unused = setting_names(kind, base) - setting_names(kind, merged) - top.keys()
    return {key: value for key, value in merged.items() if key not in unused}


def setting_names(kind: type[Variant] | type[Composite], section: Mapping[str, Any]) -> set[str]:
    """Return the names of the settings that a section has; none for an unknown entry, which validation reports."""
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
        raise UserError(*describe_mistake(dict(error.errors()[0]), tree)) from None


def describe_mistake(error: dict[str, Any], tree: Mapping[str, Any]) -> tuple[str, str]:
    """Return one sentence and a hint for pydantic's first complaint."""
    *above, last = path = [str(part) for part in error["loc"]] or [""]
    name, parent = ".".join(path), ".".join(above)
    if name in RENAMED:
        return f"The setting '{name}' is now called '{RENAMED[name]}'.", ""
    if error["type"] == "extra_forbidden":
        kind = SECTIONS.get(parent)
        if kind is not None and (owners := kind.owners(last)):
            return describe_unused(name, kind, owners, parent)
        siblings = kind.names(get_subtree(above, tree)) if kind else list(find_section(above, tree).model_fields)
        near = difflib.get_close_matches(last, siblings, 1)
        hint = f"At {parent or 'the top level'} there are {', '.join(siblings)}."
        return f"There is no setting '{name}'.", f"Did you mean {'.'.join([*above, near[0]])}?" if near else hint
    if error["type"] == "missing":
        return f"The setting '{name}' is missing.", " ".join(
            (find_section(above, tree).model_fields[last].description or "").split()
        )
    if error["type"] == "value_error":
        cause = error["ctx"]["error"]
        message, hint = (cause.message, cause.hint) if isinstance(cause, UserError) else (str(cause), "")
        return message if message.endswith(".") else f"{message}.", hint
    given = shown(json.dumps(error["input"], default=str, skipkeys=True, ensure_ascii=False))
    return f"The setting '{name}' does not fit ({given}): {error['msg']}.", "See `thinkimg schema`."


def describe_unused(
    name: str, kind: type[Variant] | type[Composite], owners: list[str], parent: str
) -> tuple[str, str]:
    """Return one sentence and a hint for a setting of entries that are not in use."""
    chooser = f"{parent}.{kind.chooser}"
    if issubclass(kind, Variant):
        listed = " or ".join([", ".join(owners[:-1]), owners[-1]]) if len(owners) > 1 else owners[0]
        choice = f"{chooser}={owners[0]}" if len(owners) == 1 else f"{chooser} to one of them"
        return f"The setting '{name}' belongs to {kind.chooser} {listed}.", f"Set {choice}, or leave it out."
    return f"The setting '{name}' belongs to {owners[0]}, which is not among {chooser}.", "Add it, or leave this out."


def get_subtree(path: list[str], tree: Any) -> Mapping[str, Any]:
    """Return the mapping at a path of a tree; an empty one where there is none."""
    for part in path:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def find_kind(path: list[str], tree: Mapping[str, Any]) -> Any:
    """Return the type of the setting at a path; None for an unknown one, which validation reports.

    A field that all entries share is found without a look at the entry that the tree chooses.
    """
    kind: Any = Config
    for depth, part in enumerate(path):
        options = [kind, *get_args(kind)]
        section = next(
            (option for option in options if isinstance(option, type) and issubclass(option, Settings)), None
        )
        if section is None:
            kind = get_args(kind)[1] if get_origin(kind) is dict and depth == len(path) - 1 else None
        elif part in section.model_fields:
            kind = section.model_fields[part].annotation
        else:
            try:
                kind = find_entry(section, part, get_subtree(path[:depth], tree))
            except UserError:
                kind = None
    return kind


def find_entry(section: type[Settings], name: str, fields: Mapping[str, Any]) -> Any:
    """Return the type of a setting that belongs to the entry which the fields of its section choose."""
    if issubclass(section, Composite):
        return section.entries(fields).get(name)
    own = section.choose({name: None} | dict(fields)).model_fields if issubclass(section, Variant) else {}
    return own[name].annotation if name in own else None


def find_section(path: list[str], tree: Mapping[str, Any]) -> type[Settings]:
    """Return the class of the settings at a path of a tree."""
    kind: type[Settings] = Config
    for depth, part in enumerate(path):
        entries = kind.entries(get_subtree(path[:depth], tree)) if issubclass(kind, Composite) else {}
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else entries.get(part)
        options = [annotation, *getattr(annotation, "__args__", ())]
        kind = next(
            (option for option in options if isinstance(option, type) and issubclass(option, Settings)), Settings
        )
        if issubclass(kind, Variant):
            kind = kind.choose(get_subtree(path[: depth + 1], tree))
    return kind
