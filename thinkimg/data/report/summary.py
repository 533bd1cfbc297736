"""Summary of a prepared data set: counts, the reasons of refusals counted, and some samples as the model reads them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from thinkimg.data.report.example import Example, StateQuestion, Thumbnail, make_example, make_thumbnail
from thinkimg.data.split import rank
from thinkimg.images.settings import ViewLimits
from thinkimg.records import Sample
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Dataset

SHOWN = 3
"""Samples as text."""


@dataclass(frozen=True)
class Summary:
    """Prepared data set, for people."""

    reference: str
    splits: Mapping[str, int]
    types: Mapping[str, int]
    """Answer type -> number of samples."""
    images: int
    accepted: int | None
    """Rows that could be used; None where the samples were no rows."""
    refused: Counter[str]
    """Reason -> number of rows that are left out."""
    details: Mapping[str, str]
    """Reason -> its first row, and why."""
    schemas: tuple[str, ...]
    """Schemas of the tables, with their versions."""
    changes: Mapping[str, int]
    """Change of the texts -> number of samples."""
    oddities: Mapping[str, int]
    """Name of a check that something stood out in -> number of rows."""
    examples: tuple[Example, ...]


def summarise(
    dataset: Dataset, view: ViewLimits, state: StateQuestion, *, count: int = SHOWN, pictures: bool = False
) -> Summary:
    """Return the summary of a data set with `count` samples, at most, drawn by its seed.

    pictures: make small pictures of the samples' images, too. A larger count holds the samples of a smaller one.
    """
    stored: dict[str, Any] = dataset.json("summary.json")
    columns = ["sample_id", "answer_type"]
    rows = [row for batch in dataset.batches("samples", columns) for row in batch.to_pylist()]
    chosen = rank((row["sample_id"] for row in rows), dataset.manifest["seed"] or 0, "shown")[:count]
    samples = {sample.sample_id: sample for sample in dataset.samples(ids=chosen)}
    refused: Counter[str] = Counter()
    details: dict[str, str] = {}
    for batch in dataset.batches("refused"):
        for row in batch.to_pylist():
            refused[row["reason"]] += 1
            details.setdefault(row["reason"], f"{row['where']}: {row['detail']}")
    return Summary(
        reference=str(dataset.reference),
        splits=stored["splits"],
        types=Counter(row["answer_type"] for row in rows),
        images=stored["images"],
        accepted=stored.get("accepted"),
        refused=refused,
        details=details,
        schemas=tuple(dict.fromkeys(f"{name}, version {version}" for _, name, version in stored.get("schemas", ()))),
        changes=stored.get("changes", {}),
        oddities=stored.get("oddities", {}),
        examples=tuple(_examples(dataset, [samples[name] for name in chosen], view, state, pictures)),
    )


def _examples(
    dataset: Dataset, samples: list[Sample], view: ViewLimits, state: StateQuestion, pictures: bool
) -> Iterator[Example]:
    sizes = dataset.image_sizes({sha256 for sample in samples for sha256 in sample.images})
    table = ImageTable([dataset], cache_bytes=0)
    for sample in samples:
        small = [
            make_thumbnail(table.decoded(sha256)) if pictures else Thumbnail(sizes[sha256]) for sha256 in sample.images
        ]
        yield make_example(sample.sample_id, sample, small, view, state)
