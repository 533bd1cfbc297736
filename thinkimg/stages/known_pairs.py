"""Make pairs of puzzle images of which one is known to help, to teach, calibrate and measure judges."""

from typing import Annotated, Literal

import pyarrow as pa
from pydantic import Field

from thinkimg import records
from thinkimg.config.tree import Config
from thinkimg.data.split import draw
from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.puzzles.known_pairs import make_known_pairs
from thinkimg.stages.prepare import puzzles
from thinkimg.stages.stage import Input, Job, Parameter, Slice, Stage, write_images
from thinkimg.store.image_table import ImageTable, encode_lossless
from thinkimg.store.kinds import Dataset, Pairs

CLIP_PAIRS = 600  # where the CLIP alone learns from pairs


class PairsSettings(Slice):
    """Slice of `known_pairs`."""

    split: Literal["train", "held_out"]
    count: int = Field(ge=1)
    seed: int


def settings_of(
    config: Config, split: Literal["train", "held_out"] = "train", count: int | None = None
) -> PairsSettings:
    """Return the slice of the config. Raises UserError for a count below 1."""
    if count is not None and count < 1:
        raise UserError(f"{count} pairs teach nothing.", hint="Set --count to 1 or more.")
    return PairsSettings(split=split, count=count or config.warmstart.pairs or CLIP_PAIRS, seed=config.seed)


def run(job: Job[PairsSettings]) -> None:
    """Write the content: pairs.parquet, one row per puzzle, and images.parquet."""
    dataset, work = job.inputs["dataset"], job.work
    samples = draw(dataset.split(job.settings.split), job.settings.count, job.settings.seed, "paired")
    images, rows = ImageTable([dataset]), []
    encoded: dict[str, tuple[bytes, int, int]] = {}
    for number, pair in enumerate(make_known_pairs(samples, images.decoded, seed=job.settings.seed), 1):
        hashes = {name: pixel_hash(getattr(pair, name)) for name in ("original", "right", "wrong")}
        for name, sha in hashes.items():
            if sha not in encoded:
                image = getattr(pair, name)
                encoded[sha] = encode_lossless(image), *image.size
        asked = {"question": pair.sample.question, "family": pair.sample.metadata["family"]}
        rows.append({"sample_id": pair.sample.sample_id, **asked, **hashes})
        job.progress(number, len(samples))
    write_images(work, "images.parquet", ((sha, *encoded[sha]) for sha in sorted(encoded)))
    if not work.has("pairs.parquet"):
        work.table("pairs.parquet", pa.Table.from_pylist(rows, records.pair_schema()))


known_pairs = Stage(
    name="known_pairs",
    version=2,
    makes=Pairs,
    settings=settings_of,
    run=run,
    reads={"dataset": Input(Dataset, origin=puzzles, shown=True)},
    parameters={
        "split": Parameter(Literal["train", "held_out"], "train", "Split of the puzzles."),
        "count": Parameter(Annotated[int, Field(ge=1)] | None, None, "Puzzles, at most; left out, as the preset says."),
    },
    packages=lambda settings: ("pillow", "numpy"),
    wanted=lambda config: config.compares_pairs or config.has_own_clip,
)
