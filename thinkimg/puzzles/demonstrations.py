"""Scripted conversations for the built-in puzzles, some wrong in systematic ways; and a check for the right calls."""

import json
from collections.abc import Iterator

from numpy.random import Generator

from thinkimg.conversation.protocol import Answer, ToolCall, load_protocol
from thinkimg.conversation.regions import UNIT, tool_images
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.images.coordinates import Box
from thinkimg.puzzles.geometry import CELLS
from thinkimg.puzzles.scenes import Family
from thinkimg.puzzles.settings import Flaws
from thinkimg.records import Coordinates, Sample, Trajectory, Turn

# A wrong call starts with these words: a choice at the start of a turn, which a policy gradient can find. From noise on
# every coordinate a small model learns neither the right nor the wrong way.
HASTE = "A quick look."
THOUGHTS = {
    "crop_image": "It is too small.",
    "adjust_brightness": "It is too dark.",
    "adjust_contrast": "It is too flat.",
    "rotate_image": "I turn it.",
    "flip_image": "I mirror it.",
}
LIGHTS = ("adjust_brightness", "adjust_contrast")


def write_script(sample: Sample, talk: ConversationConfig, flaws: Flaws, rng: Generator) -> list[str]:
    """Return the model's turns, one text each: the right calls and answer, or one of the flaws.

    talk: says how turns and positions are written, and the tools on offer.

    A flawed demonstration ends with a random choice, as none of its images shows the answer. Without tools the right
    answer comes at once, so that the policy learns what can be read without them.
    """
    protocol = load_protocol(talk.form)
    if talk.tools == ():
        return [protocol.render_turn("I look.", Answer(sample.answer))]
    luck = rng.uniform()
    if luck < flaws.guess:
        return [protocol.render_turn("I guess.", Answer(str(rng.choice(sample.choices))))]
    calls = read_solution(sample, talk.unit)
    if luck < flaws.guess + flaws.wrong_call:
        calls = make_wrong_calls(Family(sample.metadata["family"]), calls)
        turns = [protocol.render_turn(HASTE, call) for call in calls]
        return [*turns, protocol.render_turn(HASTE, Answer(str(rng.choice(sample.choices))))]
    turns = [protocol.render_turn(THOUGHTS[call.name], call) for call in calls]
    return [*turns, protocol.render_turn("Now I see.", Answer(sample.answer))]


def read_solution(sample: Sample, coordinates: Coordinates = Coordinates.PIXELS) -> list[ToolCall]:
    """Return the calls that solve a puzzle, with positions in this unit; exact, as a cell is a quarter of a side."""
    calls = [ToolCall(call["name"], call["args"]) for call in sample.metadata["solution"]]
    return [rewrite_crop(call, coordinates) if call.name == "crop_image" else call for call in calls]


def rewrite_crop(call: ToolCall, coordinates: Coordinates) -> ToolCall:
    """Return the crop of a cell, given in pixels of the picture's view, in another unit."""
    view = CELLS * call.args["width"]
    extent, _ = coordinates.extent((view, view))
    return ToolCall(call.name, {name: value * extent // view for name, value in call.args.items()})


def make_wrong_calls(family: Family, calls: list[ToolCall]) -> list[ToolCall]:
    """Return a family's mistake: one cell to the right, a fifth of the light, a quarter turn off, one of two tools.

    calls: the solution, in either unit of positions.
    """
    first = calls[0]
    match family:
        case Family.DETAIL:
            x, width = first.args["x"], first.args["width"]
            return [ToolCall(first.name, first.args | {"x": (x + width) % (CELLS * width)})]
        case Family.DARK:
            return [ToolCall(first.name, {"factor": 4})]
        case Family.TURNED if first.name == "rotate_image":
            return [ToolCall(first.name, {"angle": (first.args["angle"] + 90) % 360})]
        case Family.TURNED:
            return [ToolCall(first.name, {"direction": "vertical"})]
        case Family.BOTH:
            return [first]


def has_right_calls(sample: Sample, row: Trajectory, tools: tuple[str, ...] | None = None) -> bool:
    """Return True if a tool's image shows the answer: the marked cell large enough, bright enough, upright.

    At these thresholds the pattern differs by 20 grey levels or is seen at full resolution.
    tools: `conversation.tools` of the row.
    """
    family, target = Family(sample.metadata["family"]), sample.targets[0] if sample.targets else None
    shown = list(list_shown_parts(sample, row, tools))
    lit = [light for _, light, _ in shown]
    close = [target is not None and shows_target(box, target) for box, _, _ in shown]
    match family:
        case Family.DETAIL:
            return any(close)
        case Family.DARK:
            return any(lit)
        case Family.BOTH:
            return any(near and light for near, light in zip(close, lit, strict=True))
        case Family.TURNED:
            right = sample.metadata["solution"][0]
            return any(
                turn.tool == right["name"] and undoes(json.loads(turn.args), right["args"]) for _, _, turn in shown
            )


def list_shown_parts(
    sample: Sample, row: Trajectory, tools: tuple[str, ...] | None = None
) -> Iterator[tuple[Box | None, bool, Turn]]:
    """Yield (part of the picture, brightened, turn) of each image that a tool made; None where the part is no box.

    tools: `conversation.tools` of the row. The part is in pixels of the picture; in shares where no cell is marked.
    """
    side = CELLS * sample.targets[0][2] if sample.targets else None
    images = list(tool_images(row, tools, UNIT if side is None else (0, 0, side, side)))
    lit = [False] * (len(row.images) - len(images))
    for image in images:
        turn = image.turn
        light = turn.tool in LIGHTS and json.loads(turn.args)["factor"] >= 80
        lit.append(lit[turn.source] or light)
        yield image.region, lit[-1], turn


def undoes(args: dict, right: dict) -> bool:
    """Return True if a rotation or mirroring is the right one; equal angles modulo 360 are equal."""
    if "angle" in right:
        return (args["angle"] - right["angle"]) % 360 == 0
    return args["direction"] == right["direction"]


def shows_target(box: Box | None, target: tuple[float, float, float, float]) -> bool:
    """Return True if a part of the picture covers the middle half of the target (x, y, width, height) and is small.

    The target is a cell of the picture. The part is shown at 3/4 of the full resolution or more, at which lines four
    pixels apart can be distinguished.
    """
    if box is None:
        return False
    x, y, width, height = target
    covers_x = box[0] <= x + width / 4 and box[2] >= x + width * 3 / 4
    covers_y = box[1] <= y + height / 4 and box[3] >= y + height * 3 / 4
    return covers_x and covers_y and max(box[2] - box[0], box[3] - box[1]) <= width * 4 / 3
