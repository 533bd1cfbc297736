"""Scripted conversations for the built-in puzzles, some wrong in systematic ways; and a check for the right calls."""

import json
from collections.abc import Iterator

from numpy.random import Generator

from thinkimg.conversation.protocol import Answer, Protocol, ToolCall
from thinkimg.conversation.regions import tool_images
from thinkimg.images.coordinates import Box
from thinkimg.puzzles.scenes import CELL, SCALE, SIZE, Family
from thinkimg.puzzles.settings import Flaws
from thinkimg.records import Sample, Trajectory, Turn

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


def write_script(sample: Sample, protocol: Protocol, flaws: Flaws, rng: Generator, *, tools: bool) -> list[str]:
    """Return the model's turns, one text each: the right calls and answer, or one of the flaws.

    A flawed demonstration ends with a random choice, as none of its images shows the answer. Without tools the right
    answer comes at once, so that the policy learns what can be read without them.
    """
    if not tools:
        return [protocol.render_turn("I look.", Answer(sample.answer))]
    luck = rng.uniform()
    if luck < flaws.guess:
        return [protocol.render_turn("I guess.", Answer(str(rng.choice(sample.choices))))]
    calls = [ToolCall(call["name"], call["args"]) for call in sample.metadata["solution"]]
    if luck < flaws.guess + flaws.wrong_call:
        calls = make_wrong_calls(Family(sample.metadata["family"]), calls)
        turns = [protocol.render_turn(HASTE, call) for call in calls]
        return [*turns, protocol.render_turn(HASTE, Answer(str(rng.choice(sample.choices))))]
    turns = [protocol.render_turn(THOUGHTS[call.name], call) for call in calls]
    return [*turns, protocol.render_turn("Now I see.", Answer(sample.answer))]


def make_wrong_calls(family: Family, calls: list[ToolCall]) -> list[ToolCall]:
    """Return a family's mistake: one cell to the right, a fifth of the light, a quarter turn off, one of two tools."""
    first = calls[0]
    match family:
        case Family.DETAIL:
            return [ToolCall(first.name, first.args | {"x": (first.args["x"] + CELL // SCALE) % (SIZE // SCALE)})]
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
    shown = list(list_shown_parts(row, tools))
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


def list_shown_parts(row: Trajectory, tools: tuple[str, ...] | None = None) -> Iterator[tuple[Box | None, bool, Turn]]:
    """Yield (part of the picture, brightened, turn) of each image that a tool made; None where the part is no box.

    tools: `conversation.tools` of the row.
    """
    images = list(tool_images(row, tools, (0, 0, SIZE, SIZE)))
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

    It is shown at 3/4 of the full resolution or more, at which lines four pixels apart can be distinguished.
    """
    if box is None:
        return False
    x, y, width, height = target
    covers_x = box[0] <= x + width / 4 and box[2] >= x + width * 3 / 4
    covers_y = box[1] <= y + height / 4 and box[3] >= y + height * 3 / 4
    return covers_x and covers_y and max(box[2] - box[0], box[3] - box[1]) <= SIZE / SCALE * 4 / 3
