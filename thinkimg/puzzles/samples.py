"""The puzzles as samples of a data set."""

from collections.abc import Iterator
from functools import partial

from PIL import Image

from thinkimg.data import split
from thinkimg.data.prepared import Job, Prepared
from thinkimg.data.sources.puzzles import Settings
from thinkimg.images.decode import pixel_hash
from thinkimg.puzzles import scenes
from thinkimg.records import PUZZLES, AnswerType, Sample
from thinkimg.store.image_table import encode


def puzzle_jobs(data: Settings) -> Iterator[Job]:
    """Training puzzles, then held-out ones; families in turn; no photograph is on both sides."""
    names = scenes.split_photographs(list(scenes.photographs()), data.held_out_share, data.seed)
    families = [scenes.Family(name) for name in data.puzzles.families]
    for side, (place, count) in enumerate(((split.TRAIN, data.train), (split.HELD_OUT, data.held_out))):
        seed = 2 * data.seed + side  # else the i-th of both sides would have one answer in one place
        for i in range(count):
            yield partial(_puzzle, families, names[side], i, seed, place)


def _puzzle(families: list[scenes.Family], names: list[str], i: int, seed: int, place: str) -> Prepared:
    puzzle = scenes.puzzle(families, names, i, seed=seed)
    image = Image.fromarray(puzzle.picture)
    sha256 = pixel_hash(image)
    sample = Sample(
        sample_id=f"{place}-{i:06}-{puzzle.family}",
        question=puzzle.question,
        answers=(puzzle.answer,),
        answer_type=AnswerType.CHOICE,
        choices=puzzle.choices,
        images=(sha256,),
        source=PUZZLES,
        split=place,
        metadata={
            "family": puzzle.family.value,
            "photograph": puzzle.photograph,
            "solution": [{"name": call.name, "args": call.args} for call in puzzle.solution],
        },
        targets=(puzzle.target,) if puzzle.target else (),
    )
    return Prepared(sample, ((sha256, encode(image), image.width, image.height),))
