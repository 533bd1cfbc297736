"""Built-in puzzles: choices about photographs that scientific packages ship. thinkimg/puzzles makes the samples."""

from typing import Literal

from thinkimg.data.settings import DataConfig
from thinkimg.settings import Settings as Section


class Puzzles(Section):
    """Settings of what the puzzles show."""

    families: tuple[Literal["detail", "dark", "turned", "both"], ...] = ("detail", "dark", "turned", "both")
    """Kinds of puzzles, in equal parts."""


class Settings(DataConfig):
    """Settings of the puzzles."""

    source: Literal["puzzles"] = "puzzles"
    puzzles: Puzzles = Puzzles()
    """Contents of the puzzles."""
