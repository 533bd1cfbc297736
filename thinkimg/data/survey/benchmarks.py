"""Benchmarks in the store, whose pictures data for training should not have."""

from collections.abc import Collection, Iterable, Iterator

import pyarrow as pa

from thinkimg.data.pictures.prints import SIDE, Gallery, Picture
from thinkimg.data.survey.survey import Taken
from thinkimg.store.artifacts import Store

TABLE = "prints"


def prints_table(taken: Iterable[Taken]) -> pa.Table:
    """Return the table of a benchmark's pictures, each once, by which they are found again in other data sets."""
    pictures = {picture.sha256: picture for row in taken for picture in row.pictures}
    rows = [
        {"sha256": one.sha256, "width": one.size[0], "height": one.size[1], "print": one.print}
        for one in pictures.values()
    ]
    fields = [("sha256", pa.string()), ("width", pa.int32()), ("height", pa.int32()), ("print", pa.binary(SIDE * SIDE))]
    return pa.Table.from_pylist(rows, pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields]))


def find_shared(store: Store, taken: Collection[Taken]) -> Iterator[tuple[str, int]]:
    """Yield (reference, number of the rows with one of its pictures) for each benchmark in the store that has any."""
    for artifact in store.list("dataset"):
        if artifact.manifest["recipe"]["config"].get("data", {}).get("role") != "benchmark":
            continue
        if not artifact.has_table(TABLE) or artifact.dropped:
            continue
        rows = artifact.table(TABLE).to_pylist()
        gallery = Gallery.of(
            [Picture(row["sha256"], (row["width"], row["height"]), None, row["print"]) for row in rows]
        )
        if count := sum(any(map(gallery.has, one.pictures)) for one in taken):
            yield str(artifact.reference), count
