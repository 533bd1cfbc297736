"""Which rows are computed together: a group's common prompt once, then each row's own tokens, in packed micro-batches.

    row 1   [ prompt with its images | first answer | tool image | … ]
    row 2   [ prompt with its images | another answer … ]
    packed  [ prompt with its images | first answer | tool image | … | another answer … ]     one sequence, nothing padded

Every token attends to the prompt and to its own row only (attention.py), and has the position that it has in its row.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from thinkimg.images.patches import image_tokens
from thinkimg.trainer.forward.packing import Conversation, mrope_positions


class Unit(NamedTuple):
    """Rows that share their first `prefix` tokens; a row on its own is all prefix."""

    rows: tuple[int, ...]
    prefix: int


class Span(NamedTuple):
    """Tokens [start, start + length) of a packed sequence; parent: number of the span that it may look at, too."""

    start: int
    length: int
    parent: int


@dataclass(frozen=True)
class Packed:
    """A micro-batch as one sequence of T tokens.

    tokens: (T,) int64. positions: (3, T) int64. spans: in order, without gaps; branches follow their prefix, whose
    own parent it is. images, grids: of each prefix and branch in order. before, targets: (N,) int64, for each scored
    token, row by row in the order of the rows, the packed index of the token before it and its id.
    """

    tokens: np.ndarray
    positions: np.ndarray
    spans: tuple[Span, ...]
    images: tuple[str, ...]
    grids: np.ndarray
    before: np.ndarray
    targets: np.ndarray


def common_prefix(a: Conversation, b: Conversation, image_token: int) -> int:
    """Number of first tokens that two rows have in common, images included by content hash and grid; splits no image.

    Positions agree on it, since they depend on nothing but the tokens and the grids before.
    """
    length = min(len(a.tokens), len(b.tokens))
    different = np.flatnonzero(a.tokens[:length] != b.tokens[:length])
    if len(different):
        length = int(different[0])
    for k, (start, end) in enumerate(image_spans(a, image_token)):
        if start >= length:
            break
        same = k < len(b.images) and a.images[k] == b.images[k] and np.array_equal(a.grids[k], b.grids[k])
        if not same or end > length:
            return start
    return length


def image_spans(row: Conversation, image_token: int) -> list[tuple[int, int]]:
    """[start, end) of each image's tokens."""
    places = np.flatnonzero(row.tokens == image_token)
    sizes = np.array([image_tokens(grid) for grid in row.grids], dtype=np.int64)
    ends = np.cumsum(sizes)
    return [(int(places[end - size]), int(places[end - 1]) + 1) for size, end in zip(sizes, ends, strict=True)]


