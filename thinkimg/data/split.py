"""Choice of held-out groups and of samples by keyed hashes, so that more data changes little of either."""

import hashlib
from collections.abc import Collection, Iterable, Sequence

from thinkimg.errors import UserError
from thinkimg.records import Sample

TRAIN, HELD_OUT = "train", "held_out"


def rank(names: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Return the distinct names in a random order, which depends on (seed, purpose) and on each name alone.

    Another name more or less does not move the others.
    """

    def key(name: str) -> bytes:
        return hashlib.sha256(f"{purpose} {seed} {name}".encode()).digest()

    return sorted(set(names), key=key)


def draw(samples: Sequence[Sample], count: int, seed: int, purpose: str) -> list[Sample]:
    """Return `count` of the samples, at most, in their order: a random part, which holds that of any smaller count."""
    chosen = set(rank([sample.sample_id for sample in samples], seed, purpose)[:count])
    return [sample for sample in samples if sample.sample_id in chosen]


def choose_held_out(groups: Iterable[str], share: float, seed: int) -> set[str]:
    """Return the groups that are held out: the share of them, at least one, and not all.

    Raises UserError for fewer than two groups.
    """
    order = rank(groups, seed, "held out")
    if len(order) < 2:
        raise UserError(
            "All samples share one group, so nothing can be held out from training.",
            hint="Add pictures, or map data.columns.group to a column with at least two values.",
        )
    return set(order[: min(max(round(share * len(order)), 1), len(order) - 1)])


def group_by_images(images: Sequence[Collection[str]]) -> list[str]:
    """Return the group of each sample, named by its smallest hash. images: hashes of each sample's images.

    Samples that share an image, directly or through other samples, are in one group.
    """
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
