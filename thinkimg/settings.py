"""Base classes of all settings: frozen, and strict about their names.

    Settings         a section, or the settings of an entry of a registry
    ├── Variant      a section that belongs to one entry: `train.loss`, chosen by `loss_type`
    └── Composite    a section with a field for each entry in use: `image`, with `image.teacher`

A setting of an entry that is not in use does not exist.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from thinkimg.errors import UserError, shorten
from thinkimg.keys import check_variable
from thinkimg.redaction import without_password
from thinkimg.registry import Registry, short_name
from thinkimg.user_paths import expand_path


def check_url(text: str) -> str:
    """Return an address such as http://host:8000/v1. Raises UserError for what can't be one, or has a query."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number, of half a pair of brackets
        usable = False
    if not usable or not text.isascii() or not text.isprintable() or any(mark in text for mark in " ?#"):
        shown = shorten(without_password(text))
        raise UserError(f"{shown!a} is no address.", hint="Write it as http://host:8000/v1, without a query.")
    return text


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(min_length=1)]
FilePath = Annotated[str, AfterValidator(expand_path)]
KeyVariable = Annotated[str, BeforeValidator(check_variable)]
"""Name of an environment variable that holds a key."""
Url = Annotated[str, AfterValidator(check_url)]


class Settings(BaseModel):
    """A section of settings, frozen; unknown names are refused, and so is what is no finite number."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _proper_number(cls, value: Any, info: Any) -> Any:
        """Refuse true where a number is wanted, which pydantic would read as 1, and what no library holds."""
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in inner) and _is_number(cls, info.field_name):
            raise ValueError(f"{info.field_name} is a number, and can't be true or false")
        if any(isinstance(item, int) and abs(item) >= 2**63 for item in inner):
            raise ValueError(f"{info.field_name} is too large")
        return value

    def sources(self) -> dict[str, str]:
        """Return import path -> sha256 of a user's own code that these settings name, for a fingerprint."""
        sections = [value for _, value in self if isinstance(value, Settings)]
        return {path: digest for section in sections for path, digest in section.sources().items()}


