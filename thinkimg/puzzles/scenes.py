"""Built-in puzzles over real photographs: each can be read only after the right image tool, or most easily so.

All pictures are 448 x 448 and are meant to be seen at 112 x 112 (a quarter of the resolution, 4 x 4 image tokens):

    detail   stripes with a period of four pixels in a framed cell of a 4 x 4 grid; they average out in the view.
             The question does not say which cell it is
    dark     bands of one grey level in a dark or flat scene; less than half a level is left in the view
    turned   a letter in a picture that was turned (its red edge belongs on top) or mirrored (the question says so)
    both     dark stripes in a framed cell: two tools in a row, in either order

For detail, dark and both the view tells nothing: another answer changes it by one level at most, in less than one
pixel of a hundred (tests/puzzles/test_scenes.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from thinkimg.data import split

SIZE = 448  # side of a picture in pixels
VIEW = {"min_pixels": 28 * 28, "max_pixels": 112 * 112}  # limits under which a picture is seen at 112 x 112
SCALE = 4  # view pixels are SCALE x SCALE picture pixels
CELL = SIZE // 4  # side of a grid cell in pixels; one image token of the view
FRAME = 16  # width of the frame around the marked cell, pixels
PLATE = 80  # side of the striped plate in a cell, pixels
TAPER = 24  # pixels over which a plate's stripes set in
COLOURS = ((40, 80, 230), (30, 170, 60), (240, 210, 40), (170, 50, 200))  # of rows, and of columns
RED, WHITE = (230, 40, 40), (235, 235, 235)
STRIPES = ("horizontal", "vertical", "rising", "falling")
LETTERS = ("b", "d", "p", "q")


class Family(StrEnum):
    DETAIL = "detail"
    DARK = "dark"
    TURNED = "turned"
    BOTH = "both"


@dataclass(frozen=True)
class Call:
    """A tool call that belongs to a puzzle's solution: coordinates in pixels of the view."""

    name: str
    args: dict


@dataclass(frozen=True)
class Puzzle:
    """A question about a picture with its solution.

    picture: (448, 448, 3) uint8. solution: the calls after which the answer can be read.
    target: (x, y, width, height) of the marked cell in pixels of the picture, None where the whole picture is meant.
    """

    family: Family
    photograph: str
    picture: np.ndarray
    question: str
    answer: str
    choices: tuple[str, ...]
    solution: tuple[Call, ...]
    target: tuple[int, int, int, int] | None


@cache
def photographs() -> dict[str, Image.Image]:
    """Real photographs that installed packages ship, by name, in a fixed order."""
    folders = {
        package("skimage") / "data": (
            "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
            "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
        ),
        package("sklearn") / "datasets" / "images": ("china.jpg", "flower.jpg"),
        package("matplotlib") / "mpl-data" / "sample_data": ("grace_hopper.jpg",),
    }  # fmt: skip
    found = {}
    for folder, names in folders.items():
        for name in names:
            with Image.open(folder / name) as image:
                found[Path(name).stem] = image.convert("RGB")
    return found


def package(name: str) -> Path:
    """Return the folder of an installed package, which is not imported."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None, name
    return Path(spec.origin).parent


def split_photographs(names: list[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, held out): a photograph belongs to one side only, so that no held-out puzzle shows a trained picture."""
    out = split.held_out(names, held_out, seed)
    return sorted(set(names) - out), sorted(out)


def generate(families: Sequence[Family], names: list[str], count: int, *, seed: int) -> Iterator[Puzzle]:
    """`count` puzzles, families in turn, over the named photographs."""
    return (puzzle(families, names, i, seed=seed) for i in range(count))


def puzzle(families: Sequence[Family], names: list[str], i: int, *, seed: int) -> Puzzle:
    """The i-th puzzle of `generate`; it depends on the arguments alone."""
    rng = np.random.default_rng([seed, i])
    family = families[i % len(families)]
    return MAKERS[family](names[rng.integers(len(names))], rng)


def background(name: str, rng: Generator) -> np.ndarray:
    """(448, 448, 3) uint8: a random square of the photograph, no sharper than the view shows it (so that it packs well)."""
    photo = photographs()[name]
    side = int(min(photo.size) * rng.uniform(0.6, 1.0))
    left, top = (int(rng.integers(full - side + 1)) for full in photo.size)
    small = photo.crop((left, top, left + side, top + side)).resize((SIZE // SCALE,) * 2, Image.Resampling.BICUBIC)
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.NEAREST))


@cache
def stripes(kind: str) -> np.ndarray:
    """(PLATE, PLATE) bool: lines one pixel wide and four apart, so that a quarter of the plate is lit in each row."""
    row, column = np.mgrid[:PLATE, :PLATE]
    phase = {"horizontal": row, "vertical": column, "rising": row + column, "falling": row - column}[kind]
    return phase % 4 == 1


@cache
def taper() -> np.ndarray:
    """(PLATE, PLATE) in [0, 1]: 0 at the plate's edges, where hard ends of lines would survive in the view."""
    ramp = np.hanning(2 * TAPER)[:TAPER]
    line = np.concatenate([ramp, np.ones(PLATE - 2 * TAPER), ramp[::-1]])
    return line[:, None] * line


