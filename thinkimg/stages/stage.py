"""Stage, stated once: the artifact that it makes, its inputs, parameters and settings, and its run.

Fingerprint, command, flow and form, deployment, dry run and lineage follow from this.

    config ──► settings (a frozen slice) ─┐
    inputs ──► by name, or by origin ─────┼─► recipe ──► fingerprint ──► store.build(run) ──► artifact
    parameters ───────────────────────────┘
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from pydantic import Field

from thinkimg.config.tree import Config
from thinkimg.models.family import find_sources
from thinkimg.records import SCHEMA_VERSION
from thinkimg.resource_settings import ResourcesConfig
from thinkimg.resources import Resources
from thinkimg.settings import Settings
from thinkimg.store.artifacts import Store, Work
from thinkimg.store.image_table import image_writer
from thinkimg.store.kinds import TypedArtifact
from thinkimg.store.manifest import Artifact, Recipe, Reference, package_versions

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (done, total), from whatever thread."""
Mapper = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]
"""Maps a function over items, results in order: `map`, an executor's, or one of a Prefect task runner."""


class Slice(Settings):
    """Settings of one stage, handed to it in place of the config.

    Each field enters the fingerprint but those with `Field(exclude=True)`. Those are covered by an input's digest (the
    path of a base model), or decide whether there is an output and not what it is.
    """

    family: str | None = Field(default=None, exclude=True)
    """Name of the model's family, for the manifest; None where the stage makes the same for every model."""

    def fingerprinted(self) -> dict[str, Any]:
        """Return the settings that enter the fingerprint, as JSON."""
        return self.model_dump(mode="json")

    def sources(self) -> dict[str, str]:
        return super().sources() | (find_sources(self.family) if self.family else {})


S = TypeVar("S", bound=Slice)


@dataclass(frozen=True)
class Parameter:
    """Parameter of a run beside config and inputs: a flag of its command and a field of its form."""

    type: Any
    """With its limits, as `Annotated[int, Field(ge=1)]`."""
    default: Any
    description: str


@dataclass(frozen=True)
class Lineage:
    """Origin of an input: an artifact from which another input was made."""

    input: str
    role: str
    first: bool = False
    """Follow the role back to the first artifact, which was made from none."""


@dataclass(frozen=True)
class Input:
    """Artifact that a stage reads."""

    kind: type[TypedArtifact]
    origin: "Lineage | Stage[Any] | None" = None
    """Source if it is not handed in: the lineage of another input, or a stage that is run before. None: it must be
    handed in."""
    counts: Callable[[Config], bool] = lambda config: True
    """True where the stage reads it under these settings."""
    shown: bool = False
    """True if it can be named by hand though it has an origin."""
    implied: bool = False
    """True if another input's digest covers it, so that it does not enter the fingerprint itself."""
    ambiguous: Callable[[Config], str] = lambda config: ""
    """Reason why its origin may name another artifact under these settings, so that it has to be handed in; or ""."""


@dataclass(frozen=True)
class Job(Generic[S]):
    """Arguments of a stage's run."""

    settings: S
    inputs: Mapping[str, Any]
    """Role -> typed artifact, for those that are read under these settings."""
    work: Work
    store: Store
    resources: Resources
    progress: Progress
    map: Mapper
    early: Work | None = None
    """Work of the stage's early part; None where it has none, and within it."""


@dataclass(frozen=True)
class Early(Generic[S]):
    """Part of a stage that runs while one of its inputs is still being made, on what is closed of it."""

    follows: str
    """Role of that input."""
    run: Callable[[Job[S], Iterable[TypedArtifact]], frozenset[str]]
    """Called with a job that has a work of its own, and with the input as it is when it has begun and whenever more of
    it is closed; the last time it is complete. The job's inputs are those without it. Returns the names of the
    resources that the stage occupies besides its own, to make up for what this part has left."""
    uses: Callable[[Config], frozenset[str]]
    """Names of the resources that it occupies, the engine with the stage's own player."""


