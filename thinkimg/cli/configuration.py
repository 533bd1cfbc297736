"""Page docs/configuration.md: every setting with its docstring, and every preset; `thinkimg schema --markdown`."""

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from importlib import resources
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from thinkimg.config.load import RENAMED, list_presets
from thinkimg.config.tree import Config
from thinkimg.images.toolbox import load_tools
from thinkimg.settings import Composite, Settings, Variant

HEAD = """\
# Configuration

This page is made from the docstrings of the settings: `thinkimg schema --markdown > docs/configuration.md`.

A run starts from a preset and takes overrides. A preset is a sparse YAML file: the rest has the defaults below.

    thinkimg run --preset tiny --dry-run                       # a preset by name; prints the resolved settings
    thinkimg run --preset my.yaml --set train.steps=4 --set rollout="{samples: 32, group_size: 4}"

- **extends**: a file can start from another preset or file (`extends: balanced`) and change some of its settings.
  A path is relative to the file that names it. Sections are merged key by key, `mix` is replaced as a whole.
- **--set a.b=value** changes one setting, or a section by a YAML mapping; quote it for the shell. It may be repeated.
  A setting that is a text takes all behind the `=` as it is, without quotes of its own, and `null` where that is
  allowed. Numbers, switches, lists and mappings are YAML. `mix.answer=0.5` changes one weight of the mix.
- **A path** may begin with `~`. It is relative to the directory in which the command runs.
- **Settings of entries**: a section such as `train.loss` has the settings of the entry that is chosen, here by
  `loss_type`. Settings of entries that are not in use are refused. So is every name that does not exist.
- **Another choice** drops what the extended preset says about entries that are no longer in use.
- **Your own entries** have their settings at the same place; see [extending](extending.md).
- **An editor** checks and completes YAML by the JSON Schema that `thinkimg schema` prints.
- **Fingerprints**: a changed setting makes only those artifacts anew whose stage reads it. `where` is recorded in
  manifests and never part of a fingerprint, so that a run can go on elsewhere.

In the tables *required* means that there is no default, and `null` that nothing is set.
"""


def page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD, *sections(Config, ""), "## Renamed settings\n", table(("before", "now"), RENAMED.items())]
    parts.append("## Tools\n\nThe model calls them so; each also takes `image`, `current` or `original` or an index.\n")
    signatures = ((f"`{sentence(tool.signature())}`", sentence(tool.description)) for tool in load_tools().values())
    parts.append(table(("tool", "meaning"), signatures))
    parts.append("## Presets\n\nEach file as it is; a preset that `extends` another says only what differs.\n")
    for name in list_presets():
        text = resources.files("thinkimg.presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        parts.append(f"### {name}\n\n```yaml\n{text}```\n")
    return "\n".join(parts)


def sections(kind: type[Settings], name: str, doc: str = "") -> Iterator[str]:
    """Yield the chapters of a section: its own fields, the entries of its registry, the sections within."""
    yield f"## {f'`{name}`' if name else 'Top level'}\n"
    if text := vars(kind).get("__doc__") or doc:
        yield f"{textwrap.fill(sentence(text), 120, break_on_hyphens=False)}\n"
    inner = dict(kind.model_fields)
    yield from fields(inner)
    if issubclass(kind, Variant | Composite):
        yield entries(f"{name}.{kind.chooser}", {entry: kind.registry[entry] for entry in kind.registry.shipped})
    if issubclass(kind, Variant):
        for names, own in variants(kind).items():
            inner |= own
            if tables := list(fields(own)):
                yield f"### `{name}.{kind.chooser}`: {', '.join(names)}\n"
                yield from tables
    for key, field in inner.items():
        if section := section_of(field.annotation):
            yield from sections(section, f"{name}.{key}".strip("."), field.description or "")
    if issubclass(kind, Composite):
        for entry in kind.registry.shipped:
            if section := getattr(kind.registry[entry], "Settings", None):
                yield from sections(section, f"{name}.{entry}")


def variants(kind: type[Variant]) -> dict[tuple[str, ...], dict[str, FieldInfo]]:
    """Return names of entries -> the fields that these entries have and others have not."""
    shared: dict[type[Settings], tuple[str, ...]] = {}
    for entry in kind.registry.shipped:
        for base in reversed(kind.choose({kind.chooser: entry}).__mro__):
            if issubclass(base, kind) and base is not kind:
                shared[base] = (*shared.get(base, ()), entry)
    groups: dict[tuple[str, ...], dict[str, FieldInfo]] = {}
    for base, names in shared.items():
        own = vars(base).get("__annotations__", {})
        groups.setdefault(names, {}).update({key: base.model_fields[key] for key in own if key != kind.chooser})
    return groups


def fields(own: Mapping[str, FieldInfo]) -> Iterator[str]:
    """Yield the table of the fields that hold a value; none where there are sections alone."""
    rows = []
    for key, field in own.items():
        if section_of(field.annotation) is field.annotation:
            continue
        default = "*required*" if field.is_required() else f"`{json.dumps(field.default, ensure_ascii=False)}`"
        rows.append((f"`{key}`", type_of(field.annotation, field.metadata), default, sentence(field.description or "")))
    if rows:
        yield table(("setting", "type", "default", "meaning"), rows)


def entries(chooser: str, modules: Mapping[str, ModuleType]) -> str:
    """Return the table of a registry's own entries: name and first paragraph of the module's docstring."""
    rows = [(f"`{name}`", sentence((module.__doc__ or "").split("\n\n")[0])) for name, module in modules.items()]
    return table((f"`{chooser}`", "meaning"), rows)


def section_of(annotation: Any) -> type[Settings] | None:
    """Return the section that a field holds, or may hold."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), None)


def type_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return type and limits, as in `int ≥ 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return type_of(arguments[0], annotation.__metadata__)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_of(argument, metadata) for argument in arguments)
    if origin is tuple:
        return f"list of {type_of(arguments[0])}"
    if origin is dict:
        return f"map of {type_of(arguments[0])} to {type_of(arguments[1])}"
    if annotation is NoneType:
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return ", ".join(f"`{value}`" for value in annotation)
    limits: dict[str, float] = {}
    for item in metadata:
        for limit in item.metadata if isinstance(item, FieldInfo) else [item]:
            limits |= {name: getattr(limit, name) for name in ("ge", "gt", "le", "lt") if hasattr(limit, name)}
    name = "section" if issubclass(annotation, Settings) else annotation.__name__
    if limits.keys() == {"ge", "le"}:
        return f"{name} from {limits['ge']} to {limits['le']}"
    if limits.keys() == {"ge", "lt"}:
        return f"{name} from {limits['ge']} to {limits['lt'] - 1}"
    return name + "".join(f" {'>' if limit == 'gt' else '≥'} {value}" for limit, value in limits.items())


def sentence(text: str) -> str:
    """Return a docstring as one line of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
