"""Pairs of processed images of which one is known to help: what judges learn from, are calibrated on and measured by."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image

from thinkimg.conversation.protocol import ToolCall
from thinkimg.images import toolbox
from thinkimg.images.view import view_size
from thinkimg.puzzles.demonstrations import wrong_calls
from thinkimg.puzzles.scenes import CELL, SCALE, SIZE, VIEW, Family
from thinkimg.records import Sample


@dataclass(frozen=True)
class KnownPair:
    """A puzzle's picture, the image from which it can be read, and one from which it can't; RGB at full resolution."""

    sample: Sample
    original: Image.Image
    right: Image.Image
    wrong: Image.Image


def size_seen(image: Image.Image) -> tuple[int, int]:
    """The puzzles' own view, whoever looks at the pairs: the calls' coordinates are in its pixels."""
    return view_size(*image.size, min_pixels=VIEW["min_pixels"], max_pixels=VIEW["max_pixels"])


def known_pairs(samples: Sequence[Sample], picture: Callable[[str], Image.Image], *, seed: int) -> Iterator[KnownPair]:
    """One pair per sample of the built-in puzzles; picture: content hash -> image.

    The wrong one is drawn from: the script's systematic mistake, another part of the picture, too little light, noise.
    """
    for number, sample in enumerate(samples):
        rng = np.random.default_rng([seed, 5, number])
        original = picture(sample.images[0])
        solution = [ToolCall(call["name"], call["args"]) for call in sample.metadata["solution"]]
        yield KnownPair(sample, original, processed(original, solution), wrong(sample, original, solution, rng))


def processed(image: Image.Image, calls: Sequence[ToolCall]) -> Image.Image:
    """The last image of a chain of calls."""
    for call in calls:
        result = toolbox.run(call.name, call.args, [image], size_seen)
        assert result.image is not None, result.error
        image = result.image
    return image


def wrong(sample: Sample, original: Image.Image, solution: list[ToolCall], rng: Generator) -> Image.Image:
    family = Family(sample.metadata["family"])
    kinds = ["mistake", "noise"] if family in (Family.DARK, Family.TURNED) else ["mistake", "elsewhere", "elsewhere"]
    match kinds[rng.integers(len(kinds))]:
        case "mistake":
            return processed(original, wrong_calls(family, solution))
        case "noise":
            noise = Image.fromarray(rng.integers(0, 256, (SIZE // SCALE, SIZE // SCALE, 3), dtype=np.uint8))
            return noise.resize((SIZE, SIZE), Image.Resampling.NEAREST)
        case _:
            return processed(original, [elsewhere(sample, rng), *solution[1:]])


def elsewhere(sample: Sample, rng: Generator) -> ToolCall:
    """A crop of the right size at a random place that shows none of the marked cell's middle."""
    x, y, *_ = (value // SCALE for value in sample.targets[0])
    side = CELL // SCALE
    while True:
        left, top = (int(value) for value in rng.integers(0, (SIZE - CELL) // SCALE + 1, 2))
        if abs(left - x) >= side * 3 // 4 or abs(top - y) >= side * 3 // 4:
            return ToolCall("crop_image", {"x": left, "y": top, "width": side, "height": side})