class Variant(Settings):
    """Settings of the entry of a registry that a field names.

    A base class sets `registry`, `chooser` and the chooser's default. An entry's module defines `class
    Settings(<base>)`. Where the base is a field's type or is called, the class of the named entry is used instead.
    """

    registry: ClassVar[Registry]
    chooser: ClassVar[str]

    def __new__(cls, **fields: Any) -> Self:
        return super().__new__(cls.choose(fields))

    @classmethod
    def choose(cls, fields: Mapping[str, Any]) -> type[Self]:
        """Return the class of the entry that the fields name. Raises UserError if there is none."""
        if "registry" not in vars(cls):
            return cls
        name = fields.get(cls.chooser, cls.model_fields[cls.chooser].default)
        if not isinstance(name, str):
            raise UserError(f"The {cls.chooser} {name!r} is no name.", hint=f"There are {', '.join(cls.registry)}.")
        kind = cls.registry.member(name, "Settings")
        if not (isinstance(kind, type) and issubclass(kind, cls)):
            raise UserError(f"{kind!r} is no subclass of {cls.__name__}.", hint=f"class Settings({cls.__name__}): …")
        return kind

    @classmethod
    def names(cls, fields: Mapping[str, Any]) -> list[str]:
        """Return the names of all settings of the entry that the fields name."""
        return list(cls.choose(fields).model_fields)

    @classmethod
    def owners(cls, name: str) -> list[str]:
        """Return the entries that have a setting of this name."""
        return [entry for entry in cls.registry if name in cls.choose({cls.chooser: entry}).model_fields]

    def sources(self) -> dict[str, str]:
        """Return import path -> sha256 of a user's own code, the entry's included."""
        return super().sources() | self.registry.sources((getattr(self, self.chooser),))

    @classmethod
    def _validated(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        return cls.choose(value if isinstance(value, Mapping) else {}).model_validate(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        if "registry" not in vars(cls):
            return handler(source)
        return core_schema.no_info_plain_validator_function(cls._validated)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> Any:
        if "registry" not in vars(cls):
            return handler(schema)
        kinds = {name: cls.choose({cls.chooser: name}) for name in cls.registry}
        entries = [handler(kind.__pydantic_core_schema__) | {"title": name} for name, kind in kinds.items()]
        return {"oneOf": entries, "discriminator": {"propertyName": cls.chooser}}


@cache
def _model_of(name: str, kinds: tuple[tuple[str, type[Settings]], ...]) -> type[Settings]:
    """Return a model with a field for each entry's settings, cached, as pydantic takes milliseconds to make one."""
    fields: dict[str, Any] = {entry: (kind, Field(default_factory=kind)) for entry, kind in kinds}
    return create_model(name, __base__=Settings, **fields)


class Composite(Settings):
    """Settings with a further field for each entry in use that has settings, under the last part of its name.

    A subclass sets `registry`, and `chooser`, a field of names. The entries of `always` are in use, too.
    """

    model_config = ConfigDict(extra="allow")
    registry: ClassVar[Registry]
    chooser: ClassVar[str]
    always: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:  # an entry's settings

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def entries(cls, fields: Mapping[str, Any]) -> dict[str, type[Settings]]:
        """Return short name -> class of the settings of each entry in use. Raises UserError for an unknown entry."""
        chosen = fields.get(cls.chooser, cls.model_fields[cls.chooser].default)
        listed = [name for name in chosen if isinstance(name, str)] if isinstance(chosen, list | tuple) else []
        kinds = {short_name(name): getattr(cls.registry[name], "Settings", None) for name in (*cls.always, *listed)}
        return {name: kind for name, kind in kinds.items() if kind is not None}

    @classmethod
    def names(cls, fields: Mapping[str, Any]) -> list[str]:
        """Return the names of all settings with the entries that the fields name."""
        return [*cls.model_fields, *cls.entries(fields)]

    @classmethod
    def owners(cls, name: str) -> list[str]:
        """Return the entries whose settings have this name."""
        return [
            entry for entry in cls.registry if short_name(entry) == name and hasattr(cls.registry[entry], "Settings")
        ]

    def sources(self) -> dict[str, str]:
        """Return import path -> sha256 of a user's own code, the entries' included."""
        return super().sources() | self.registry.sources(getattr(self, self.chooser))

    @model_validator(mode="before")
    @classmethod
    def _validated(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        kinds = cls.entries(fields)
        if clashes := kinds.keys() & cls.model_fields.keys():
            raise UserError(
                f"An entry of the {cls.registry.kind} cannot be called '{min(clashes)}'.", hint="Rename its file."
            )
        shared = {name: value for name, value in fields.items() if name in cls.model_fields}
        own = {name: value for name, value in fields.items() if name not in cls.model_fields}
        return shared | dict(_model_of(cls.__name__, tuple(kinds.items())).model_validate(own))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> Any:
        json_schema = handler.resolve_ref_schema(reference := handler(schema))
        for name in cls.registry:
            if kind := getattr(cls.registry[name], "Settings", None):
                json_schema["properties"][short_name(name)] = handler(kind.__pydantic_core_schema__)
        return reference


@dataclass(frozen=True)
class EntryName:
    """Annotation of a text that names an entry of a registry, by name or by a user's import path."""

    registry: Registry
    member: str
    """Attribute that the entry's module must have."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return handler(schema) | {"examples": list(self.registry)}

    def check(self, name: str) -> str:
        """Return the name. Raises UserError if it names no entry."""
        self.registry.member(name, self.member)
        return name


def find_kinds(annotation: Any) -> Iterator[Any]:
    """Yield a type and the types within it, as int and None in `Annotated[int, …] | None`."""
    yield annotation
    for part in get_args(annotation):
        yield from find_kinds(part)


@cache
def _is_number(section: type[Settings], name: str) -> bool:
    kinds = list(find_kinds(section.model_fields[name].annotation)) if name in section.model_fields else []
    return (int in kinds or float in kinds) and bool not in kinds
