"""Verbs of `thinkimg artifacts`: list, show, trace, verify, clean up and export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from thinkimg.cli.flags import ArtifactFlag, StoreFlag, read_path
from thinkimg.errors import UserError

if TYPE_CHECKING:
    from thinkimg.store.artifacts import Store

app = App(name="artifacts", help="List, show, trace, verify, clean up and export artifacts.")

ROOT = Path("artifacts")


def open_store(root: Path) -> "Store":
    """Return the store at `root`. Raises UserError if there is none."""
    from thinkimg.store.artifacts import Store

    if not root.is_dir():
        raise UserError(f"There is no artifact store at {root}.", hint="Give its root with --store.")
    return Store(root)


@app.command
def ls(
    kind: Annotated[str | None, Parameter(help="Only artifacts of this kind.")] = None, *, store: StoreFlag = ROOT
) -> None:
    """List all artifacts, oldest first."""
    from rich import box
    from rich.table import Table

    from thinkimg.console import console, format_size
    from thinkimg.store.lineage import describe

    artifacts = sorted(open_store(store).list(kind), key=lambda artifact: artifact.manifest["finished"])
    if not artifacts:
        print(f"There is no artifact{f' of kind {kind}' if kind else ''} in {store}.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (("kind", "left"), ("fingerprint", "left"), ("finished (UTC)", "left"), ("size", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    table.add_column("")
    for artifact in artifacts:
        attempt = f" #{int(artifact.attempt)}" if artifact.attempt != "0001" else ""
        when = artifact.manifest["finished"][:16].replace("T", " ")
        size = "dropped" if artifact.dropped else format_size(artifact.size)
        table.add_row(artifact.kind, artifact.short + attempt, when, size, describe(artifact))
    console.print(table, markup=False)


@app.command
def show(reference: ArtifactFlag, *, store: StoreFlag = ROOT) -> None:
    """Print the readable part of an artifact's manifest as YAML."""
    import yaml

    from thinkimg.console import format_size, takes_unicode

    artifact = open_store(store).resolve(reference)
    manifest = artifact.manifest
    recipe = manifest["recipe"]
    inputs = recipe["inputs"].items()
    tree = {
        "artifact": str(artifact.reference),
        "directory": str(artifact.directory),
        "digest": artifact.digest,
        "stage": f"{recipe['stage']} {recipe['stage_version']}",
        "started": manifest["started"],
        "finished": manifest["finished"],
        "inputs": {role: f"{entry['kind']}/{(entry['fingerprint'] or entry['digest'])[:12]}" for role, entry in inputs},
        "metrics": manifest["metrics"],
        "config": recipe["config"],
        "packages": recipe["packages"],
        "sources": recipe["sources"],
        "seed": manifest["seed"],
        "family": artifact.family,
        "git": manifest["git"],
        "host": manifest["host"],
        "where": manifest["where"],
        "files": {name: format_size(entry["size"]) for name, entry in artifact.files.items()},
    }
    if artifact.dropped:
        tree["files"] = f"dropped by gc ({format_size(artifact.size)}): only the manifest is kept"
    print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=takes_unicode()), end="")


@app.command
def lineage(
    reference: ArtifactFlag,
    *,
    all: Annotated[bool, Parameter(help="Draw all descendants of its ancestors as well.", negative=[])] = False,
    store: StoreFlag = ROOT,
) -> None:
    """Draw the ancestors of an artifact, from the data down, and its descendants."""
    from thinkimg.store.lineage import Graph, draw_tree

    opened_store = open_store(store)
    artifact = opened_store.resolve(reference)
    for line in draw_tree(Graph.of(opened_store), str(artifact.reference), everything=all):
        print(line)


@app.command
def verify(
    *references: ArtifactFlag,
    hashes_only: Annotated[bool, Parameter(help="Hash files only; replay no tool calls.", negative=[])] = False,
    store: StoreFlag = ROOT,
) -> None:
    """Hash every file and replay every tool call of artifacts; of all if none is named. Exit code 1 on damage."""
    from thinkimg.analysis.verify_calls import can_replay, replay
    from thinkimg.console import show_progress
    from thinkimg.store.kinds import open_artifact

    opened_store = open_store(store)
    if references:
        directories = [opened_store.resolve(reference).directory for reference in references]
    else:  # a list would leave out those whose manifest is damaged
        directories = list(opened_store.directories())
    damaged = 0
    for directory in directories:
        problems, checks = opened_store.verify(directory), []
        label = f"{directory.parent.parent.name}/{directory.parent.name[:12]}/{directory.name}"
        if not problems and not hashes_only:
            artifact = open_artifact(directory)
            checks.append("files dropped" if artifact.dropped else f"{len(artifact.files)} files")
            if can_replay(artifact):
                with show_progress(f"verify {label[:24]}") as progress:
                    result = replay(artifact, opened_store, progress)
                problems += result.problems
                checks.append(result.note or f"{result.calls} tool calls replayed, {result.images} images hashed")
        damaged += bool(problems)
        print(f"{'DAMAGED' if problems else 'ok':<8}{label}  {', '.join(checks)}".rstrip())
        for problem in problems:
            print(f"        {problem}")
    print(f"{len(directories) - damaged} of {len(directories)} artifacts are as they were published.")
    if damaged:
        raise SystemExit(1)


@app.command
def gc(
    *,
    keep: Annotated[
        list[str] | None,
        Parameter(help="A policy to keep; may be repeated. Left out: the last policy of each line.", negative=[]),
    ] = None,
    keep_last: Annotated[
        int | None,
        Parameter(help="Keep the files of the last N policies of each line; of older ones only the manifests."),
    ] = None,
    yes: Annotated[bool, Parameter(help="Delete; left out, the plan is only shown.", negative=[])] = False,
    store: StoreFlag = ROOT,
) -> None:
    """Delete artifacts that no kept policy needs."""
    from thinkimg.console import format_size
    from thinkimg.store import gc as collector

    opened_store = open_store(store)
    policies = [opened_store.resolve(reference, "policy") for reference in keep or ()]
    todo = collector.find_garbage(opened_store, policies, keep_last)
    for policy in todo.kept:
        print(f"keep    policy/{policy.short}/{policy.attempt} and its ancestors")
    for word, chosen in (("remove", todo.remove), ("drop", todo.drop)):
        for artifact in chosen:
            print(f"{word:<8}{artifact.kind}/{artifact.short}/{artifact.attempt}  {format_size(artifact.size)}")
    for path in todo.remains:
        print(f"remove  {path.relative_to(store)} (left by a run that died)")
    if not (todo.remove or todo.drop or todo.remains):
        print("There is nothing to delete.")
        return
    freed = format_size(todo.freed)
    if yes:
        collector.collect(opened_store, todo)
        print(f"{freed} freed.")
    else:
        print(f"{freed} would be freed; nothing was deleted. Add --yes to do it.")


@app.command
def export(
    policy: ArtifactFlag,
    target: Annotated[Path, Parameter(help="A new directory.", converter=read_path)],
    *,
    merge: Annotated[
        str | None,
        Parameter(help="Directory or Hub id of an adapter's base model: the export has one model of both."),
    ] = None,
    store: StoreFlag = ROOT,
) -> None:
    """Export a policy with its chat template, tools, config, and the manifests of its ancestors."""
    from thinkimg.analysis.export import export_policy

    opened_store = open_store(store)
    print(export_policy(opened_store, opened_store.resolve(policy, "policy"), target, merge))
