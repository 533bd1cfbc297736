"""Settings of the data that all sources share; a source defines its own beside its code."""

from typing import Literal

from thinkimg.registry import Registry
from thinkimg.settings import Name, Positive, Seed, Settings, Share, Variant

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
    seed: Seed = 0
    """Seed of the split and of the choice of samples; of the puzzles also of what they show."""


class Columns(Settings):
    """Names of the source's columns by their role; null where there is none."""

    image: str = "image"
    """A path inside the data set, {bytes, path} as the Hub stores it, raw bytes, or a list of these."""
    question: str = "question"
    """The question as text."""
    answer: str = "answer"
    """The right answer as text or number; with choices also its letter or its index from 0 (`data.answer_is`)."""
    choices: str | None = None
    """A list of at least two different choices; in CSV a JSON list."""
    id: str | None = None
    """A name of each sample; else its file and line."""
    group: str | None = None
    """Rows that share this value (the photograph, say) stay on one side of the split; else the image's content
    decides."""
    answers: str | None = None
    """A list of further right answers: the best counts."""
    target: str | None = None
    """Region that has to be looked at: [x, y, width, height] in pixels of the only picture, for the alarm
    `region_missed`."""


class RowsConfig(DataConfig):
    """Settings of a source of rows: all but the built-in puzzles."""

    columns: Columns = Columns()
    """Names of the source's columns."""
    answer_type: Literal["choice", "number", "text", "box", "maths"] = "text"
    """Comparison of an answer with the right one: see docs/data.md."""
    answer_is: Literal["any", "text", "letter", "index"] = "any"
    """Form in which the data name the right one of the choices: its text, its letter, its index from 0, or any. With
    any, a number is an index, and a row that can be read in two ways is refused."""
    max_refused: Share = 0.05
    """More bad rows than this share fail the stage."""
    url_hosts: tuple[Name, ...] = ()
    """Hosts from which images named by URL may be fetched; none by default."""
    skip_unreachable: bool = False
    """Refuse rows whose picture's host does not answer. By default the stage fails instead, for the host may come
    back."""
