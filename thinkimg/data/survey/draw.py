"""Draw of the rows that become samples: sides of the split, and the order in which the rows of each are taken."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from thinkimg.data import split
from thinkimg.data.pictures.prints import Gallery
from thinkimg.data.settings import RowsConfig
from thinkimg.data.survey.passes import Candidate, Looks


@dataclass
class Draw:
    """Rows of each side in their order, of which the first good ones are taken: a smaller draw is part of a larger."""

    sides: dict[str, str]
    """Row id -> side of the split."""
    counts: dict[str, int]
    """Side -> number of rows to take, at most."""
    orders: dict[str, list[str]]
    """Side -> row ids."""
    reserve: float
    """Share of rows that may be refused, so that as many more are looked at."""
    taken: dict[str, list[str]] = field(default_factory=dict)
    """Side -> ids of the rows that are taken, as far as is known."""
    shared: list[str] = field(default_factory=list)
    """Ids of rows that are left out of training, as their picture is held out."""
    _reached: dict[str, int] = field(default_factory=dict)
    _passes: int = 0

    @classmethod
    def of(cls, candidates: Mapping[str, Candidate], data: RowsConfig) -> Self:
        """Return the draw of some rows. Raises UserError where they can't be split; a benchmark is held out whole."""
        groups = [candidate.group for candidate in candidates.values()]
        is_benchmark = data.role == "benchmark"
        held_out = set(groups) if is_benchmark else split.choose_held_out(groups, data.held_out_share, data.seed)
        sides = {
            id: split.HELD_OUT if candidate.group in held_out else split.TRAIN for id, candidate in candidates.items()
        }
        training = {split.HELD_OUT: data.held_out, split.TRAIN: data.train}
        counts = {split.HELD_OUT: len(candidates)} if is_benchmark else training
        orders = {
            side: split.rank((id for id in candidates if sides[id] == side), data.seed, "taken") for side in counts
        }
        return cls(sides, counts, orders, data.max_refused)

    def choose_next(self) -> list[str]:
        """Return the rows to look at next: as many as lack, and the reserve; none where there are enough, or no more.

        With each pass twice as many, so that few passes are enough where most pictures are bad.
        """
        wanted: list[str] = []
        for side, order in self.orders.items():
            lack = self.counts[side] - len(self.taken.get(side, ()))
            start = self._reached.get(side, 0)
            end = start + 2**self._passes * (lack + math.ceil(lack * self.reserve))
            wanted += order[start:end]
            self._reached[side] = end
        self._passes += 1
        return wanted

    def take(self, looks: Looks) -> None:
        """Take the first good rows of each side, for training those whose pictures are not held out."""
        self.taken = {side: looks.good(order)[: self.counts[side]] for side, order in self.orders.items()}
        if split.TRAIN not in self.taken:
            return
        held_out = [picture for id in self.taken[split.HELD_OUT] for picture in looks.rows[id].pictures]
        gallery, train = Gallery.of(held_out), looks.good(self.orders[split.TRAIN])
        self.shared = [id for id in train if any(map(gallery.has, looks.rows[id].pictures))]
        shared = set(self.shared)
        self.taken[split.TRAIN] = [id for id in train if id not in shared][: self.counts[split.TRAIN]]
