"""Packed micro-batches: a group's common prompt once, then each row's own tokens.

    row 1   [ prompt with its images | first answer | tool image | … ]
    row 2   [ prompt with its images | another answer … ]
    packed  [ prompt with its images | first answer | tool image | … | another answer … ]    one sequence, no padding

Every token attends to the prompt and to its own row only (packed_attention.py), and keeps the position of its row.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from thinkimg.trainer.forward.packing import Conversation, ImageToken, compute_mrope_positions


class Unit(NamedTuple):
    """Rows that share their first `prefix` tokens; a row alone is all prefix."""

    rows: tuple[int, ...]
    prefix: int


class Span(NamedTuple):
    """Tokens [start, start + length) of a packed sequence; parent: number of the span that it also attends to."""

    start: int
    length: int
    parent: int


@dataclass(frozen=True)
class Packed:
    """A micro-batch as one sequence of T tokens, of which N are scored."""

    tokens: np.ndarray
    """(T,) int64."""
    positions: np.ndarray
    """(3, T) int64."""
    spans: tuple[Span, ...]
    """In order, without gaps; branches follow their prefix, which is its own parent."""
    images: tuple[str, ...]
    """Keys of the images of each prefix and branch, in order."""
    grids: np.ndarray
    """(images, 3) int64."""
    before: np.ndarray
    """(N,) int64: packed index of the token before each scored one, row by row."""
    targets: np.ndarray
    """(N,) int64: ids of the scored tokens, row by row."""


def count_common_prefix(a: Conversation, b: Conversation, image_token: ImageToken) -> int:
    """Return the number of first tokens that two rows share, images included by content hash and grid; splits no image.

    Positions agree there, since they depend on nothing but the tokens and the grids before.
    """
    length = min(len(a.tokens), len(b.tokens))
    different = np.flatnonzero(a.tokens[:length] != b.tokens[:length])
    if len(different):
        length = int(different[0])
    for k, (start, end) in enumerate(find_image_spans(a, image_token)):
        if start >= length:
            break
        same = k < len(b.images) and a.images[k] == b.images[k] and np.array_equal(a.grids[k], b.grids[k])
        if not same or end > length:
            return start
    return length


def find_image_spans(row: Conversation, image_token: ImageToken) -> list[tuple[int, int]]:
    """Return [start, end) of each image's tokens."""
    index = np.flatnonzero(row.tokens == image_token.id)
    sizes = np.array([image_token.count(grid) for grid in row.grids], dtype=np.int64)
    ends = np.cumsum(sizes)
    return [(int(index[end - size]), int(index[end - 1]) + 1) for size, end in zip(sizes, ends, strict=True)]


def plan(
    conversations: Sequence[Conversation], groups: Sequence[Hashable], token_budget: int, image_token: ImageToken
) -> list[list[Unit]]:
    """Return micro-batches of at most token_budget tokens each (or a single row), those of the most tokens first.

    Rows of one group share their common tokens if that saves anything. A group that is larger than the budget is cut,
    and its prompt computed in each part.
    """
    units = [
        (unit, count_unit_tokens(unit, conversations))
        for unit in share_groups(conversations, groups, image_token)
        for unit in cut(unit, conversations, token_budget)
    ]
    units.sort(key=lambda pair: (-pair[1], pair[0]))
    batches: list[tuple[list[Unit], int]] = []
    for unit, tokens in units:  # first fit, decreasing
        for i, (batch, used) in enumerate(batches):
            if used + tokens <= token_budget:
                batches[i] = ([*batch, unit], used + tokens)
                break
        else:
            batches.append(([unit], tokens))
    return [batch for batch, _ in sorted(batches, key=lambda pair: -pair[1])]


def share_groups(
    conversations: Sequence[Conversation], groups: Sequence[Hashable], image_token: ImageToken
) -> list[Unit]:
    """Return a unit for each group, several if its rows don't begin alike; the shortest rows of a unit come first."""
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    units: list[Unit] = []
    for rows in members.values():
        rows.sort(key=lambda i: (len(conversations[i].tokens), i))
        while rows:
            first, rest = rows[0], []
            sharing, prefix = [first], len(conversations[first].tokens)
            for i in rows[1:]:
                common = count_common_prefix(conversations[first], conversations[i], image_token)
                # A row joins unless the others lose more shared tokens by it than it saves itself.
                shorter = min(prefix, common)
                if len(sharing) * shorter > (len(sharing) - 1) * prefix:
                    sharing.append(i)
                    prefix = shorter
                else:
                    rest.append(i)
            units.append(Unit(tuple(sharing), prefix))
            rows = rest
    return units


def count_unit_tokens(unit: Unit, conversations: Sequence[Conversation]) -> int:
    """Return the tokens that a unit computes: its prefix once."""
    return unit.prefix + sum(len(conversations[i].tokens) - unit.prefix for i in unit.rows)


