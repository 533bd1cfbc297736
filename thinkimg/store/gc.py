"""Garbage collection: removes artifacts that no kept policy needs, and drops the files of old ancestors.

A dropped artifact keeps its manifest: a stage reads it as *Cached*, lineage and audits name it, its files are removed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thinkimg.errors import UserError
from thinkimg.store import files
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import KINDS
from thinkimg.store.lineage import Graph
from thinkimg.store.manifest import DROPPED, MANIFEST, TRIMMED, Artifact, utc_now

LAST = 10**9  # beyond every iteration
NEVER_DROPPED = {name for name, kind in KINDS.items() if kind.LASTING}


@dataclass(frozen=True)
class Garbage:
    """Artifacts and files that a collection would remove or drop."""

    kept: list[Artifact]
    """The policies whose needs decide; they stay."""
    remove: list[Artifact]
    drop: list[Artifact]
    """Ancestors whose files are removed and whose manifests stay."""
    remains: list[Path]
    """Work directories, journals and temporary files of dead runs."""

    @property
    def freed(self) -> int:
        """Bytes of artifacts, without the remains of dead runs."""
        return sum(artifact.size for artifact in (*self.remove, *self.drop) if not artifact.dropped)


def find_garbage(store: Store, keep: Sequence[Artifact] = (), keep_last: int | None = None) -> Garbage:
    """Return the artifacts that no kept policy needs, and with keep_last the old ones.

    A policy needs its ancestors, their evaluations, and the rollouts and scores of its next iteration.
    keep: the policies to keep; if empty, each from which no other was trained: all lines of training can continue.
    keep_last: number of policies at the end of each line that keep their files, as do the rollouts and scores that they
    were trained on; None keeps all.
    Raises UserError for a damaged manifest, as its inputs cannot be read.
    """
    for directory in store.directories():
        Artifact.open(directory)
    graph = Graph.of(store)
    kept = [str(artifact.reference) for artifact in keep] or find_last_policies(graph)
    needed = graph.ancestors(kept) | find_next_rollouts(graph, kept)
    needed |= {
        name
        for name, artifact in graph.artifacts.items()
        if artifact.kind == "evaluation" and str(artifact.inputs.get("policy")) in needed
    }
    old = find_old_ancestors(graph, kept, keep_last) if keep_last is not None else set()
    return Garbage(
        kept=[graph.artifacts[name] for name in kept],
        remove=[artifact for name, artifact in sorted(graph.artifacts.items()) if name not in needed],
        drop=[graph.artifacts[name] for name in sorted(old) if not is_dropped(graph.artifacts[name])],
        remains=store.sweep(),
    )


def find_last_policies(graph: Graph) -> list[str]:
    """Return the policies from which no other was trained, without attempts that a later one has replaced."""
    policies = [name for name, artifact in graph.artifacts.items() if artifact.kind == "policy"]
    trained_from = {
        str(reference) for name in policies for reference in graph.inputs(name).values() if reference.kind == "policy"
    }
    newest: dict[str, str] = {}
    for name in sorted(policies, key=lambda name: int(graph.artifacts[name].attempt)):
        newest[graph.artifacts[name].fingerprint] = name
    return sorted(set(newest.values()) - trained_from, key=graph.finish_time)


def find_next_rollouts(graph: Graph, policies: Sequence[str]) -> set[str]:
    """Return the rollouts of these policies' next iterations, and their scores.

    A policy plays them itself, or with loop.lag=1 the policy that it was trained from does.
    """
    players: dict[str, int] = {}
    """Policy -> the last iteration whose rollouts are not asked for."""
    for name in policies:
        inputs = graph.inputs(name)
        if (before := str(inputs.get("policy"))) not in policies and "rollouts" in inputs:
            players[before] = min(find_iteration(graph, str(inputs["rollouts"])), players.get(before, LAST))
        players[name] = 0
    rollouts = {
        name
        for name, artifact in graph.artifacts.items()
        if artifact.kind == "rollouts"
        and find_iteration(graph, name) > players.get(str(artifact.inputs.get("policy")), LAST)
    }
    return rollouts | {
        name
        for name, artifact in graph.artifacts.items()
        if artifact.kind == "scores" and str(artifact.inputs.get("rollouts")) in rollouts
    }


def find_iteration(graph: Graph, rollouts: str) -> int:
    """Return the number of the iteration that rollouts were played in; LAST if the store has them no more."""
    artifact = graph.artifacts.get(rollouts)
    return LAST if artifact is None else artifact.manifest["recipe"]["config"].get("iteration", 1)


def find_old_ancestors(graph: Graph, policies: Sequence[str], keep_last: int) -> set[str]:
    """Return the ancestors of `policies` that neither the last `keep_last` policies of a line nor their training need.

    Raises UserError if keep_last is below 1.
    """
    if keep_last < 1:
        raise UserError(f"--keep-last {keep_last} would keep no policy.", hint="Keep 1 or more.")
    needed: set[str] = set()
    for name in policies:
        recent = [name]
        while len(recent) < keep_last and (before := graph.inputs(recent[-1]).get("policy")) is not None:
            recent.append(str(before))
        following = find_next_rollouts(graph, recent)
        needed |= set(recent) | following | {str(graph.inputs(rollouts).get("policy")) for rollouts in following}
        if is_behind(graph, name):
            needed.add(str(graph.inputs(name)["policy"]))
        for policy in recent:
            needed |= {str(reference) for reference in graph.inputs(policy).values() if reference.kind != "policy"}
            # A frozen teacher, which judges the next rollouts as well.
            judges = graph.inputs(str(graph.inputs(policy).get("scores")))
            needed |= {str(reference) for reference in judges.values() if reference.kind == "policy"}
        # Each step reads the policy that the KL term is measured against.
        needed |= {str(reference) for role, reference in graph.inputs(name).items() if role == "reference"}
    return {
        name
        for name in graph.ancestors(policies) - needed
        if name in graph.artifacts and graph.artifacts[name].kind not in NEVER_DROPPED
    }


def drop_old_policies(store: Store, newest: Artifact, keep: int) -> None:
    """Drop the files of a line's trained policies but those of the last `keep` and of the most accurate one.

    Those that another line goes on from keep theirs, and those that the next iterations read.
    """
    graph = Graph.of(store)
    line = graph.ancestors([str(newest.reference)])
    accuracy = {
        str(artifact.inputs.get("policy")): artifact.metrics.get("accuracy") or 0.0
        for artifact in graph.artifacts.values()
        if artifact.kind == "evaluation" and not artifact.manifest["recipe"]["config"].get("blind")
    }
    best = max(line, key=lambda name: accuracy.get(name, 0.0))
    for name in find_old_ancestors(graph, [str(newest.reference)], keep):
        elsewhere = {graph.artifacts[product].kind for product in set(graph.products[name]) - line}
        if "rollouts" in graph.inputs(name) and name != best and not elsewhere & {"rollouts", "policy"}:
            drop_artifact(graph.artifacts[name])


def is_behind(graph: Graph, policy: str) -> bool:
    """Tell whether a policy learned from rollouts of an earlier one than it was trained from (loop.lag=1).

    The policy that it was trained from plays the next ones.
    """
    inputs = graph.inputs(policy)
    player = graph.inputs(str(inputs.get("rollouts"))).get("policy")
    return player is not None and str(player) != str(inputs.get("policy"))


def collect(store: Store, garbage: Garbage) -> None:
    """Remove and drop the garbage. After a kill, run it again. Raises UserError while a stage is at work."""
    if busy := store.busy():
        raise UserError(
            f"A stage is at work on {busy[0].parent.name}/{busy[0].name[:12]} in {store.root}.",
            hint="Collect when it has ended: it may need an artifact that would be removed.",
        )
    for artifact in garbage.remove:
        with files.locked(artifact.directory.parent / ".lock"):
            # Under this name it is no artifact; a sweep removes it after a kill.
            removed = artifact.directory.with_name(files.TEMPORARY + artifact.attempt)
            files.remove(removed)
            files.rename(artifact.directory, removed)
            files.remove(artifact.directory.with_suffix(DROPPED))
            files.remove(artifact.directory.with_suffix(TRIMMED))
            files.remove(removed)
    for artifact in garbage.drop:
        drop_artifact(artifact)
    store.sweep(remove=True)


def is_dropped(artifact: Artifact) -> bool:
    """Return True if all files are removed; a kill may have left some beside the mark."""
    return artifact.dropped and files.files_under(artifact.directory) == [MANIFEST]


def drop_artifact(artifact: Artifact) -> None:
    """Remove all files but the manifest, after the mark is written: a half-dropped artifact is not a damaged one."""
    mark = {"dropped": utc_now(), "bytes": artifact.size}
    with files.locked(artifact.directory.parent / ".lock"):
        if is_dropped(artifact):
            return
        files.write(artifact.directory.with_suffix(DROPPED), json.dumps(mark) + "\n")
        for path in sorted(artifact.directory.iterdir()):
            if path.name != MANIFEST:
                files.remove(path)
