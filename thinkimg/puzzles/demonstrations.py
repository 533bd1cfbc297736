"""Scripted conversations for the built-in puzzles, wrong on purpose in systematic ways; and which calls would be right."""

import json
from collections.abc import Iterator

from numpy.random import Generator

from thinkimg.conversation.protocol import Answer, Protocol, ToolCall
from thinkimg.conversation.regions import tool_images
from thinkimg.images.coordinates import Box
from thinkimg.puzzles.scenes import CELL, SCALE, SIZE, Family
from thinkimg.puzzles.settings import Flaws
from thinkimg.records import Sample, Trajectory, Turn

# Haste goes with the wrong calls: one choice at the start of a turn, which a policy gradient can find, and not noise on
# every coordinate, from which a small model learns neither the right nor the wrong way.
HASTE = "A quick look."
THOUGHTS = {
    "crop_image": "It is too small.",
    "adjust_brightness": "It is too dark.",
    "adjust_contrast": "It is too flat.",
    "rotate_image": "I turn it.",
    "flip_image": "I mirror it.",
}
LIGHTS = ("adjust_brightness", "adjust_contrast")


def script(sample: Sample, protocol: Protocol, flaws: Flaws, rng: Generator, *, tools: bool) -> list[str]:
    """The model's turns, one text each: the right calls and answer, or one of the flaws.

    A flawed demonstration ends with a random choice: nothing that it saw tells the answer. Without tools the right answer
    is given at once, so that the policy learns whatever can be read without them.
    """
    if not tools:
        return [protocol.render_turn("I look.", Answer(sample.answer))]
    luck = rng.uniform()
    if luck < flaws.guess:
        return [protocol.render_turn("I guess.", Answer(str(rng.choice(sample.choices))))]
    calls = [ToolCall(call["name"], call["args"]) for call in sample.metadata["solution"]]
    if luck < flaws.guess + flaws.wrong_call:
        turns = [protocol.render_turn(HASTE, call) for call in wrong_calls(Family(sample.metadata["family"]), calls)]
        return [*turns, protocol.render_turn(HASTE, Answer(str(rng.choice(sample.choices))))]
    turns = [protocol.render_turn(THOUGHTS[call.name], call) for call in calls]
    return [*turns, protocol.render_turn("Now I see.", Answer(sample.answer))]


def wrong_calls(family: Family, calls: list[ToolCall]) -> list[ToolCall]:
    """The same mistake every time: one cell to the right, a fifth of the light, a quarter turn off, one of two tools."""
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


def right_calls(sample: Sample, row: Trajectory, tools: tuple[str, ...] | None = None) -> bool:
    """Whether the puzzle could be read from what the tools showed: the marked cell large enough, bright enough, upright.

    The thresholds are those at which the pattern stands out by 20 grey levels or is seen at full resolution.
    tools: `conversation.tools` of the row.
    """
    family, target = Family(sample.metadata["family"]), sample.targets[0] if sample.targets else None
    shown = list(seen(row, tools=tools))
    lit = [light for _, light, _ in shown]
    close = [target is not None and holds(box, target) for box, _, _ in shown]
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


def seen(
    row: Trajectory, size: tuple[int, int] = (SIZE, SIZE), tools: tuple[str, ...] | None = None
) -> Iterator[tuple[Box | None, bool, Turn]]:
    """Yield (part of the picture, brightened, turn) of each image that a tool made; None where no box tells the part.

    size: width and height of the sample's picture in pixels. tools: `conversation.tools` of the row.
    """
    images = list(tool_images(row, tools, (0, 0, *size)))
    lit = [False] * (len(row.images) - len(images))
    for image in images:
        turn = image.turn
        light = turn.tool in LIGHTS and json.loads(turn.args)["factor"] >= 80
        lit.append(lit[turn.source] or light)
        yield image.region, lit[-1], turn


def undoes(args: dict, right: dict) -> bool:
    """Whether a rotation or mirroring is the right one; angles count by where they end."""
    if "angle" in right:
        return (args["angle"] - right["angle"]) % 360 == 0
    return args["direction"] == right["direction"]


def holds(box: Box | None, target: list[int]) -> bool:
    """Whether a part of the picture holds the middle half of the target (x, y, width, height) and is seen at 3/4 of the
    full resolution or more, where lines four pixels apart are still told apart."""
    if box is None:
        return False
    x, y, width, height = target
    left, top, right, bottom = box
    middle = (
        left <= x + width / 4 and top <= y + height / 4 and right >= x + width * 3 / 4 and bottom >= y + height * 3 / 4
    )
    return middle and max(right - left, bottom - top) <= SIZE / SCALE * 4 / 3
