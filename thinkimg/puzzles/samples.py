"""Puzzles as samples of a data set."""

from collections.abc import Callable, Iterator
from functools import partial

from PIL import Image

from thinkimg.data import split
from thinkimg.data.sources.puzzles import Settings
from thinkimg.data.survey.survey import Prepared, SampleJob
from thinkimg.images.decode import pixel_hash
from thinkimg.puzzles import scenes
from thinkimg.puzzles.geometry import Geometry
from thinkimg.records import PUZZLES, AnswerType, Sample
from thinkimg.store.image_table import encode_lossless


def make_puzzle_jobs(data: Settings, geometry: Geometry) -> Iterator[SampleJob]:
    """Yield a job for each training puzzle, then for each held-out one.

    Families take turns; no photograph is on both sides.
    """
    names = scenes.split_photographs(list(scenes.photographs()), data.held_out_share, data.seed)
    families = [scenes.Family(name) for name in data.puzzles.families]
    for number, (side, count) in enumerate(((split.TRAIN, data.train), (split.HELD_OUT, data.held_out))):
        seed = 2 * data.seed + number  # else the i-th puzzles of both sides would have the same answer and cell
        for i in range(count):
            make = partial(scenes.make_puzzle, families, names[number], i, seed=seed, geometry=geometry)
            yield partial(_prepare_puzzle, make, f"{side}-{i:06}", side)


def _prepare_puzzle(make: Callable[[], scenes.Puzzle], name: str, side: str) -> Prepared:
    puzzle = make()
    image = Image.fromarray(puzzle.picture)
    sha256 = pixel_hash(image)
    sample = Sample(
        sample_id=f"{name}-{puzzle.family}",
        question=puzzle.question,
        answers=(puzzle.answer,),
        answer_type=AnswerType.CHOICE,
        choices=puzzle.choices,
        images=(sha256,),
        source=PUZZLES,
        split=side,
        metadata={
            "family": puzzle.family.value,
            "photograph": puzzle.photograph,
            "solution": [{"name": call.name, "args": call.args} for call in puzzle.solution],
        },
        targets=(puzzle.target,) if puzzle.target else (),
    )
    return Prepared(sample, ((sha256, encode_lossless(image), image.width, image.height),))
