"""Make pairs of puzzle images of which one is known to help, for teaching, calibrating and measuring the judges."""

from typing import Annotated, Literal

import pyarrow as pa
from pydantic import Field

from thinkimg import records
from thinkimg.config.tree import Config
from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.puzzles.known_pairs import known_pairs as make_pairs
from thinkimg.stages.prepare import puzzles
from thinkimg.stages.stage import Input, Job, Parameter, Slice, Stage
from thinkimg.store.image_table import ImageTable, encode, image_writer
from thinkimg.store.kinds import Dataset, Pairs

PAIRS = 600  # for the CLIP alone, where the policy learns from none


class PairsSettings(Slice):
    split: Literal["train", "held_out"]
    count: int = Field(ge=1)
    seed: int


def settings_of(
    config: Config, split: Literal["train", "held_out"] = "train", count: int | None = None
) -> PairsSettings:
    if count is not None and count < 1:
        raise UserError(f"{count} pairs teach nothing.", hint="Set --count to 1 or more.")
    return PairsSettings(
        split=split, count=config.warmstart.pairs or PAIRS if count is None else count, seed=config.seed
    )


def run(job: Job[PairsSettings]) -> None:
    dataset, work = job.inputs["dataset"], job.work
    samples = dataset.split(job.settings.split)[: job.settings.count]
    images, rows = ImageTable([dataset]), []
    encoded: dict[str, tuple[bytes, int, int]] = {}
    for number, pair in enumerate(make_pairs(samples, images.decoded, seed=job.settings.seed), 1):
        hashes = {name: pixel_hash(getattr(pair, name)) for name in ("original", "right", "wrong")}
        for name, sha in hashes.items():
            if sha not in encoded:
                image = getattr(pair, name)
                encoded[sha] = encode(image), *image.size
        asked = {"question": pair.sample.question, "family": pair.sample.metadata["family"]}
        rows.append({"sample_id": pair.sample.sample_id, **asked, **hashes})
        job.progress(number, len(samples))
    if not work.has("images.parquet"):
        with work.part("images.parquet") as path, image_writer(path) as add:
            for sha in sorted(encoded):
                add(sha, *encoded[sha])
    if not work.has("pairs.parquet"):
        work.table("pairs.parquet", pa.Table.from_pylist(rows, records.pairs()))


known_pairs = Stage(
    name="known_pairs",
    version=1,
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
