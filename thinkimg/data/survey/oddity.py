"""Findings of the checks of a data set."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from thinkimg.data.fields import BoxForm
from thinkimg.errors import UserError


class Level(StrEnum):
    """Consequence of an oddity."""

    REFUSE = "refuse"
    """The row is left out."""
    ASK = "ask"
    """Nothing is stored until a setting answers."""
    WARN = "warn"
    """It is told."""


@dataclass(frozen=True)
class Oddity:
    """Finding of a check."""

    name: str
    count: int
    """Number of rows; of `small_side` and `both_sides`, too."""
    sentence: str
    level: Level
    hint: str = ""
    """Setting that answers, where it is a question."""
    form: BoxForm | None = None
    """Form of boxes that was found."""


def ask(oddities: Iterable[Oddity]) -> None:
    """Raise UserError for the questions among the oddities: nothing is stored until a setting answers."""
    questions = [oddity for oddity in oddities if oddity.level is Level.ASK]
    if questions:
        raise UserError(" ".join(one.sentence for one in questions), hint=" ".join(one.hint for one in questions))
