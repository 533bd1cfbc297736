"""Which groups are held out, and which samples are taken: by keyed hashes, so that more data changes little of
either."""

import hashlib
from collections.abc import Collection, Iterable, Sequence

from thinkimg.errors import UserError

TRAIN, HELD_OUT = "train", "held_out"


def ranked(names: Iterable[str], seed: int, purpose: str) -> list[str]:
    """The distinct names in an order that depends on (seed, purpose) and on each name alone: random, but a name that is
    added or removed moves no other."""

    def key(name: str) -> bytes:
        return hashlib.sha256(f"{purpose} {seed} {name}".encode()).digest()

    return sorted(set(names), key=key)


def held_out(groups: Iterable[str], share: float, seed: int) -> set[str]:
    """The groups that are held out: the share of them, at least one, and not all. UserError for fewer than two
    groups."""
    order = ranked(groups, seed, "held out")
    if len(order) < 2:
        raise UserError(
            "All samples share one group, so nothing can be held out from training.",
            hint="Bring more pictures, or map data.columns.group to a column that tells them apart.",
        )
    return set(order[: min(max(round(share * len(order)), 1), len(order) - 1)])


def components(images: Sequence[Collection[str]]) -> list[str]:
    """The group of each sample, where its images (by hash) say it: samples that share an image, directly or through
    others, are of one group, named by its smallest hash."""
    parent: dict[str, str] = {}

    def root(image: str) -> str:
        while (above := parent.setdefault(image, image)) != image:
            parent[image] = image = parent[above]  # path halving
        return image

    for hashes in images:
        first, *rest = hashes
        for image in rest:
            low, high = sorted((root(first), root(image)))
            parent[high] = low
    return [root(next(iter(hashes))) for hashes in images]
