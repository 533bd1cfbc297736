"""The built-in puzzles: choices about photographs that scientific packages ship. thinkimg/puzzles makes the samples."""

from typing import Literal

from thinkimg.data.settings import DataConfig
from thinkimg.settings import Settings as Section


class Puzzles(Section):
    families: tuple[Literal["detail", "dark", "turned", "both"], ...] = ("detail", "dark", "turned", "both")


class Settings(DataConfig):
    source: Literal["puzzles"] = "puzzles"
    puzzles: Puzzles = Puzzles()
