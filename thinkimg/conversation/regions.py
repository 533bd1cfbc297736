"""Regions: the part of a sample's image that each image of a conversation shows, as the tools state it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from thinkimg.images.coordinates import Box, Frame, map_to_region
from thinkimg.images.tool import in_place
from thinkimg.images.toolbox import load_tools
from thinkimg.records import Trajectory, Turn

UNIT: Box = (0.0, 0.0, 1.0, 1.0)
"""Whole image, in shares of its sides."""


@dataclass(frozen=True)
class ToolImage:
    """Image that a tool made."""

    turn: Turn
    root: int
    """Index of the sample's image that it was made from, directly or by several calls."""
    region: Box | None
    """Part of that image that it shows, in the units of `frame`; None where that is no box."""
    cut: float | None
    """Area that the call cut out of its source, as a share of it; None where it cut out none."""


def tool_images(row: Trajectory, tools: tuple[str, ...] | None = None, frame: Box = UNIT) -> Iterator[ToolImage]:
    """Yield each image that a tool made, in order, with the part of the sample's image that it shows.

    tools: `conversation.tools` of the row. frame: the sample's image, in shares or in pixels.
    """
    loaded = load_tools(tools)
    own = len(row.images) - sum(turn.image is not None for turn in row.turns)
    shown: list[tuple[int, Box | None]] = [(number, frame) for number in range(own)]
    for turn in row.turns:
        if turn.image is None:
            continue
        assert turn.source is not None
        root, region = shown[turn.source]
        tool, cut = loaded.get(turn.tool or ""), None
        if box := cut_box(row, turn, tools):
            view = row.extents[turn.source]
            cut = (box[2] - box[0]) * (box[3] - box[1]) / (view[0] * view[1])
            region = region and map_to_region(region, box, view)
        elif tool is None or tool.region is not in_place:
            region = None
        shown.append((root, region))
        yield ToolImage(turn, root, region, cut)


def cut_box(row: Trajectory, turn: Turn, tools: tuple[str, ...] | None = None) -> Box | None:
    """Return the box that a turn cut out of its source, in the row's coordinates; None for none."""
    tool = load_tools(tools).get(turn.tool or "")
    if tool is None:
        return None
    assert turn.args is not None and turn.source is not None
    return tool.cut(json.loads(turn.args), row.extents[turn.source])


def source_box(
    row: Trajectory, turn: Turn, size: tuple[int, int], tools: tuple[str, ...] | None = None
) -> tuple[int, int, int, int] | None:
    """Return the box that a turn cut out of its source, in pixels of that image; None for none.

    size: (width, height) of the source image in pixels. Right and bottom edges are exclusive.
    """
    cut = cut_box(row, turn, tools)
    if cut is None:
        return None
    assert turn.source is not None
    return Frame(size, row.sizes[turn.source], row.coordinates).box_to_full(cut)
