"""Building of a stage's artifact: its inputs made complete, its early part, its run, and what the store does with it.

scheduler ──┬──► build_early ──► stage.early.run(job, snapshots) ──► work of its own, which survives a kill
            └──► build_artifact ──► stage.run(job), which reads that work ──► artifact; then the work is removed
"""

import builtins
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from thinkimg.config.tree import Config
from thinkimg.errors import UserError
from thinkimg.resources import Resources
from thinkimg.stages.stage import Job, Lineage, Mapper, Progress, S, Stage
from thinkimg.store import files
from thinkimg.store.artifacts import Store, Work
from thinkimg.store.kinds import Dataset
from thinkimg.store.manifest import Artifact, Recipe, Reference

log = logging.getLogger(__name__)

EARLY = "early"  # folder of the store; what lies there is no artifact
POLL_S = 0.2


class Making(Protocol):
    """Artifact in the making: the handle of a stage that is under way."""

    work: Work | None
    """None until it has begun."""

    @property
    def done(self) -> bool:
        """True when its stage has ended."""

    @property
    def succeeded(self) -> bool:
        """True when it is complete."""

    def result(self) -> Artifact:
        """Return it, complete."""


def trace(lineage: Lineage, given: Mapping[str, Artifact], store: Store) -> Artifact:
    """Return the artifact that a lineage names. Raises UserError where the store has it no more."""
    artifact = given[lineage.input]
    if not lineage.first:
        return store.origin(artifact, lineage.role)
    while lineage.role in artifact.manifest["recipe"]["inputs"]:
        artifact = store.origin(artifact, lineage.role)
    return artifact


def complete_inputs(
    stage: Stage[Any], config: Config, given: Mapping[str, Artifact], store: Store
) -> dict[str, Artifact]:
    """Return all inputs that are read, by role: those of `given`, and those that their lineage names.

    Raises UserError for an input that is neither, or that the lineage does not name for sure, and as `check_family`.
    """
    entries = stage.counting(config)
    inputs = {role: given[role] for role in entries if role in given}
    for role, entry in entries.items():
        if role in inputs:
            continue
        if not isinstance(entry.origin, Lineage):
            raise UserError(f"{stage.label} needs {role}, which is not given.")
        if reason := entry.ambiguous(config):
            raise UserError(f"{stage.label} needs --{role}: {reason}", hint="The loop's output shows the command.")
        inputs[role] = trace(entry.origin, inputs, store)
    check_family(config, inputs.values())
    return inputs


def check_family(config: Config, inputs: Iterable[Artifact]) -> None:
    """Raise UserError for an input of another family of models than the settings'; a data set fits every family."""
    for artifact in inputs:
        if artifact.kind != Dataset.KIND and artifact.family not in (None, (family := config.family()).name):
            raise UserError(
                f"{artifact.kind}/{artifact.short} is of the family {artifact.family}, and the model of these settings "
                f"is a {family.name}.",
                hint="Name the model that it was made with, by model.path or model.tiny.family.",
            )


def build_artifact(
    stage: Stage[S],
    settings: S,
    inputs: Mapping[str, Artifact],
    store: Store,
    resources: Resources,
    *,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    check: Callable[[], None] = lambda: None,
    begin: Callable[[Work], None] = lambda work: None,
    map: Mapper = builtins.map,
) -> tuple[Artifact, bool]:
    """Return a stage's artifact, and whether the store had it already. inputs: all that are read, by role.

    progress, check: called on the way, and while another process works on the same artifact; what they raise ends the
    stage. begin: called with the work on it, where it is made. map: runs jobs on parts (`score`); by default here, one
    after the other.
    """

    def produce(work: Work) -> None:
        work.seed, work.family = getattr(settings, "seed", None), settings.family
        work.where = resources.where.public()
        begin(work)
        with open_early(store, early, check) as own:
            stage.run(Job(settings, inputs, work, store, resources, progress, map, own))

    early = define_early(stage, settings, inputs) if stage.early else None
    if warning := stage.warn(settings, inputs, store):
        log.warning("%s", warning)
    artifact, cached = store.build(
        stage.makes.KIND,
        stage.recipe(settings, inputs),
        produce,
        force=force,
        waiting=check,
    )
    if early is not None:
        remove_early(store, early)
    stage.tidy(store, artifact, resources.where)
    return artifact, cached


