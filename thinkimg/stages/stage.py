"""A stage, said once: what it makes, what it reads, what it is told, and how it runs.

Fingerprint, command, flow and form, deployment, dry run and lineage follow from this.

    config ──► settings (a frozen slice) ─┐
    inputs ──► by name, or by origin ─────┼─► recipe ──► fingerprint ──► store.build(run) ──► artifact
    parameters ───────────────────────────┘
"""

import builtins
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from thinkimg.config.tree import Config
from thinkimg.errors import UserError
from thinkimg.records import SCHEMA_VERSION
from thinkimg.resources import Resources
from thinkimg.settings import Settings
from thinkimg.store.artifacts import Artifact, Recipe, Reference, Store, Work, package_versions
from thinkimg.store.kinds import Typed

Progress = Callable[[int, int], None]
"""Called with (done, total), from whatever thread."""
Mapper = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]
"""Runs a function on items, results in order: `map`, an executor's, or one that submits tasks to a Prefect task runner."""


class Slice(Settings):
    """Settings of one stage, handed to it in place of the config.

    Each field is part of the fingerprint but those with `Field(exclude=True)`: what an input's digest says already (the
    path of a base model), and what decides whether there is an output, not which.
    """

    def fingerprinted(self) -> dict[str, Any]:
        """Return what enters the fingerprint, as JSON."""
        return self.model_dump(mode="json")


S = TypeVar("S", bound=Slice)


@dataclass(frozen=True)
class Parameter:
    """What a run is told beside config and inputs: a flag of its command and a field of its form."""

    type: Any
    """With its limits, as `Annotated[int, Field(ge=1)]`."""
    default: Any
    description: str


@dataclass(frozen=True)
class Lineage:
    """The origin of an input: what another input was made from."""

    input: str
    role: str
    first: bool = False
    """Follow the role on, up to the artifact that was made from none."""


@dataclass(frozen=True)
class Input:
    """An artifact that a stage reads."""

    kind: type[Typed]
    origin: "Lineage | Stage[Any] | None" = None
    """Where it comes from when it is not handed in: the lineage of another input, or a stage that is run before. None: it
    has to be handed in."""
    counts: Callable[[Config], bool] = lambda config: True
    """Under which settings the stage reads it."""
    shown: bool = False
    """Whether it can be named by hand though it has an origin."""
    implied: bool = False
    """Whether another input's digest covers it, so that it is no part of the fingerprint by itself."""


@dataclass(frozen=True)
class Job(Generic[S]):
    """All that the run of a stage is handed."""

    settings: S
    inputs: Mapping[str, Any]
    """Role -> typed artifact; without those that don't count."""
    work: Work
    store: Store
    resources: Resources
    progress: Progress
    map: Mapper


@dataclass(frozen=True)
class Stage(Generic[S]):
    """One box of the picture."""

    name: str
    """In fingerprints and manifests."""
    version: int
    """Raised with any change of behaviour."""
    makes: type[Typed]
    settings: Callable[..., S]
    """(config, **parameters) -> its slice. Raises UserError where they do not fit."""
    run: Callable[[Job[S]], None]
    reads: Mapping[str, Input] = field(default_factory=dict)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    offers: Mapping[str, Parameter] = field(default_factory=dict)
    """Settings that its form has a field for, beside preset and overrides."""
    packages: Callable[[S], Iterable[str]] = lambda settings: ()
    """Those whose versions define the output."""
    outside: Callable[[S], Mapping[str, Reference]] = lambda settings: {}
    """Inputs that are no artifacts: files of a user, weights from the Hub."""
    loads: Callable[[S, Mapping[str, Artifact]], Mapping[str, str]] = lambda settings, inputs: {}
    """A user's own modules that an input names and the run calls again -> sha256 of the file."""
    uses: Callable[[Config], frozenset[str]] = lambda config: frozenset()
    """Names of the resources that it occupies: engine, teacher, trainer."""
    player: str | None = None
    """Role of the policy that the engine holds."""
    check: Callable[[Config], None] = lambda config: None
    """Raises UserError where a run would be in vain, before anything runs."""
    wanted: Callable[[Config], bool] = lambda config: True
    """Whether the pipeline has the box."""
    tidy: Callable[[Store, Artifact], None] = lambda store, artifact: None
    """Run after the artifact is complete, or was found so."""
    label: str = ""
    """Name where people see it; left out: the name."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)

    @property
    def help(self) -> str:
        """The first line of its module's docstring."""
        return (inspect.getdoc(inspect.getmodule(self.run)) or "").partition("\n")[0]

    def required(self) -> Iterator[str]:
        """Yield the roles that have to be handed in."""
        return (role for role, entry in self.reads.items() if entry.origin is None)

    def counting(self, config: Config) -> dict[str, Input]:
        """Return the inputs that are read under these settings, by role."""
        return {role: entry for role, entry in self.reads.items() if entry.counts(config)}

    def recipe(self, settings: S, inputs: Mapping[str, Artifact]) -> Recipe:
        """Return all that defines the output. inputs: by role."""
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


def trace(lineage: Lineage, given: Mapping[str, Artifact], store: Store) -> Artifact:
    """Return the artifact that the lineage names. Raises UserError where the store has it no more."""
    artifact = given[lineage.input]
    if not lineage.first:
        return store.origin(artifact, lineage.role)
    while lineage.role in artifact.manifest["recipe"]["inputs"]:
        artifact = store.origin(artifact, lineage.role)
    return artifact


def complete(stage: Stage[Any], config: Config, given: Mapping[str, Artifact], store: Store) -> dict[str, Artifact]:
    """Return all inputs that count, by role: those of `given`, and those that their lineage names.

    Raises UserError for one that is neither.
    """
    entries = stage.counting(config)
    inputs = {role: given[role] for role in entries if role in given}
    for role, entry in entries.items():
        if role in inputs:
            continue
        if not isinstance(entry.origin, Lineage):
            raise UserError(f"{stage.label} needs {role}, which is not named.")
        inputs[role] = trace(entry.origin, inputs, store)
    return inputs


def build(
    stage: Stage[S],
    settings: S,
    inputs: Mapping[str, Artifact],
    store: Store,
    resources: Resources,
    *,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    check: Callable[[], None] = lambda: None,
    map: Mapper = builtins.map,
) -> tuple[Artifact, bool]:
    """Find or make a stage's artifact; returns it, and whether it was there. inputs: all that count, by role.

    progress, check: called on the way, and while another process works on it; what they raise ends the stage. map: runner of jobs on parts (`score`); left out, they run here, one after the other.
    """

    def produce(work: Work) -> None:
        stage.run(Job(settings, inputs, work, store, resources, progress, map))

    artifact, cached = store.build(
        stage.makes.KIND,
        stage.recipe(settings, inputs),
        produce,
        seed=getattr(settings, "seed", None),
        where=resources.where.public(),
        force=force,
        waiting=check,
    )
    stage.tidy(store, artifact)
    return artifact, cached


def shown(stage: Stage[Any]) -> list[str]:
    """Roles of the inputs that can be named by hand, those first that have to be."""
    roles = [role for role, entry in stage.reads.items() if entry.origin is None or entry.shown]
    return sorted(roles, key=lambda role: stage.reads[role].origin is not None)


def open_stage(name: str) -> Stage[Any]:
    """The stage of a module of this folder, which bears its name."""
    assert find_spec(f"{__package__}.{name}"), name
    return getattr(import_module(f"{__package__}.{name}"), name)
