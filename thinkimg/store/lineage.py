"""What came from what: the graph of a store's artifacts, drawn from the data at the top down to the policy.

A node is an artifact's reference, kind/fingerprint/attempt, or kind/digest for what came from outside, such as the weights
of a base model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from thinkimg.console import decimal
from thinkimg.store.artifacts import Artifact, Reference, Store
from thinkimg.store.kinds import KINDS

# What an artifact goes on from, first to last: the line that is drawn straight down. Other inputs are named beside it.
TRUNK = tuple(reversed(KINDS))


@dataclass(frozen=True)
class Graph:
    """The artifacts of a store by name, and what each was made from."""

    artifacts: dict[str, Artifact]

    @classmethod
    def of(cls, store: Store) -> "Graph":
        return cls({str(artifact.reference): artifact for artifact in store.list()})

    def inputs(self, name: str) -> dict[str, Reference]:
        """Role -> reference; empty for what came from outside, or is gone."""
        if name not in self.artifacts:
            return {}
        return {role: Reference(**entry) for role, entry in self.artifacts[name].manifest["recipe"]["inputs"].items()}

    @cached_property
    def made(self) -> dict[str, list[str]]:
        """Name -> what was made from it, oldest first."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.artifacts, key=lambda name: self.artifacts[name].manifest["finished"]):
            for source in sorted({str(reference) for reference in self.inputs(name).values()}):
                found.setdefault(source, []).append(name)
        return found

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """All that `names` were made from, directly or not, themselves included."""
        return _reach(names, lambda name: [str(reference) for reference in self.inputs(name).values()])

    def descendants(self, names: Iterable[str]) -> set[str]:
        """All that was made from `names`, directly or not, themselves included."""
        return _reach(names, lambda name: self.made.get(name, []))

    def trunk(self, name: str) -> str | None:
        """The one input that `name` goes on from; None for a root."""
        inputs = [reference for reference in self.inputs(name).values() if reference.attempt]
        inputs.sort(key=lambda reference: TRUNK.index(reference.kind) if reference.kind in TRUNK else len(TRUNK))
        return str(inputs[0]) if inputs else None

    def line(self, name: str) -> list[str]:
        """The trunk above `name`, nearest first, up to the data."""
        found: list[str] = []
        while (above := self.trunk(found[-1] if found else name)) is not None:
            found.append(above)
        return found


def _reach(names: Iterable[str], step: Callable[[str], Iterable[str]]) -> set[str]:
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += step(name)
    return found


def draw(graph: Graph, name: str, *, everything: bool = False) -> Iterator[str]:
    """Lines of the tree around an artifact: what it was made from above it, what was made from it below.

    The longest line of descent goes straight down; what branches off is indented. everything: with what was made from its
    ancestors, too (evaluations, other mixes), else only what leads to it or comes from it.
    """
    above = graph.ancestors([name])
    shown = above | graph.descendants(above if everything else [name])
    children: dict[str | None, list[str]] = {}
    for node in sorted(shown, key=lambda node: (finished(graph, node), node)):
        parent = graph.trunk(node)
        if node in graph.artifacts or Reference(*node.split("/")).kind in TRUNK:
            children.setdefault(parent if parent in shown else None, []).append(node)
    depth: dict[str, int] = {}
    for node in _post_order(children):
        depth[node] = 1 + max((depth[child] for child in children.get(node, [])), default=0)
    for root in children.get(None, []):
        yield from _branch(graph, root, name, children, depth, "", "● ", "")


def _post_order(children: dict[str | None, list[str]]) -> Iterator[str]:
    order, todo = [], list(children.get(None, []))
    while todo:
        node = todo.pop()
        order.append(node)
        todo += children.get(node, [])
    return reversed(order)


def _branch(
    graph: Graph,
    node: str,
    marked: str,
    children: Mapping[str | None, list[str]],
    depth: Mapping[str, int],
    margin: str,
    lead: str,
    rest: str,
) -> Iterator[str]:
    """One line of descent: `lead` before its first node, `rest` before the others; branches a level deeper."""
    first = True
    while True:
        sign = "◉ " if node == marked else "● "
        before = margin + (lead.removesuffix("● ") if first else rest)
        yield f"{before}{sign}{label(graph, node)}"
        below = sorted(children.get(node, []), key=lambda child: -depth[child])
        if not below:
            return
        for branch in sorted(below[1:], key=lambda child: finished(graph, child)):
            yield from _branch(graph, branch, marked, children, depth, margin + rest, "├─● ", "│    ")
        node, first = below[0], False


def finished(graph: Graph, name: str) -> str:
    return graph.artifacts[name].manifest["finished"] if name in graph.artifacts else ""


def label(graph: Graph, name: str) -> str:
    """kind, beginning of the fingerprint, when, what tells it apart, and inputs beside the line that it is drawn on."""
    kind, _, rest = name.partition("/")
    if name not in graph.artifacts:
        return f"{kind} {rest[:12]} (gone)" if rest.count("/") else f"{kind} {rest[:40]} (from outside)"
    artifact, line = graph.artifacts[name], set(graph.line(name))
    others = [
        f"{reference.kind} {(reference.fingerprint or reference.digest)[:6]}"
        for reference in graph.inputs(name).values()
        if str(reference) not in line
    ]
    attempt = f" attempt {int(artifact.attempt)}" if artifact.attempt != "0001" else ""
    parts = [f"{kind} {artifact.short}{attempt}", what(artifact), "files dropped" if artifact.dropped else ""]
    return "  ".join(filter(None, [*parts, f"+ {', '.join(dict.fromkeys(others))}" if others else ""]))


def what(artifact: Artifact) -> str:
    """What tells an artifact from others of its kind: its stage's iteration or mix, and headline figures."""
    recipe, metrics = artifact.manifest["recipe"], artifact.metrics
    said = []
    if "iteration" in recipe["config"]:
        said.append(f"iteration {recipe['config']['iteration']}")
    if "mix" in recipe["config"]:
        said.append("mix " + " ".join(f"{name}={weight:g}" for name, weight in recipe["config"]["mix"].items()))
    elif artifact.kind == "policy":
        said.append(recipe["stage"])
    headline = KINDS[artifact.kind].FIGURES if artifact.kind in KINDS else ()
    keys = headline or [name for name in metrics if name.startswith("reward/")]
    figures = ((key.removeprefix("reward/"), metrics.get(key)) for key in keys)
    said += [f"{key} {decimal(value)}" for key, value in figures if value is not None]
    return ", ".join(said)
