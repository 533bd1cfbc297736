"""`thinkimg artifacts …`: looking at what the stages made, proving it, clearing it up, and handing it on."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from thinkimg.errors import UserError

app = App(name="artifacts", help="What the stages made: list, show, lineage, verify, gc, export.")

Root = Annotated[Path, Parameter(name="--store", help="Root of the artifact store (where.store).")]
Reference = Annotated[str, Parameter(help="An artifact: the beginning of its fingerprint, or its path.")]
ROOT = Path("artifacts")


def opened(root: Path):
    from thinkimg.store.artifacts import Store

    if not root.is_dir():
        raise UserError(f"there is no artifact store at {root}", hint="name its root with --store")
    return Store(root)


@app.command
def ls(
    kind: Annotated[str | None, Parameter(help="Only artifacts of this kind.")] = None, *, store: Root = ROOT
) -> None:
    """List all artifacts, oldest first."""
    from rich import box
    from rich.table import Table

    from thinkimg.console import console, size
    from thinkimg.store.lineage import what

    found = sorted(opened(store).list(kind), key=lambda artifact: artifact.manifest["finished"])
    if not found:
        print(f"There is no artifact{f' of kind {kind}' if kind else ''} under {store}.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (("kind", "left"), ("fingerprint", "left"), ("made (UTC)", "left"), ("size", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    table.add_column("")
    for artifact in found:
        attempt = f" #{int(artifact.attempt)}" if artifact.attempt != "0001" else ""
        when = artifact.manifest["finished"][:16].replace("T", " ")
        bytes_ = "dropped" if artifact.dropped else size(artifact.size)
        table.add_row(artifact.kind, artifact.short + attempt, when, bytes_, what(artifact))
    console.print(table, markup=False)


@app.command
def show(reference: Reference, *, store: Root = ROOT) -> None:
    """Print an artifact's manifest as YAML, without what the library alone needs."""
    import yaml

    from thinkimg.console import size

    artifact = opened(store).resolve(reference)
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
        "git": manifest["git"],
        "host": manifest["host"],
        "where": manifest["where"],
        "files": {name: size(entry["size"]) for name, entry in artifact.files.items()},
    }
    if artifact.dropped:
        tree["files"] = f"dropped by gc ({size(artifact.size)}): only the manifest is kept"
    print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")


@app.command
def lineage(
    reference: Reference,
    *,
    all: Annotated[bool, Parameter(help="Also what else was made from its ancestors.", negative=[])] = False,
    store: Root = ROOT,
) -> None:
    """Draw what an artifact came from, up to the data, and what was made from it."""
    from thinkimg.store.lineage import Graph, draw

    opened_store = opened(store)
    artifact = opened_store.resolve(reference)
    for line in draw(Graph.of(opened_store), str(artifact.reference), everything=all):
        print(line)


@app.command
def verify(
    *references: Reference,
    hashes_only: Annotated[bool, Parameter(help="Hash the files, do not replay the tool calls.", negative=[])] = False,
    store: Root = ROOT,
) -> None:
    """Hash every file again and replay every tool call; all artifacts unless some are named. Exit code 1 on damage."""
    from thinkimg.analysis.verify_calls import can_replay, replay
    from thinkimg.console import progress
    from thinkimg.store.kinds import open_artifact
    from thinkimg.store.manifest import MANIFEST

    opened_store = opened(store)
    if references:
        places = [opened_store.resolve(reference).directory for reference in references]
    else:  # those too whose manifest is damaged, which a list leaves out
        places = sorted(place.parent for place in store.glob(f"*/*/*/{MANIFEST}") if place.parent.name.isdigit())
    damaged = 0
    for place in places:
        problems, said = opened_store.verify(place), []
        label = f"{place.parent.parent.name}/{place.parent.name[:12]}/{place.name}"
        if not problems and not hashes_only:
            artifact = open_artifact(place)
            said.append("files dropped" if artifact.dropped else f"{len(artifact.files)} files")
            if can_replay(artifact):
                with progress(f"verify {label[:24]}") as show_progress:
                    again = replay(artifact, opened_store, show_progress)
                problems += again.problems
                said.append(again.note or f"{again.calls} tool calls replayed, {again.images} images")
        damaged += bool(problems)
        print(f"{'DAMAGED' if problems else 'ok':<8}{label}  {', '.join(said)}".rstrip())
        for problem in problems:
            print(f"        {problem}")
    print(f"{len(places) - damaged} of {len(places)} artifacts are as they were published.")
    if damaged:
        raise SystemExit(1)


@app.command
def gc(
    *,
    keep: Annotated[
        list[str] | None,
        Parameter(help="A policy to keep; may be repeated. Left out: the last of every line.", negative=[]),
    ] = None,
    keep_last: Annotated[
        int | None, Parameter(help="Drop the files, not the manifests, of all but so many policies of each line.")
    ] = None,
    yes: Annotated[bool, Parameter(help="Do it; without this it is only shown.", negative=[])] = False,
    store: Root = ROOT,
) -> None:
    """Remove what no kept policy needs."""
    from thinkimg.console import size
    from thinkimg.store import gc as collector

    opened_store = opened(store)
    policies = [opened_store.resolve(reference, "policy") for reference in keep or ()]
    todo = collector.plan(opened_store, policies, keep_last)
    for policy in todo.kept:
        print(f"keep    policy/{policy.short}/{policy.attempt} and what it was made from")
    for word, chosen in (("remove", todo.remove), ("drop", todo.drop)):
        for artifact in chosen:
            print(f"{word:<8}{artifact.kind}/{artifact.short}/{artifact.attempt}  {size(artifact.size)}")
    for path in todo.left:
        print(f"remove  {path.relative_to(store)} (left by a run that died)")
    if not (todo.remove or todo.drop or todo.left):
        print("There is nothing to collect.")
        return
    freed = size(todo.freed)
    if yes:
        collector.collect(opened_store, todo)
        print(f"{freed} freed.")
    else:
        print(f"{freed} would be freed; nothing was changed. Add --yes to do it.")


@app.command
def export(
    policy: Reference, target: Annotated[Path, Parameter(help="A new directory.")], *, store: Root = ROOT
) -> None:
    """Pack a policy with its template, tools, config, and the manifests of its ancestors."""
    from thinkimg.analysis.export import export as pack

    opened_store = opened(store)
    print(pack(opened_store, opened_store.resolve(policy, "policy"), target))