def build_early(
    stage: Stage[S],
    settings: S,
    inputs: Mapping[str, Artifact],
    snapshots: Generator[Artifact],
    store: Store,
    resources: Resources,
    *,
    complete: Callable[[Mapping[str, Artifact]], dict[str, Artifact]],
    check: Callable[[], None],
) -> frozenset[str]:
    """Run the early part of a stage, unless the store has its artifact; return what `Early.run` does.

    inputs: without the one that it follows. snapshots: of that, as `follow` yields them. complete: adds the inputs that
    the lineage names. check: called on the way; what it raises ends this.
    """
    assert stage.early is not None
    role = stage.early.follows
    with contextlib.closing(snapshots):  # at once, whoever still refers to it: it may keep a publication waiting
        if (first := next(snapshots, None)) is None:
            return frozenset()  # its stage has failed
        all_inputs = complete({**inputs, role: first})
        if is_complete(first) and store.find(stage.makes.KIND, stage.recipe(settings, all_inputs).fingerprint):
            return frozenset()
        others = {name: artifact for name, artifact in all_inputs.items() if name != role}
        with open_early(store, define_early(stage, settings, all_inputs), check) as work:
            assert work is not None
            job = Job(settings, others, work, store, resources, lambda done, total: check(), builtins.map)
            return stage.early.run(job, itertools.chain([first], snapshots))


def follow(making: Making, check: Callable[[], None]) -> Generator[Artifact]:
    """Yield an artifact in the making as soon as it has begun, whenever more of it is closed, and at last complete.

    Its files keep their place until the next one is asked for. Where its stage fails there is no last one. check:
    called meanwhile; what it raises ends this.
    """
    while making.work is None and not making.done:
        check()
        time.sleep(POLL_S)
    if making.work is not None and not making.done:
        yield making.work.snapshot(0)  # it has no files whose place is to be kept
    count = 0
    while not making.done:
        check()
        work, snapshot = making.work, None
        with work.reading if work is not None else contextlib.nullcontext():
            if work is not None and work.directory.exists() and len(work.closed) > count:
                count += 1  # one at a time: whoever ends the work waits for no more than that
                snapshot = work.snapshot(count)
                yield snapshot
        if snapshot is None:
            time.sleep(POLL_S)
    if making.succeeded:
        yield making.result()


def is_complete(artifact: Artifact) -> bool:
    """Tell whether an artifact is published, and no snapshot of one in the making."""
    return "finished" in artifact.manifest


def define_early(stage: Stage[S], settings: S, inputs: Mapping[str, Artifact]) -> Recipe:
    """Return the recipe of a stage's early part; the content of what it follows may be unknown yet."""
    assert stage.early is not None
    recipe, followed = stage.recipe(settings, inputs), inputs[stage.early.follows]
    reference = Reference(followed.kind, f"{followed.fingerprint}/{followed.attempt}")
    return replace(recipe, stage=f"{recipe.stage} early", inputs={**recipe.inputs, stage.early.follows: reference})


@contextlib.contextmanager
def open_early(store: Store, recipe: Recipe | None, check: Callable[[], None]) -> Iterator[Work | None]:
    """Yield the work of an early part, with the parts that were closed before; None without a recipe."""
    if recipe is None:
        yield None
        return
    with store.create(EARLY, recipe, waiting=check) as work:
        assert isinstance(work, Work), "it is never published"
        yield work


def remove_early(store: Store, recipe: Recipe) -> None:
    """Remove the work of an early part, unless another process is at it. The lock stays: somebody may wait for it."""
    home = store.root / EARLY / recipe.fingerprint
    if home.exists():
        with files.locked(home / ".lock", wait=False) as free:
            for path in home.iterdir() if free else ():
                if path.name != ".lock":
                    files.remove(path)
