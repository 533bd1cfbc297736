"""Train a small CLIP on known pairs of the puzzles, for machines without access to the Hub."""

from thinkimg.config.tree import Config
from thinkimg.models import clip
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.stage import Input, Job, Slice, Stage
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Clip, Pairs

STEPS = 100


class ClipSettings(Slice):
    """Slice of `train_clip`."""

    steps: int
    seed: int
    model: dict = clip.TINY


def settings_of(config: Config) -> ClipSettings:
    """Return the slice of the config."""
    return ClipSettings(steps=STEPS, seed=config.seed)


def run(job: Job[ClipSettings]) -> None:
    """Train on (question, right, original, wrong) of each pair."""
    pairs = job.inputs["pairs"]
    images = ImageTable([pairs])
    triples = [
        (row["question"], *(images.decoded(row[name]) for name in ("right", "original", "wrong")))
        for row in pairs.rows()
    ]
    job.work.discard("clip")  # of a killed run: its metrics are lost, so that it is trained again
    # Two threads take three quarters of the time alone, and two to eight times as long beside the trainer's.
    with job.work.part("clip") as directory, clip.limit_threads(1):
        job.work.metrics |= clip.train_tiny(
            directory, triples, seed=job.settings.seed, steps=job.settings.steps, progress=job.progress
        )


train_clip = Stage(
    name="train_clip",
    version=1,
    makes=Clip,
    settings=settings_of,
    run=run,
    reads={"pairs": Input(Pairs, origin=known_pairs, shown=True)},
    packages=lambda settings: ("torch", "open-clip-torch"),
    wanted=lambda config: config.has_own_clip,
)