def cut(unit: Unit, conversations: Sequence[Conversation], token_budget: int) -> list[Unit]:
    """Return the unit, or even parts of it within the budget (as far as the longest row is)."""
    own = [len(conversations[i].tokens) - unit.prefix for i in unit.rows]
    room = max(token_budget - unit.prefix, max(own), 1)
    if sum(own) <= room:
        return [unit]
    target = sum(own) / -(-sum(own) // room)
    parts: list[list[int]] = [[]]
    used = 0
    for i, more in zip(unit.rows, own, strict=True):
        if parts[-1] and (used + more > room or used + more / 2 > target):
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += more
    return [Unit(tuple(p), unit.prefix if len(p) > 1 else len(conversations[p[0]].tokens)) for p in parts]


def balance(
    conversations: Sequence[Conversation], groups: Sequence[Hashable], image_token: ImageToken, parts: int
) -> list[list[int]]:
    """Return the row indices of each of `parts` processes, for about equal work.

    Groups stay together as far as that leaves no process idle.
    """
    pieces = [(count_unit_tokens(u, conversations), u) for u in share_groups(conversations, groups, image_token)]
    while len(pieces) < 2 * parts and any(len(unit.rows) > 1 for _, unit in pieces):
        i = max((i for i, (_, unit) in enumerate(pieces) if len(unit.rows) > 1), key=lambda i: pieces[i][0])
        _, unit = pieces.pop(i)
        for rows in (unit.rows[::2], unit.rows[1::2]):
            half = Unit(rows, unit.prefix)
            pieces.append((count_unit_tokens(half, conversations), half))
    dealt: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for tokens, unit in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        lightest = load.index(min(load))
        dealt[lightest] += unit.rows
        load[lightest] += tokens
    return [sorted(rows) for rows in dealt]


def pack(rows: Sequence[Conversation], units: Sequence[Unit], image_token: ImageToken) -> Packed:
    """Return the rows as one sequence; each row is in exactly one of the units."""
    tokens, positions, spans = [], [], []
    images: list[str] = []
    grids: list[np.ndarray] = []
    before: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(rows)
    end = 0

    def add(row: Conversation, row_positions: np.ndarray, start: int, stop: int, parent: int) -> None:
        nonlocal end
        spans.append(Span(end, stop - start, parent))
        tokens.append(row.tokens[start:stop])
        positions.append(row_positions[:, start:stop])
        for key, grid, (first, _) in zip(row.images, row.grids, find_image_spans(row, image_token), strict=True):
            if start <= first < stop:
                images.append(key)
                grids.append(grid)
        end += stop - start

    for unit in units:
        parent, first = len(spans), end
        prefix_positions = None
        for i in unit.rows:
            row_positions = compute_mrope_positions(rows[i].tokens, image_token, rows[i].grids)
            if prefix_positions is None:
                prefix_positions = row_positions[:, : unit.prefix]
                add(rows[i], row_positions, 0, unit.prefix, parent)
            assert np.array_equal(row_positions[:, : unit.prefix], prefix_positions), "positions differ on a prompt"
            own = end
            if len(rows[i].tokens) > unit.prefix:
                add(rows[i], row_positions, unit.prefix, len(rows[i].tokens), parent)
            previous = np.flatnonzero(rows[i].scored) - 1
            before[i] = np.where(previous < unit.prefix, first + previous, own + previous - unit.prefix)
    return Packed(
        tokens=np.concatenate(tokens),
        positions=np.concatenate(positions, axis=1),
        spans=tuple(spans),
        images=tuple(images),
        grids=np.array(grids, dtype=np.int64).reshape(-1, 3),
        before=np.concatenate(before),
        targets=np.concatenate([row.tokens[row.scored] for row in rows]),
    )


def pad(packed: Packed, length: int, pad_token: int) -> Packed:
    """Return the sequence with padding at its end, a span that nothing else attends to."""
    more = length - len(packed.tokens)
    if not more:
        return packed
    return replace(
        packed,
        tokens=np.pad(packed.tokens, (0, more), constant_values=pad_token),
        positions=np.pad(packed.positions, ((0, 0), (0, more))),
        spans=(*packed.spans, Span(len(packed.tokens), more, len(packed.spans))),
    )


def find_obstacle(config) -> str | None:
    """Return the reason why a model can't compute packed rows as it does single ones, or None.

    config: of the language model. Families have reasons of their own (Family.packing_obstacle).
    """
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "it attends within a sliding window, which packing would shift"
    if getattr(config, "attention_dropout", 0.0):
        return "it drops attention at random, which the packed attention does not"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        return f"its positions ({kind}) depend on the length of the whole sequence"
    return None
