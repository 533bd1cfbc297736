"""Built-in puzzles over real photographs, made so that the right image tool shows the answer.

The model sees a picture at a quarter of its resolution, as 4 x 4 image tokens, so that its size follows from the side
of the model's tokens (geometry.py): 448 x 448 for tokens of 28 pixels, 512 x 512 for those of 32.

    detail   stripes with a period of four pixels in a framed cell of a 4 x 4 grid; they average out in the view
             (the question does not name the cell)
    dark     bands of one grey level in a dark or flat scene; less than half a level remains in the view
    turned   a letter in a picture that was turned (its red edge belongs on top) or mirrored (the question says so)
    both     dark stripes in a framed cell: two tools in a row, in either order

In detail, dark and both the view does not depend on the answer: another answer changes it by one level at most, in less
than one pixel of a hundred (tests/puzzles/test_scenes.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from thinkimg.conversation.protocol import ToolCall
from thinkimg.data import split
from thinkimg.puzzles.geometry import CELLS, FIELD, FRAME, SCALE, Geometry

TAPER = 24  # pixels over which a plate's stripes set in
COLOURS = ((40, 80, 230), (30, 170, 60), (240, 210, 40), (170, 50, 200))  # of rows, and of columns
RED, WHITE = (230, 40, 40), (235, 235, 235)
STRIPES = ("horizontal", "vertical", "rising", "falling")
LETTERS = ("b", "d", "p", "q")


class Family(StrEnum):
    """Kind of a puzzle; see the top of this module."""

    DETAIL = "detail"
    DARK = "dark"
    TURNED = "turned"
    BOTH = "both"


@dataclass(frozen=True)
class Puzzle:
    """A question about a picture with its solution."""

    family: Family
    photograph: str
    picture: np.ndarray
    """(size, size, 3) uint8, size as the geometry says."""
    question: str
    answer: str
    choices: tuple[str, ...]
    solution: tuple[ToolCall, ...]
    """Calls after which the answer can be read; coordinates are pixels of the view."""
    target: tuple[int, int, int, int] | None
    """(x, y, width, height) of the marked cell in pixels of the picture; None if no cell is marked."""


@cache
def photographs() -> dict[str, Image.Image]:
    """Return real photographs that installed packages ship, by name, in a fixed order."""
    folders = {
        ("skimage", "data"): "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png "
        "gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg",
        ("sklearn", "datasets/images"): "china.jpg flower.jpg",
        ("matplotlib", "mpl-data/sample_data"): "grace_hopper.jpg",
    }
    pictures = {}
    for (package, folder), names in folders.items():
        spec = find_spec(package)  # the package is not imported
        assert spec is not None and spec.origin is not None, package
        for name in names.split():
            with Image.open(Path(spec.origin).parent / folder / name) as image:
                pictures[Path(name).stem] = image.convert("RGB")
    return pictures


def split_photographs(names: list[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """Return (train, held out) names: a photograph is on one side, so that held-out puzzles show other pictures."""
    chosen = split.choose_held_out(names, held_out, seed)
    return sorted(set(names) - chosen), sorted(chosen)


def make_puzzle(families: Sequence[Family], names: list[str], i: int, *, seed: int, geometry: Geometry) -> Puzzle:
    """Return the i-th puzzle, families in turn, over the named photographs; it depends on the arguments alone.

    Whatever the geometry, the question, the answer and the marked cell are the same.
    """
    rng = np.random.default_rng([seed, i])
    family = families[i % len(families)]
    return MAKERS[family](names[rng.integers(len(names))], rng, geometry)


def make_background(name: str, rng: Generator, geometry: Geometry) -> np.ndarray:
    """Return (size, size, 3) uint8: a random square of the photograph, no sharper than its view, which packs well."""
    photo = photographs()[name]
    side = int(min(photo.size) * rng.uniform(0.6, 1.0))
    x, y = (int(rng.integers(full - side + 1)) for full in photo.size)
    small = photo.crop((x, y, x + side, y + side)).resize((geometry.view,) * 2, Image.Resampling.BICUBIC)
    return np.array(small.resize((geometry.size,) * 2, Image.Resampling.NEAREST))


def make_detail(name: str, rng: Generator, geometry: Geometry) -> Puzzle:
    """Return a puzzle of stripes whose mean is that of the plate."""
    picture = make_background(name, rng, geometry)
    taper = taper_mask(geometry.plate)
    stripes = {kind: np.rint(128 + 120 * taper * (stripe_mask(kind, geometry.plate) - 0.25)) for kind in STRIPES}
    cell, answer = fill_cells(picture, rng, geometry, stripes)
    question = "Which way do the stripes in the frame run?"
    return Puzzle(
        Family.DETAIL, name, picture, question, answer, STRIPES, (crop_call(cell, geometry),), geometry.cell_box(cell)
    )


def make_both(name: str, rng: Generator, geometry: Geometry) -> Puzzle:
    """Return a puzzle of stripes one level above the dark of their plate."""
    picture = make_background(name, rng, geometry) // 64
    cell, answer = fill_cells(picture, rng, geometry, {kind: stripe_mask(kind, geometry.plate) for kind in STRIPES})
    question = "It is dark. Which way do the stripes in the frame run?"
    calls = crop_call(cell, geometry), ToolCall("adjust_brightness", {"factor": 240})
    return Puzzle(Family.BOTH, name, picture, question, answer, STRIPES, calls, geometry.cell_box(cell))


def make_dark(name: str, rng: Generator, geometry: Geometry) -> Puzzle:
    """Return a puzzle of bands one level brighter or darker than a dark or flat scene."""
    answer = STRIPES[rng.integers(4)]
    flat = bool(rng.integers(2))
    picture = make_background(name, rng, geometry) // 64
    field, lit = picture[geometry.middle, geometry.middle], band_mask(answer)
    if flat:
        picture += 127
        # Brighter and darker pixels: the contrast tool's pivot, the rounded mean grey, may be 127 or 129.
        field[...] = 128 + np.where(lit, 1, -1) * DITHER
    else:
        field[...] = lit & DITHER
    call = ToolCall("adjust_contrast", {"factor": 120}) if flat else ToolCall("adjust_brightness", {"factor": 240})
    question = f"The scene is too {'flat' if flat else 'dark'}. Which way do the bands run?"
    return Puzzle(Family.DARK, name, picture, question, answer, STRIPES, (call,), None)


def make_turned(name: str, rng: Generator, geometry: Geometry) -> Puzzle:
    """Return a puzzle of a letter that is turned or mirrored together with its background."""
    answer = LETTERS[rng.integers(4)]
    picture = make_background(name, rng, geometry)
    picture[geometry.middle, geometry.middle] = np.where(letter_mask(answer)[..., None], np.uint8(20), np.uint8(235))
    picture[:24] = RED
    if rng.integers(2):
        call, question = ToolCall("flip_image", {"direction": "horizontal"}), "It was mirrored. Which letter is it?"
        picture = picture[:, ::-1]
    else:
        quarters = int(rng.integers(1, 4))  # counter-clockwise; turned back by the rest of the circle
        call = ToolCall("rotate_image", {"angle": 360 - 90 * quarters})
        question = "The red edge belongs on top. Which letter is it?"
        picture = np.rot90(picture, quarters)
    return Puzzle(Family.TURNED, name, np.ascontiguousarray(picture), question, answer, LETTERS, (call,), None)


MAKERS = {
    Family.DETAIL: make_detail,
    Family.DARK: make_dark,
    Family.TURNED: make_turned,
    Family.BOTH: make_both,
}

# One pixel of three in every row and column: a third of a level on average, also between Pillow's two passes, which
# round to whole levels each; bicubic's overshoot at edges has room.
DITHER = np.tile(np.eye(3, dtype=bool), (86, 86))[:FIELD, :FIELD, None]


def crop_call(cell: int, geometry: Geometry) -> ToolCall:
    """Return the call that cuts out a cell."""
    x, y, width, height = (value // SCALE for value in geometry.cell_box(cell))
    return ToolCall("crop_image", {"x": x, "y": y, "width": width, "height": height})


def fill_cells(
    picture: np.ndarray, rng: Generator, geometry: Geometry, plates: Mapping[str, np.ndarray]
) -> tuple[int, str]:
    """Draw striped plates into four random cells and frame the first; return it and the kind of its stripes.

    plates: kind of stripes -> (plate, plate) levels.
    """
    cells = rng.permutation(CELLS**2)[:4]
    kinds = [STRIPES[k] for k in rng.integers(4, size=4)]
    for cell, kind in zip(cells, kinds, strict=True):
        x, y = (edge + FRAME for edge in geometry.cell_box(cell)[:2])
        picture[y : y + geometry.plate, x : x + geometry.plate] = plates[kind][..., None]
    draw_frame(picture, cells[0], geometry)
    return cells[0], kinds[0]


def draw_frame(picture: np.ndarray, cell: int, geometry: Geometry) -> None:
    """Frame a cell: the upper half in the colour of its row, the lower half in that of its column.

    The colours work like the letter and number of a map's square. Rotary positions are relative: without such a cue a
    tiny model takes very long to learn the position of a cell on the picture.
    """
    x, y, side, _ = geometry.cell_box(cell)
    inside = picture[y + FRAME : y + side - FRAME, x + FRAME : x + side - FRAME].copy()
    picture[y : y + side // 2, x : x + side] = COLOURS[cell // CELLS]
    picture[y + side // 2 : y + side, x : x + side] = COLOURS[cell % CELLS]
    picture[y + FRAME : y + side - FRAME, x + FRAME : x + side - FRAME] = inside


def phases(kind: str, size: int) -> np.ndarray:
    """Return (size, size) int: each pixel's distance along the direction across the stripes of a kind."""
    row, column = np.mgrid[:size, :size]
    return {"horizontal": row, "vertical": column, "rising": row + column, "falling": row - column}[kind]


