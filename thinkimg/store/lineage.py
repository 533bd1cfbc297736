"""Lineage of a store's artifacts: a graph, drawn from the data at the top down to the policy.

A node is an artifact's reference, kind/fingerprint/attempt. An input from outside, such as the weights of a base model,
is kind/digest.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from thinkimg.console import format_number
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import KINDS
from thinkimg.store.manifest import Artifact, Reference

TRUNK = tuple(reversed(KINDS))
"""Kinds of the input that an artifact is drawn below, the preferred one first; labels name the other inputs."""
WIDEST = 10_000  # columns: a line is never wrapped


@dataclass(frozen=True)
class Graph:
    """Artifacts of a store by name, with their inputs and products."""

    artifacts: dict[str, Artifact]

    @classmethod
    def of(cls, store: Store) -> "Graph":
        """Return the graph of all artifacts of a store."""
        return cls({str(artifact.reference): artifact for artifact in store.list()})

    def inputs(self, name: str) -> dict[str, Reference]:
        """Return role -> input; empty for a node that is from outside or no longer in the store."""
        return self.artifacts[name].inputs if name in self.artifacts else {}

    @cached_property
    def products(self) -> dict[str, list[str]]:
        """Name -> the artifacts that were made from it, oldest first."""
        products: dict[str, list[str]] = {}
        for name in sorted(self.artifacts, key=self.finish_time):
            for source in sorted({str(reference) for reference in self.inputs(name).values()}):
                products.setdefault(source, []).append(name)
        return products

    def finish_time(self, name: str) -> str:
        """Return the time at which an artifact was finished (ISO 8601), "" for a node that is not in the store."""
        return self.artifacts[name].manifest["finished"] if name in self.artifacts else ""

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """Return the nodes that `names` were made from, directly or not, and `names`."""
        return _reach(names, lambda name: map(str, self.inputs(name).values()))

    def descendants(self, names: Iterable[str]) -> set[str]:
        """Return the artifacts that were made from `names`, directly or not, and `names`."""
        return _reach(names, lambda name: self.products.get(name, []))

    def trunk(self, name: str) -> str | None:
        """Return the input that `name` is drawn below; None for a root."""
        inputs = [reference for reference in self.inputs(name).values() if reference.attempt]
        inputs.sort(key=lambda reference: TRUNK.index(reference.kind) if reference.kind in TRUNK else len(TRUNK))
        return str(inputs[0]) if inputs else None

    def line(self, name: str) -> list[str]:
        """Return the trunk above `name`, nearest first, up to the data."""
        line: list[str] = []
        while (above := self.trunk(line[-1] if line else name)) is not None:
            line.append(above)
        return line


def _reach(names: Iterable[str], step: Callable[[str], Iterable[str]]) -> set[str]:
    reached: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += step(name)
    return reached


def draw_tree(graph: Graph, name: str, *, everything: bool = False) -> Iterator[str]:
    """Yield the lines of the tree around an artifact: its ancestors above it, its products below.

    The longest line of descent goes straight down; branches are indented. everything: also draw the other products of
    its ancestors, such as evaluations and other mixes.
    """
    above = graph.ancestors([name])
    shown = above | graph.descendants(above if everything else [name])
    children: dict[str | None, list[str]] = {}
    for node in sorted(shown, key=lambda node: (graph.finish_time(node), node)):
        parent = graph.trunk(node)
        if node in graph.artifacts or Reference(*node.split("/")).kind in TRUNK:
            children.setdefault(parent if parent in shown else None, []).append(node)
    nodes = list(children.get(None, []))
    for node in nodes:  # it grows: parents come before their children
        nodes += children.get(node, [])
    depth: dict[str, int] = {}
    for node in reversed(nodes):
        depth[node] = 1 + max((depth[child] for child in children.get(node, [])), default=0)

    def add_line(tree: Tree, node: str | None) -> None:
        while node is not None:
            branches = tree.add(Text(f"{'◉' if node == name else '●'} {_label(graph, node)}"))
            longest = max(children.get(node, []), key=lambda child: depth[child], default=None)
            for child in children.get(node, []):
                if child != longest:
                    add_line(branches, child)
            node = longest

    tree = Tree("", hide_root=True)
    for root in children.get(None, []):
        add_line(tree, root)
    for line in Console(width=WIDEST, file=io.StringIO()).render_lines(tree, pad=False):
        yield "".join(segment.text for segment in line).rstrip()


def _label(graph: Graph, name: str) -> str:
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
    parts = [f"{kind} {artifact.short}{attempt}", describe(artifact), "files dropped" if artifact.dropped else ""]
    return "  ".join(filter(None, [*parts, f"+ {', '.join(dict.fromkeys(others))}" if others else ""]))


def describe(artifact: Artifact) -> str:
    """Return the iteration or mix of an artifact's stage, the policy of an evaluation, and the headline figures."""
    recipe, metrics = artifact.manifest["recipe"], artifact.metrics
    parts = []
    if artifact.kind == "evaluation" and "policy" in artifact.inputs:
        blind = " without tools' images" if recipe["config"].get("blind") else ""
        parts.append(f"of policy {(artifact.inputs['policy'].fingerprint or '?')[:12]}{blind}")
    if "iteration" in recipe["config"]:
        parts.append(f"iteration {recipe['config']['iteration']}")
    if "mix" in recipe["config"]:
        parts.append("mix " + " ".join(f"{name}={weight:g}" for name, weight in recipe["config"]["mix"].items()))
    elif artifact.kind == "policy":
        parts.append(recipe["stage"])
    headline = KINDS[artifact.kind].FIGURES if artifact.kind in KINDS else ()
    keys = headline or [name for name in metrics if name.startswith("reward/")]
    figures = ((key.removeprefix("reward/"), metrics.get(key)) for key in keys)
    parts += [f"{key} {format_number(value)}" for key, value in figures if value is not None]
    return ", ".join(parts)