def detail(name: str, rng: Generator) -> Puzzle:
    picture = background(name, rng).copy()
    cells = rng.permutation(16)[:4]
    kinds = [STRIPES[k] for k in rng.integers(4, size=4)]
    for cell, kind in zip(cells, kinds, strict=True):
        plate(picture, cell)[...] = np.rint(128 + 120 * taper() * (stripes(kind) - 0.25))[..., None]
    frame(picture, cells[0])
    return Puzzle(
        Family.DETAIL, name, picture, "Which way do the stripes in the frame run?", kinds[0], STRIPES,
        (crop(cells[0]),), target(cells[0]),
    )  # fmt: skip


def both(name: str, rng: Generator) -> Puzzle:
    picture = background(name, rng) // 64
    cells = rng.permutation(16)[:4]
    kinds = [STRIPES[k] for k in rng.integers(4, size=4)]
    for cell, kind in zip(cells, kinds, strict=True):
        plate(picture, cell)[...] = stripes(kind)[..., None]
    frame(picture, cells[0])
    return Puzzle(
        Family.BOTH, name, picture, "It is dark. Which way do the stripes in the frame run?", kinds[0], STRIPES,
        (crop(cells[0]), Call("adjust_brightness", {"factor": 240})), target(cells[0]),
    )  # fmt: skip


def dark(name: str, rng: Generator) -> Puzzle:
    answer = STRIPES[rng.integers(4)]
    flat = bool(rng.integers(2))
    picture = background(name, rng) // 64
    field, lit = picture[96:-96, 96:-96], bands(answer)
    if flat:
        picture += 127
        # Brighter and darker pixels: whether the contrast tool's pivot, the rounded mean grey, is 127 or 129, some are left.
        field[...] = 128 + np.where(lit, 1, -1) * DITHER
    else:
        field[...] = lit & DITHER
    call = Call("adjust_contrast", {"factor": 120}) if flat else Call("adjust_brightness", {"factor": 240})
    question = f"The scene is too {'flat' if flat else 'dark'}. Which way do the bands run?"
    return Puzzle(Family.DARK, name, picture, question, answer, STRIPES, (call,), None)


def turned(name: str, rng: Generator) -> Puzzle:
    answer = LETTERS[rng.integers(4)]
    picture = background(name, rng).copy()
    picture[96:-96, 96:-96] = np.where(letter(answer)[..., None], np.uint8(20), np.uint8(235))
    picture[:24] = RED
    if rng.integers(2):
        call, question = Call("flip_image", {"direction": "horizontal"}), "It was mirrored. Which letter is it?"
        picture = picture[:, ::-1]
    else:
        quarters = int(rng.integers(1, 4))  # counter-clockwise; turned back by the rest of the circle
        call = Call("rotate_image", {"angle": 360 - 90 * quarters})
        question = "The red edge belongs on top. Which letter is it?"
        picture = np.rot90(picture, quarters)
    return Puzzle(Family.TURNED, name, np.ascontiguousarray(picture), question, answer, LETTERS, (call,), None)


MAKERS = {Family.DETAIL: detail, Family.DARK: dark, Family.TURNED: turned, Family.BOTH: both}

# One pixel of three in every row and column: a third of a level on average, also between Pillow's two passes, which
# round to whole levels each; that leaves room for bicubic's overshoot at edges.
DITHER = np.tile(np.eye(3, dtype=bool), (86, 86))[:256, :256, None]


def corner(cell: int) -> tuple[int, int]:
    """(x, y) of a cell's top left corner in pixels of the picture."""
    return int(cell % 4) * CELL, int(cell // 4) * CELL


def target(cell: int) -> tuple[int, int, int, int]:
    return (*corner(cell), CELL, CELL)


def crop(cell: int) -> Call:
    x, y = (value // SCALE for value in corner(cell))
    return Call("crop_image", {"x": x, "y": y, "width": CELL // SCALE, "height": CELL // SCALE})


def plate(picture: np.ndarray, cell: int) -> np.ndarray:
    x, y = (value + (CELL - PLATE) // 2 for value in corner(cell))
    return picture[y : y + PLATE, x : x + PLATE]


def frame(picture: np.ndarray, cell: int) -> None:
    """Mark a cell: the upper half of its frame has the colour of its row, the lower half that of its column.

    Like the letter and number of a map's square. Rotary positions are relative: without such a cue a tiny model takes very
    long to learn where on the picture a cell is.
    """
    x, y = corner(cell)
    inside = picture[y + FRAME : y + CELL - FRAME, x + FRAME : x + CELL - FRAME].copy()
    picture[y : y + CELL // 2, x : x + CELL] = COLOURS[cell // 4]
    picture[y + CELL // 2 : y + CELL, x : x + CELL] = COLOURS[cell % 4]
    picture[y + FRAME : y + CELL - FRAME, x + FRAME : x + CELL - FRAME] = inside


@cache
def bands(kind: str) -> np.ndarray:
    """(256, 256, 1) bool: bands 32 pixels wide, which the view shows once they are bright enough."""
    row, column = np.mgrid[:256, :256]
    phase = {"horizontal": row, "vertical": column, "rising": row + column, "falling": row - column}[kind]
    return (phase % 64 < 32)[..., None]


@cache
def letter(which: str) -> np.ndarray:
    """(256, 256) bool: b, d, p or q, each other's mirror images."""
    ink = np.zeros((256, 256), dtype=bool)
    ink[24:232, 56:96] = True
    ink[120:232, 56:200] = True
    ink[156:196, 96:164] = False
    return {"b": ink, "d": ink[:, ::-1], "p": ink[::-1], "q": ink[::-1, ::-1]}[which]
