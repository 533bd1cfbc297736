"""Choice of a data set's tables among the files of its repository: by its card, or by the names of the files."""

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from thinkimg.errors import UserError, name_some, shorten

TABLES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")
MAX_CARD = 2**20
"""Bytes of a card that are read; its settings stand at the beginning."""
SHARD = re.compile(r"(?P<split>\w[\w.-]*?)-[0-9]{5}-of-(?P<count>[0-9]{5})")
"""Name of a shard as the Hub's library writes it; after it may stand a hash."""
WORDS = {
    "train": re.compile(r"(?<![a-z])train(ing)?(?![a-z])"),
    "validation": re.compile(r"(?<![a-z])(val|valid|validation|dev)(?![a-z])"),
    "test": re.compile(r"(?<![a-z])(test|testing|eval|evaluation)(?![a-z])"),
}
"""Words in the path of a table that say its split, as the Hub's library reads them."""
SHOWN = 8


@dataclass(frozen=True)
class Card:
    """Settings at the beginning of a card. configs: name of a configuration -> split -> patterns of its files."""

    configs: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    default: str | None = None
    licence: str | None = None


def read_card(text: str) -> Card:
    """Return the settings of a card (README.md); none of them where it has none, or can't be read."""
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
    try:
        settings = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return Card()
    if not isinstance(settings, Mapping):
        return Card()
    licence = settings.get("license")
    licence = settings.get("license_name", licence) if licence == "other" else licence
    entries = settings.get("configs")
    configs: dict[str, dict[str, tuple[str, ...]]] = {}
    default = None
    for entry in entries if isinstance(entries, list) else ():
        is_named = isinstance(entry, Mapping) and isinstance(entry.get("config_name"), str)
        if is_named and (patterns := _data_files(entry)):
            configs[entry["config_name"]] = patterns
            default = entry["config_name"] if entry.get("default") is True else default
    return Card(configs, default, licence if isinstance(licence, str) else None)


