"""The small CLIP of machines without a hub: trained on known pairs of the puzzles, judged by like any other CLIP."""

from collections.abc import Callable

from thinkimg.config import Config
from thinkimg.models import clip
from thinkimg.records import SCHEMA_VERSION
from thinkimg.stages.pairs import pairs, read_pairs
from thinkimg.store.artifacts import Artifact, Recipe, Store, Work, package_versions
from thinkimg.store.image_table import ImageTable

STAGE, VERSION, KIND = "clip", 1, "clip"
STEPS = 100
PAIRS = 600  # where the policy learns from none


def wanted(config: Config) -> bool:
    """Whether the scores need one."""
    return "embedding" in config.image.types and config.image.embedding.model == clip.OWN


def recipe(config: Config, known: Artifact) -> Recipe:
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION,
        config={"steps": STEPS, "seed": config.seed, "model": clip.TINY},
        inputs={"pairs": known.reference},
        packages=package_versions("torch", "open-clip-torch"),
    )  # fmt: skip


def train_clip(
    config: Config, store: Store, *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """The CLIP of the built-in puzzles."""
    known, _ = pairs(config, store, split="train", count=config.warmstart.pairs or PAIRS, progress=progress)

    def produce(work: Work) -> None:
        images = ImageTable([known])
        triples = [
            (row["question"], *(images.decoded(row[name]) for name in ("right", "original", "wrong")))
            for row in read_pairs(known)
        ]
        with work.part("clip") as directory:
            work.metrics |= clip.train_tiny(
                directory,
                triples,
                seed=config.seed,
                steps=STEPS,
                threads=config.where.trainer.threads,
                progress=progress,
            )

    return store.build(KIND, recipe(config, known), produce, seed=config.seed, where=config.where.public())
