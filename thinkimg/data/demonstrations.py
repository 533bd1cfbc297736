"""Scripted conversations for the built-in puzzles, wrong on purpose in systematic ways, and a user's own from a file."""

from typing import TYPE_CHECKING

from thinkimg.chat.protocol import Answer, Protocol, ToolCall
from thinkimg.data.puzzles import CELL, SCALE, SIZE, Family
from thinkimg.schemas import Sample

if TYPE_CHECKING:
    from numpy.random import Generator

    from thinkimg.config import Flaws

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


def script(sample: Sample, protocol: Protocol, flaws: "Flaws", rng: "Generator", *, tools: bool) -> list[str]:
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


def right_calls(sample: Sample, calls: list[ToolCall]) -> bool:
    """Whether the puzzle can be read after these calls: the marked cell is seen large enough, bright enough, upright.

    The thresholds are those at which the pattern stands out by 20 grey levels or is seen at full resolution.
    """
    family, target = Family(sample.metadata["family"]), sample.metadata["target"]
    lit = any(call.name in ("adjust_brightness", "adjust_contrast") and call.args["factor"] >= 80 for call in calls)
    seen = target is not None and any(call.name == "crop_image" and holds(call.args, target) for call in calls)
    match family:
        case Family.DETAIL:
            return seen
        case Family.DARK:
            return lit
        case Family.BOTH:
            return lit and seen
        case Family.TURNED:
            right = sample.metadata["solution"][0]
            return any(call.name == right["name"] and undoes(call.args, right["args"]) for call in calls)


def undoes(args: dict, right: dict) -> bool:
    """Whether a rotation or mirroring is the right one; angles count by where they end."""
    if "angle" in right:
        return (args["angle"] - right["angle"]) % 360 == 0
    return args["direction"] == right["direction"]


def holds(crop: dict, target: list[int]) -> bool:
    """Whether a crop (in view pixels) holds the middle half of the target (x, y, width, height in picture pixels) at a
    scale of at least 3/4 of the full resolution, where lines four pixels apart are still told apart."""
    left, top = crop["x"] * SCALE, crop["y"] * SCALE
    right, bottom = left + crop["width"] * SCALE, top + crop["height"] * SCALE
    x, y, width, height = target
    inside = (
        left <= x + width / 4 and top <= y + height / 4 and right >= x + width * 3 / 4 and bottom >= y + height * 3 / 4
    )
    return inside and max(right - left, bottom - top) <= SIZE // SCALE * 4 / 3