@cache
def stripe_mask(kind: str, size: int) -> np.ndarray:
    """Return (size, size) bool: lines one pixel wide and four apart, a quarter of each row."""
    return phases(kind, size) % 4 == 1


@cache
def taper_mask(size: int) -> np.ndarray:
    """Return (size, size) in [0, 1]: 0 at the plate's edges, where hard ends of lines would survive in the view."""
    ramp = np.hanning(2 * TAPER)[:TAPER]
    line = np.concatenate([ramp, np.ones(size - 2 * TAPER), ramp[::-1]])
    return line[:, None] * line


@cache
def band_mask(kind: str) -> np.ndarray:
    """Return (FIELD, FIELD, 1) bool: bands 32 pixels wide, which the view shows once they are bright enough."""
    return (phases(kind, FIELD) % 64 < 32)[..., None]


@cache
def letter_mask(which: str) -> np.ndarray:
    """Return (FIELD, FIELD) bool: b, d, p or q, each other's mirror images."""
    ink = np.zeros((FIELD, FIELD), dtype=bool)
    ink[24:232, 56:96] = True
    ink[120:232, 56:200] = True
    ink[156:196, 96:164] = False
    return {"b": ink, "d": ink[:, ::-1], "p": ink[::-1], "q": ink[::-1, ::-1]}[which]
