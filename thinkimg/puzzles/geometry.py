"""Sizes of a puzzle's picture, which fit the model's grid: its 4 x 4 cells are the 4 x 4 tokens of its view."""

from dataclasses import dataclass

from thinkimg.images.settings import ViewLimits

CELLS = 4  # of a row and of a column
SCALE = 4  # view pixels are SCALE x SCALE picture pixels
FRAME = 16  # width of the frame around the marked cell, pixels
FIELD = 256  # side of the field of bands, or of a letter, in the middle of a picture, pixels
LEAST_SIDE = 20  # smallest token side: below it a plate is too small for its stripes to set in, and a picture for FIELD
FIRST_SIDE = 28  # token side of the data sets of earlier versions, which name none


@dataclass(frozen=True)
class Geometry:
    """Sizes of the pictures for models whose tokens have a side of `token_side` pixels."""

    token_side: int

    def __post_init__(self) -> None:
        if self.token_side < LEAST_SIDE:
            raise ValueError(f"tokens of {self.token_side} pixels are smaller than {LEAST_SIDE}")

    @classmethod
    def of_picture(cls, size: tuple[int, int]) -> "Geometry":
        """Return the geometry of a puzzle's picture of (width, height) pixels."""
        return cls(size[0] // (CELLS * SCALE))

    @property
    def size(self) -> int:
        """Side of a picture in pixels."""
        return self.cell * CELLS

    @property
    def view(self) -> int:
        """Side of a picture in pixels as the model sees it."""
        return self.token_side * CELLS

    @property
    def cell(self) -> int:
        """Side of a cell in pixels of the picture."""
        return self.token_side * SCALE

    @property
    def plate(self) -> int:
        """Side of the striped plate in a cell, all that its frame leaves, in pixels of the picture."""
        return self.cell - 2 * FRAME

    @property
    def middle(self) -> slice:
        """Rows, and columns, of the field in the middle of the picture."""
        edge = (self.size - FIELD) // 2
        return slice(edge, edge + FIELD)

    @property
    def limits(self) -> ViewLimits:
        """Limits under which a picture is seen at its view's size, and a cell at as many pixels."""
        least, most = self.token_side**2, self.view**2
        return ViewLimits(min_pixels=least, max_pixels=most, patch=self.token_side, merge=1)

    def cell_box(self, cell: int) -> tuple[int, int, int, int]:
        """Return (x, y, width, height) of a cell, 0 to 15 row by row, in pixels of the picture."""
        return int(cell % CELLS) * self.cell, int(cell // CELLS) * self.cell, self.cell, self.cell
