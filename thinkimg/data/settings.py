"""Settings of the data that all sources share; a source defines its own beside its code."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal, Self

from thinkimg.registry import Registry
from thinkimg.settings import FilePath, Name, Positive, Seed, Settings, Share, Variant

# The name of a deprecated method of pydantic's, which is of no use to settings.
warnings.filterwarnings("ignore", 'Field name "schema" in "RowsConfig" shadows')

SOURCES = Registry("sources", "thinkimg.data.sources")
"""Each defines `Settings`, a RowsConfig, and `open_source(data, limits) -> Source`."""
SCHEMAS = Registry("schemas", "thinkimg.data.schemas")
"""Each defines VERSION, TITLE, COLUMNS, READS and `convert(record) -> Fields`."""


class DataConfig(Variant):
    """Settings that all sources share; `source` chooses the source, which has further ones."""

    registry = SOURCES
    chooser = "source"

    source: str = "puzzles"
    """A file in thinkimg/data/sources, or the import path of a module of your own. Left out beside a `path` it is
    `files`, which finds out what the path is."""
    train: Positive = 100
    """Samples in the training split, at most."""
    held_out: Positive = 300
    """Samples in the held-out split, at most."""
    held_out_share: Share = 0.3
    """Share of the photographs (or groups) that is held out."""
    seed: Seed = 0
    """Seed of the split and of the choice of samples; of the puzzles also of what they show."""

    @classmethod
    def choose(cls, fields: Mapping[str, Any]) -> type[Self]:
        """Return the class of the source: the one that the fields name, or that of files for a mere path."""
        return super().choose({"source": "files", **fields} if "path" in fields else fields)


class Columns(Settings):
    """Names of the source's columns by their role, which overrule the schema's; `extra_info.question` names a value
    inside another. Null where the schema knows better, or there is none."""

    image: str | None = None
    """A path inside the data set, {bytes, path} as the Hub stores it, raw bytes, base64, or a list of these; or
    several columns: `image_1,image_2`."""
    question: str | None = None
    """The question as text."""
    answer: str | None = None
    """The right answer as text or number, or a list of several; with choices also its letter or its index from 0
    (`data.answer_is`)."""
    choices: str | None = None
    """A list of at least two different choices, in CSV a JSON list; or a column for each: `A,B,C,D`."""
    id: str | None = None
    """A name of each sample; else its file and line."""
    group: str | None = None
    """Rows that share this value (the photograph, say) stay on one side of the split; else the image's content
    decides."""
    answers: str | None = None
    """A list of further right answers: the best counts."""
    target: str | None = None
    """Region that has to be looked at, or a list of regions: four numbers each, in the form of `data.boxes`. For the
    alarm `region_missed`."""


class RowsConfig(DataConfig):
    """Settings of a source of rows: all but the built-in puzzles."""

    columns: Columns = Columns()
    """Names of the source's columns."""
    schema: str = "auto"  # type: ignore[assignment]
    """Schema of the records: `auto` recognises it, `none` reads the columns by their role's name; else a file in
    thinkimg/data/schemas, or `my_module:convert`, a function of your own."""
    files: Name | None = None
    """Pattern of the tables to read, such as `train-*`, where a folder holds several."""
    images: FilePath | None = None
    """Folder or ZIP archive of the pictures, where they are not found beside their table, or above it."""
    role: Literal["training", "benchmark"] = "training"
    """A benchmark is held out as a whole: every row is a sample of the held-out split."""
    answer_type: Literal["auto", "choice", "number", "integer", "text", "exact", "votes", "box", "maths", "judge"] = (
        "auto"
    )
    """Comparison of an answer with the right one: see docs/data.md. With auto the schema says it, or each answer."""
    boxes: Literal["auto", "xywh", "xyxy", "yxyx", "unit_xywh", "unit_xyxy", "thousandths_xyxy"] = "auto"
    """Form of boxes: corner and sides or two corners, in pixels of the upright picture, of its sides (unit), or of 0
    to 1000. With auto the only form that fits all rows is taken."""
    shuffle_choices: bool | None = None
    """Put the options of each sample in a random order of its own. Null is only where the schema has the right one
    always at one place."""
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


class FilesConfig(RowsConfig):
    """Settings of a source of files."""

    path: FilePath
    """A file, or a folder of them."""