@dataclass(frozen=True)
class Stage(Generic[S]):
    """One box of the picture."""

    name: str
    """Name in fingerprints and manifests."""
    version: int
    """Raised with any change of behaviour."""
    makes: type[TypedArtifact]
    settings: Callable[..., S]
    """Function (config, **parameters) -> slice. Raises UserError where they do not fit."""
    run: Callable[[Job[S]], None]
    reads: Mapping[str, Input] = field(default_factory=dict)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    offers: Mapping[str, Parameter] = field(default_factory=dict)
    """Settings with a field of their own in its form, beside preset and overrides."""
    packages: Callable[[S], Iterable[str]] = lambda settings: ()
    """Packages whose versions define the output."""
    outside: Callable[[S], Mapping[str, Reference]] = lambda settings: {}
    """Inputs that are no artifacts: a user's files, weights from the Hub."""
    loads: Callable[[S, Mapping[str, Artifact]], Mapping[str, str]] = lambda settings, inputs: {}
    """User's own modules that an input names and the run calls again -> sha256 of the file."""
    uses: Callable[[Config], frozenset[str]] = lambda config: frozenset()
    """Names of the resources that it occupies: engine, teacher, trainer."""
    player: str | None = None
    """Role of the policy that the engine holds."""
    early: Early[S] | None = None
    """Part that a pipeline runs before `run`, which does what is left. `run` is handed its work; that is removed when
    the artifact is complete."""
    check: Callable[[Config], None] = lambda config: None
    """Raises UserError where a run would fail, before anything runs."""
    wanted: Callable[[Config], bool] = lambda config: True
    """True where the pipeline has the stage under these settings."""
    warn: Callable[[S, Mapping[str, Artifact], Store], str] = lambda settings, inputs, store: ""
    """Sentence about inputs that were made under other settings, for every call; "" where there is nothing to say."""
    report: Callable[[Artifact], str] = lambda artifact: ""
    """Line about its artifact for a person who runs the stage by itself, or ""."""
    tidy: Callable[[Store, Artifact, ResourcesConfig], None] = lambda store, artifact, where: None
    """Called when the artifact is complete, or was so before."""
    label: str = ""
    """Name for people; by default `name`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)

    @property
    def help(self) -> str:
        """First line of its module's docstring."""
        return (inspect.getdoc(inspect.getmodule(self.run)) or "").partition("\n")[0]

    def required(self) -> Iterator[str]:
        """Yield the roles that must be handed in."""
        return (role for role, entry in self.reads.items() if entry.origin is None)

    def counting(self, config: Config) -> dict[str, Input]:
        """Return the inputs that are read under these settings, by role."""
        return {role: entry for role, entry in self.reads.items() if entry.counts(config)}

    def recipe(self, settings: S, inputs: Mapping[str, Artifact]) -> Recipe:
        """Return the recipe: all that defines the output. inputs: by role."""
        given = {
            role: artifact.reference
            for role, artifact in inputs.items()
            if role in self.reads and not self.reads[role].implied
        }
        return Recipe(
            self.name,
            self.version,
            SCHEMA_VERSION,
            settings.fingerprinted(),
            given | dict(self.outside(settings)),
            settings.sources() | dict(self.loads(settings, inputs)),
            package_versions(*self.packages(settings)),
        )


def write_images(work: Work, name: str, images: Iterable[tuple[str, bytes, int, int]]) -> None:
    """Write a part of images, unless it is there: (content hash, encoded, width, height) of each."""
    if not work.has(name):
        with work.part(name) as path, image_writer(path) as add:
            for image in images:
                add(*image)


def list_inputs(stage: Stage[Any]) -> list[str]:
    """Return the roles of the inputs that can be named by hand, those first that must be."""
    roles = [role for role, entry in stage.reads.items() if entry.origin is None or entry.shown]
    return sorted(roles, key=lambda role: stage.reads[role].origin is not None)


def load_stage(name: str) -> Stage[Any]:
    """Return the stage of the module of this name in this folder."""
    assert find_spec(f"{__package__}.{name}"), name
    return getattr(import_module(f"{__package__}.{name}"), name)
