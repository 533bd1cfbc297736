"""Collecting garbage: what no kept policy needs is removed, and of old ancestors the files may be dropped.

A dropped artifact keeps its manifest: it is found and reads *Cached*, lineage and audits name it, but its files are gone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.store.artifacts import Artifact, Store
from thinkimg.store.kinds import KINDS
from thinkimg.store.lineage import Graph
from thinkimg.store.manifest import DROPPED, MANIFEST, TRIMMED, now

NEVER_DROPPED = {name for name, kind in KINDS.items() if kind.LASTING}


@dataclass(frozen=True)
class Plan:
    """What a collection would do."""

    kept: list[Artifact]
    """The policies that all else is kept for."""
    remove: list[Artifact]
    drop: list[Artifact]
    """Ancestors whose files go and whose manifests stay."""
    left: list[Path]
    """What dead runs have left: work directories, journals, temporary files."""

    @property
    def freed(self) -> int:
        """Bytes of artifacts; what dead runs have left is not counted."""
        return sum(artifact.size for artifact in (*self.remove, *self.drop) if not artifact.dropped)


def plan(store: Store, keep: Sequence[Artifact] = (), keep_last: int | None = None) -> Plan:
    """What nothing needs, and with keep_last what is old.

    keep: the policies to keep; none: every policy that no other was trained from, so that each line of training can go on.
    Kept with a policy are all its ancestors, their evaluations, and what was made from it on the way to the next policy.
    keep_last: how many of the last policies of each line keep their files, and rollouts and scores those that these
    policies were made from; None keeps all. Raises UserError where a manifest is damaged: what it needs is not known.
    """
    for place in store.root.glob("*/*/*/" + MANIFEST):
        if place.parent.name.isdigit():
            Artifact.open(place.parent)
    graph = Graph.of(store)
    named = [str(artifact.reference) for artifact in keep] or tips(graph)
    needed = graph.ancestors(named) | front(graph, named)
    needed |= {name for name in graph.artifacts if is_evaluation_of(graph, name, needed)}
    drop = old(graph, named, keep_last) if keep_last is not None else set()
    chosen = [graph.artifacts[name] for name in sorted(drop) if not is_dropped(graph.artifacts[name])]
    return Plan(
        kept=[graph.artifacts[name] for name in named],
        remove=[artifact for name, artifact in sorted(graph.artifacts.items()) if name not in needed],
        drop=chosen,
        left=store.sweep(),
    )


def tips(graph: Graph) -> list[str]:
    """Policies from which no other was trained, without attempts that a later one has replaced."""
    policies = [name for name, artifact in graph.artifacts.items() if artifact.kind == "policy"]
    trained_from = {
        str(reference) for name in policies for reference in graph.inputs(name).values() if reference.kind == "policy"
    }
    newest: dict[str, str] = {}
    for name in sorted(policies, key=lambda name: int(graph.artifacts[name].attempt)):
        newest[graph.artifacts[name].fingerprint] = name
    return sorted(set(newest.values()) - trained_from, key=lambda name: graph.artifacts[name].manifest["finished"])


def front(graph: Graph, policies: Sequence[str]) -> set[str]:
    """Rollouts of these policies and the scores of these: the beginning of the next iteration."""
    played = {
        name
        for name, artifact in graph.artifacts.items()
        if artifact.kind == "rollouts" and str(graph.inputs(name).get("policy")) in policies
    }
    return played | {
        name
        for name, artifact in graph.artifacts.items()
        if artifact.kind == "scores" and str(graph.inputs(name).get("rollouts")) in played
    }


def is_evaluation_of(graph: Graph, name: str, needed: set[str]) -> bool:
    policy = graph.inputs(name).get("policy")
    return graph.artifacts[name].kind == "evaluation" and str(policy) in needed


def old(graph: Graph, policies: Sequence[str], keep_last: int) -> set[str]:
    """Ancestors of `policies` behind the last `keep_last` policies of each line, and what those were made from."""
    if keep_last < 1:
        raise UserError(f"--keep-last {keep_last} would keep no policy", hint="keep 1 or more")
    fresh: set[str] = set()
    for name in policies:
        line = [name, *graph.line(name)]
        recent = [entry for entry in line if entry.startswith("policy/")][:keep_last]
        fresh |= set(recent) | front(graph, recent)
        for entry in recent:
            fresh |= {str(reference) for reference in graph.inputs(entry).values() if reference.kind != "policy"}
            # A frozen teacher, who judges the next rollouts as well.
            scores = graph.inputs(entry).get("scores")
            judges = graph.inputs(str(scores)) if scores else {}
            fresh |= {str(reference) for reference in judges.values() if reference.kind == "policy"}
        # What the KL term is measured against is read again with every step.
        fresh |= {str(ref) for role, ref in graph.inputs(name).items() if role == "reference"}
    return {
        name
        for name in graph.ancestors(policies) - fresh
        if name in graph.artifacts and graph.artifacts[name].kind not in NEVER_DROPPED
    }


def collect(store: Store, todo: Plan) -> None:
    """Carry a plan out. Killed anywhere and done again it gets through. Raises UserError while a stage is at work."""
    busy = store.busy()
    if busy:
        raise UserError(
            f"a stage is at work on {busy[0].parent.name}/{busy[0].name[:12]} in {store.root}",
            hint="collect when it has ended: it may need what would be removed",
        )
    for artifact in todo.remove:
        with files.locked(artifact.directory.parent / ".lock"):
            # Renamed it is no artifact any more; a sweep removes what a kill leaves of it.
            grave = artifact.directory.with_name(files.TEMPORARY + artifact.attempt)
            files.remove(grave)
            files.rename(artifact.directory, grave)
            files.remove(artifact.directory.with_suffix(DROPPED))
            files.remove(artifact.directory.with_suffix(TRIMMED))
            files.remove(grave)
    for artifact in todo.drop:
        with files.locked(artifact.directory.parent / ".lock"):
            drop(artifact)
    store.sweep(remove=True)


def is_dropped(artifact: Artifact) -> bool:
    """Whether all files are gone: a kill may have left some behind the mark."""
    return artifact.dropped and files.files_under(artifact.directory) == [MANIFEST]


def drop(artifact: Artifact) -> None:
    """Remove all files but the manifest; the mark comes first, so that a half-dropped artifact is not a damaged one."""
    files.write(artifact.directory.with_suffix(DROPPED), json.dumps({"dropped": now(), "bytes": artifact.size}) + "\n")
    for path in sorted(artifact.directory.iterdir()):
        if path.name != MANIFEST:
            files.remove(path)