def _data_files(entry: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return split -> patterns of a configuration, below a folder of its own; none where it names no files."""
    value = entry.get("data_files")
    folder = entry.get("data_dir")
    folder = f"{folder.strip('/')}/" if isinstance(folder, str) and folder.strip("/.") else ""
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        value = [{"split": "train", "path": value}]
    splits: dict[str, tuple[str, ...]] = {}
    for one in value if isinstance(value, list) else ():
        if isinstance(one, Mapping) and one.get("split") is not None:
            paths = one.get("path")
            listed = [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else []
            patterns = tuple(folder + path.removeprefix("./") for path in listed if isinstance(path, str))
            splits[str(one["split"])] = splits.get(str(one["split"]), ()) + patterns
    return splits


def choose_tables(names: Collection[str], card: Card, config: str | None, split: str | None, id: str) -> list[str]:
    """Return the tables of a split, sorted.

    names: all files of the repository. split: by default train, or the only one.
    Raises UserError where there is no such configuration or split, and where it is unclear which tables are meant.
    """
    if card.configs and (config is None or config in card.configs):
        splits = card.configs[_choose_config(card, config, id)]
        split = _choose_split(splits, split, id)
        chosen = [name for name in names if is_table(name) and any(matches(name, one) for one in splits[split])]
        if not chosen:
            detail = name_some(splits[split], SHOWN)
            raise UserError(f"No table of {id} fits {detail}, which its card names for {split}.", hint=HINT)
        return sorted(chosen)
    paired = set(find_pairs(names))
    tables = [name for name in names if is_table(name) and name not in paired]
    if config is not None:
        inside = [name for name in tables if name.startswith(f"{config}/")]
        if not inside:
            folders = sorted({*card.configs, *(name.split("/")[0] for name in tables if "/" in name)})
            raise _missing("configuration", config, folders, id, hint_name=None)
        tables = inside
    by_split = group_by_split(tables)
    if not by_split:
        return []
    chosen = sorted(by_split[_choose_split(by_split, split, id)])
    if len({PurePosixPath(name).suffix for name in chosen}) > 1:
        raise UserError(f"{id} holds tables of several kinds: {name_some(chosen, SHOWN)}.", hint=HINT)
    return chosen


HINT = "Set data.files to the pattern of the tables to read."


def group_by_split(tables: Sequence[str]) -> dict[str, list[str]]:
    """Return split -> tables, by the names of shards, or else by words in their paths; those without one are train.

    Where some tables name a split, the others are none of any.
    """
    shards: dict[str, list[str]] = {}
    words: dict[str, list[str]] = {}
    for name in tables:
        if match := SHARD.match(PurePosixPath(name).name):
            shards.setdefault(match["split"], []).append(name)
        for split, word in WORDS.items():
            if word.search(PurePosixPath(name).name.lower()) or word.search(str(PurePosixPath(name).parent).lower()):
                words.setdefault(split, []).append(name)
                break
    return shards or words or ({"train": list(tables)} if tables else {})


def missing_shards(names: Collection[str]) -> list[str]:
    """Return tables of which some shards are not among the names, such as of a download that was cut off."""
    present: dict[tuple[str, int], int] = {}
    for path in map(PurePosixPath, names):
        if match := SHARD.match(path.name):
            key = (f"{path.parent}/{match['split']}", int(match["count"]))
            present[key] = present.get(key, 0) + 1
    return [f"{stem} ({count} of {total})" for (stem, total), count in present.items() if count < total]


def is_table(name: str) -> bool:
    """Tell whether a file of a repository is a table, and no hidden file or description of one."""
    path = PurePosixPath(name)
    is_hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in TABLES and path.name.lower() not in DESCRIPTIONS and not is_hidden


def is_picture(name: str) -> bool:
    """Tell whether a file of a repository is a picture, or a ZIP archive that may hold some; one of videos is none."""
    path = PurePosixPath(name.lower())
    return path.suffix in PICTURES or (path.suffix == ".zip" and "video" not in path.name)


def matches(name: str, pattern: str) -> bool:
    """Tell whether a path fits a pattern of a card: `*` stays within a directory, a part `**` is any number of them."""
    places = {0}  # of the pattern's parts, of which those before fit the name's parts so far
    wanted = pattern.split("/")
    for part in name.split("/"):
        reached = {place + 1 for place in _skip(places, wanted) if place < len(wanted) and _fits(part, wanted[place])}
        places = reached | {place for place in _skip(places, wanted) if place < len(wanted) and wanted[place] == "**"}
    return len(wanted) in _skip(places, wanted)


def _skip(places: set[int], wanted: Sequence[str]) -> set[int]:
    """Return the places with those behind each `**`, which may be no directory at all."""
    for place in range(len(wanted)):
        if place in places and wanted[place] == "**":
            places = places | {place + 1}
    return places


def _fits(part: str, wanted: str) -> bool:
    return wanted == "**" or fnmatch.fnmatchcase(part, wanted)


def find_pairs(names: Collection[str]) -> list[str]:
    """Return the .json files that lie beside a picture of the same name, sorted."""
    stems = {name.rpartition(".")[0] for name in names if name.lower().endswith(PICTURES)}
    return sorted(name for name in names if name.lower().endswith(".json") and name[: -len(".json")] in stems)


def _choose_config(card: Card, config: str | None, id: str) -> str:
    if config is not None:
        return config
    if len(card.configs) == 1:
        return next(iter(card.configs))
    default = card.default or ("default" if "default" in card.configs else None)
    if default is None:
        listed = name_some(sorted(card.configs), SHOWN)
        raise UserError(f"{id} has several configurations: {listed}.", hint="Set data.hub_config to one of them.")
    return default


def _choose_split(splits: Mapping[str, Any], split: str | None, id: str) -> str:
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        raise _missing("split", split, splits, id, hint_name=f"{id}@{next(iter(splits))}")
    return split


def _missing(what: str, name: str, known: Collection[str], id: str, *, hint_name: str | None) -> UserError:
    listed = name_some(known, SHOWN, 60) or "none"
    hint = f"Name one of them, such as {hint_name}." if hint_name else "Set data.hub_config to one of them."
    return UserError(f"{id} has no {what} {shorten(name, 60)!a}: it has {listed}.", hint=hint)
