"""Pairs of processed images of which one is known to help, for training, calibrating and measuring judges."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.random import Generator
from PIL import Image

from thinkimg.conversation.picture import model_view_size
from thinkimg.conversation.protocol import ToolCall
from thinkimg.images import toolbox
from thinkimg.puzzles.demonstrations import make_wrong_calls, read_solution
from thinkimg.puzzles.geometry import CELLS, SCALE, Geometry
from thinkimg.puzzles.scenes import Family
from thinkimg.records import Sample


@dataclass(frozen=True)
class KnownPair:
    """A puzzle's picture, the image from which it can be read, and one from which it can't; RGB at full resolution."""

    sample: Sample
    original: Image.Image
    right: Image.Image
    wrong: Image.Image


def make_known_pairs(
    samples: Sequence[Sample], picture: Callable[[str], Image.Image], *, seed: int
) -> Iterator[KnownPair]:
    """Yield a pair per sample of the built-in puzzles. picture: content hash -> image.

    The wrong image is the script's systematic mistake, such as too little light, another part of the picture, or noise.
    """
    for number, sample in enumerate(samples):
        rng = np.random.default_rng([seed, 5, number])
        original = picture(sample.images[0])
        solution = read_solution(sample)
        yield KnownPair(sample, original, apply_calls(original, solution), make_wrong(sample, original, solution, rng))


def apply_calls(image: Image.Image, calls: Sequence[ToolCall]) -> Image.Image:
    """Return the last image of a chain of calls on a puzzle's picture, with positions in pixels of its view."""
    sizes = partial(model_view_size, limits=Geometry.of_picture(image.size).limits)
    for call in calls:
        result = toolbox.run_tool(call.name, call.args, [image], sizes)
        assert result.image is not None, result.error
        image = result.image
    return image


def make_wrong(sample: Sample, original: Image.Image, solution: list[ToolCall], rng: Generator) -> Image.Image:
    """Return an image from which the puzzle cannot be read."""
    family = Family(sample.metadata["family"])
    kinds = ["mistake", "noise"] if family in (Family.DARK, Family.TURNED) else ["mistake", "elsewhere", "elsewhere"]
    match kinds[rng.integers(len(kinds))]:
        case "mistake":
            return apply_calls(original, make_wrong_calls(family, solution))
        case "noise":
            view = Geometry.of_picture(original.size).view
            noise = Image.fromarray(rng.integers(0, 256, (view, view, 3), dtype=np.uint8))
            return noise.resize(original.size, Image.Resampling.NEAREST)
        case _:
            return apply_calls(original, [draw_other_crop(sample, rng), *solution[1:]])


def draw_other_crop(sample: Sample, rng: Generator) -> ToolCall:
    """Return a crop of the right size at a random position that does not show the middle of the marked cell."""
    target_x, target_y, width, _ = (value // SCALE for value in sample.targets[0])
    side = int(width)
    while True:
        x, y = (int(value) for value in rng.integers(0, (CELLS - 1) * side + 1, 2))
        if abs(x - target_x) >= side * 3 // 4 or abs(y - target_y) >= side * 3 // 4:
            return ToolCall("crop_image", {"x": x, "y": y, "width": side, "height": side})