def plan(
    conversations: Sequence[Conversation], groups: Sequence[Hashable], token_budget: int, image_token: int
) -> list[list[Unit]]:
    """Micro-batches of at most token_budget tokens each (or a single row), those of the most tokens first.

    Rows of one group share what they have in common, where that saves anything. A group that is larger than the budget
    is cut, and its prompt computed in each part.
    """
    units = [
        (unit, cost(unit, conversations))
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


def share_groups(conversations: Sequence[Conversation], groups: Sequence[Hashable], image_token: int) -> list[Unit]:
    """A unit for each group, several where its rows don't begin alike; the shortest rows of a unit come first."""
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    units: list[Unit] = []
    for rows in members.values():
        rows.sort(key=lambda i: (len(conversations[i].tokens), i))
        while rows:
            first, rest = rows[0], []
            taken, prefix = [first], len(conversations[first].tokens)
            for i in rows[1:]:
                common = common_prefix(conversations[first], conversations[i], image_token)
                # A row is let in unless the others lose more by it (shared tokens) than it gains itself.
                shorter = min(prefix, common)
                if len(taken) * shorter > (len(taken) - 1) * prefix:
                    taken.append(i)
                    prefix = shorter
                else:
                    rest.append(i)
            units.append(Unit(tuple(taken), prefix))
            rows = rest
    return units


def cost(unit: Unit, conversations: Sequence[Conversation]) -> int:
    """Tokens that are computed."""
    return unit.prefix + sum(len(conversations[i].tokens) - unit.prefix for i in unit.rows)


def cut(unit: Unit, conversations: Sequence[Conversation], token_budget: int) -> list[Unit]:
    """The unit, or even parts of it that keep to the budget (as far as the longest row does)."""
    own = [len(conversations[i].tokens) - unit.prefix for i in unit.rows]
    room = max(token_budget - unit.prefix, max(own), 1)
    if sum(own) <= room:
        return [unit]
    even = sum(own) / -(-sum(own) // room)
    parts: list[list[int]] = [[]]
    used = 0
    for i, more in zip(unit.rows, own, strict=True):
        if parts[-1] and (used + more > room or used + more / 2 > even):
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += more
    return [Unit(tuple(p), unit.prefix if len(p) > 1 else len(conversations[p[0]].tokens)) for p in parts]


def balance(
    conversations: Sequence[Conversation], groups: Sequence[Hashable], image_token: int, parts: int
) -> list[list[int]]:
    """Row indices for each of so many processes: whole groups as far as that leaves none idle, about as much work each."""
    pieces = [(cost(unit, conversations), unit) for unit in share_groups(conversations, groups, image_token)]
    while len(pieces) < 2 * parts and any(len(unit.rows) > 1 for _, unit in pieces):
        i = max((i for i, (_, unit) in enumerate(pieces) if len(unit.rows) > 1), key=lambda i: pieces[i][0])
        _, unit = pieces.pop(i)
        for rows in (unit.rows[::2], unit.rows[1::2]):
            half = Unit(rows, unit.prefix)
            pieces.append((cost(half, conversations), half))
    dealt: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for tokens, unit in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        lightest = load.index(min(load))
        dealt[lightest] += unit.rows
        load[lightest] += tokens
    return [sorted(rows) for rows in dealt]


def pack(rows: Sequence[Conversation], units: Sequence[Unit], image_token: int) -> Packed:
    """One sequence of the rows (each in exactly one of the units)."""
    tokens, positions, spans = [], [], []
    images: list[str] = []
    grids: list[np.ndarray] = []
    before: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(rows)
    end = 0

    def add(row: Conversation, where: np.ndarray, start: int, stop: int, parent: int) -> None:
        nonlocal end
        spans.append(Span(end, stop - start, parent))
        tokens.append(row.tokens[start:stop])
        positions.append(where[:, start:stop])
        for key, grid, (first, _) in zip(row.images, row.grids, image_spans(row, image_token), strict=True):
            if start <= first < stop:
                images.append(key)
                grids.append(grid)
        end += stop - start

    for unit in units:
        parent, first = len(spans), end
        prefix_positions = None
        for i in unit.rows:
            where = mrope_positions(rows[i].tokens, image_token, rows[i].grids)
            if prefix_positions is None:
                prefix_positions = where[:, : unit.prefix]
                add(rows[i], where, 0, unit.prefix, parent)
            assert np.array_equal(where[:, : unit.prefix], prefix_positions), "positions agree on a common prompt"
            own = end
            if len(rows[i].tokens) > unit.prefix:
                add(rows[i], where, unit.prefix, len(rows[i].tokens), parent)
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
    """The same with padding at the end, a span that nothing else looks at."""
    more = length - len(packed.tokens)
    if not more:
        return packed
    return replace(
        packed,
        tokens=np.pad(packed.tokens, (0, more), constant_values=pad_token),
        positions=np.pad(packed.positions, ((0, 0), (0, more))),
        spans=(*packed.spans, Span(len(packed.tokens), more, len(packed.spans))),
    )


def obstacle(config) -> str | None:
    """Why rows of a model with this text config can't be packed, or None. What shares a sequence must not notice.

    config: Qwen2_5_VLTextConfig.
    """
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "it attends within a sliding window, which packing would shift"
    if getattr(config, "attention_dropout", 0.0):
        return "it drops attention at random, which the packed attention does not"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        return f"its positions ({kind}) depend on the length of the whole sequence"
    return None
