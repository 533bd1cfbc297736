"""Settings of the data: what all sources share. Each source's own lie beside it."""

from typing import Literal

from thinkimg.registry import Registry
from thinkimg.settings import Positive, Settings, Share, Variant

SOURCES = Registry("sources", "thinkimg.data.sources")
"""Each defines `Settings`, a RowsConfig, and `open_source(data, limits) -> Source`."""


class DataConfig(Variant):
    """Settings that all sources share; `source` chooses the source, which has further ones."""

    registry = SOURCES
    chooser = "source"

    source: str = "puzzles"
    """A file in thinkimg/data/sources, or the import path of a module of your own."""
    train: Positive = 100
    """Samples in the training split, at most."""
    held_out: Positive = 300
    """Samples in the held-out split, at most."""
    held_out_share: Share = 0.3
    """Share of the photographs (or groups) that is held out."""
    seed: int = 0


class Columns(Settings):
    """Which column of the source holds what; null where there is none."""

    image: str = "image"
    """A path inside the data set, {bytes, path} as the Hub stores it, raw bytes, or a list of these."""
    question: str = "question"
    answer: str = "answer"
    choices: str | None = None
    id: str | None = None
    group: str | None = None
    """Rows that share this value (the photograph, say) stay on one side of the split; else the image's content
    decides."""
    answers: str | None = None
    """A list of further right answers: the best counts."""
    target: str | None = None
    """What has to be looked at, for the alarm on missed regions: [x, y, width, height] in pixels of the (only)
    picture."""


class RowsConfig(DataConfig):
    """Settings of a source of rows: all but the built-in puzzles."""

    columns: Columns = Columns()
    answer_type: Literal["choice", "number", "text", "box", "maths"] = "text"
    """How answers are compared."""
    max_refused: Share = 0.05
    """More bad rows than this share fail the stage."""
    url_hosts: tuple[str, ...] = ()
    """Hosts from which images named by URL may be fetched; none by default."""
