"""The region of a sample's picture that each image of a conversation shows, by what the tools state of their calls."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from thinkimg.images.coordinates import Box, within
from thinkimg.images.tool import in_place
from thinkimg.images.toolbox import load_tools
from thinkimg.records import Trajectory, Turn

UNIT: Box = (0.0, 0.0, 1.0, 1.0)
"""A picture in shares of its sides."""


@dataclass(frozen=True)
class ToolImage:
    """An image that a tool made."""

    turn: Turn
    root: int
    """Index of the sample's image that it goes back to."""
    region: Box | None
    """The part of that image that it shows, in the units of `whole`; None where no box tells."""
    cut: float | None
    """Share of its source that the call has cut out; None where it cut out none."""


def tool_images(row: Trajectory, tools: tuple[str, ...] | None = None, whole: Box = UNIT) -> Iterator[ToolImage]:
    """Yield each image that a tool made, in order, with the part of the sample's image that it shows.

    tools: `conversation.tools` of the row. whole: the sample's image, in shares or in pixels.
    """
    known = load_tools(tools)
    own = len(row.images) - sum(turn.image is not None for turn in row.turns)
    shown: list[tuple[int, Box | None]] = [(number, whole) for number in range(own)]
    for turn in row.turns:
        if turn.image is None:
            continue
        assert turn.source is not None
        root, region = shown[turn.source]
        tool, cut = known.get(turn.tool or ""), None
        if box := cut_box(row, turn, tools):
            view = seen_size(row, turn.source)
            cut = (box[2] - box[0]) * (box[3] - box[1]) / (view[0] * view[1])
            region = region and within(region, box, view)
        elif tool is None or tool.region is not in_place:
            region = None
        shown.append((root, region))
        yield ToolImage(turn, root, region, cut)


def cut_box(row: Trajectory, turn: Turn, tools: tuple[str, ...] | None = None) -> Box | None:
    """Return what a turn with an image has cut out of its source, in pixels of the source's view; None for nothing."""
    tool = load_tools(tools).get(turn.tool or "")
    if tool is None:
        return None
    assert turn.args is not None and turn.source is not None
    return tool.cut(json.loads(turn.args), seen_size(row, turn.source))


def seen_size(row: Trajectory, image: int) -> tuple[int, int]:
    """Return (width, height) in pixels of an image of the conversation as the model saw it."""
    return row.sizes[image]
