"""Known pairs: puzzle images of which one is known to help, for teaching, calibrating and measuring the judges."""

from collections.abc import Callable

from thinkimg import schemas
from thinkimg.artifacts import Artifact, Recipe, Store, Work, package_versions
from thinkimg.chat.picture import size_seen
from thinkimg.config import Config
from thinkimg.data.images import ImageTable, encode, image_writer, load_samples
from thinkimg.data.known_pairs import KnownPair, known_pairs
from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.rollout import view_limits
from thinkimg.schemas import SCHEMA_VERSION

STAGE, VERSION, KIND = "pairs", 1, "pairs"


def recipe(config: Config, dataset: Artifact, split: str, count: int) -> Recipe:
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION,
        config={"split": split, "count": count, "images": view_limits(config), "seed": config.seed},
        inputs={"dataset": dataset.reference},
        packages=package_versions("pillow", "numpy"),
    )  # fmt: skip


def pairs(
    config: Config, dataset: Artifact, store: Store, *, split: str, count: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """At most `count` pairs of a split of the built-in puzzles, with their images."""

    def produce(work: Work) -> None:
        fill(work, config, dataset, split, count, progress)

    return store.build(
        KIND, recipe(config, dataset, split, count), produce, seed=config.seed, where=config.where.public()
    )


def fill(work: Work, config: Config, dataset: Artifact, split: str, count: int, progress) -> None:
    import pyarrow as pa

    samples = load_samples(dataset, split)[:count]
    if any("solution" not in sample.metadata for sample in samples):
        raise UserError(
            f"{dataset.reference} holds no built-in puzzles, so that it is not known which image would help.",
            hint="Use --set data.source=puzzles.",
        )
    images, rows = ImageTable([dataset]), []
    made: dict[str, tuple[bytes, int, int]] = {}
    found = known_pairs(samples, images.decoded, lambda image: size_seen(image, config.images), seed=config.seed)
    for number, pair in enumerate(found, 1):
        hashes = {name: pixel_hash(getattr(pair, name)) for name in ("original", "right", "wrong")}
        for name, sha in hashes.items():
            if sha not in made:
                image = getattr(pair, name)
                made[sha] = encode(image), *image.size
        rows.append(row(pair, hashes))
        progress(number, len(samples))
    if not work.has("images.parquet"):
        with work.part("images.parquet") as path, image_writer(path) as add:
            for sha in sorted(made):
                add(sha, *made[sha])
    if not work.has("pairs.parquet"):
        work.table("pairs.parquet", pa.Table.from_pylist(rows, schemas.pairs()))


def row(pair: KnownPair, hashes: dict[str, str]) -> dict[str, str]:
    sample = pair.sample
    return {
        "sample_id": sample.sample_id, "question": sample.question, "family": sample.metadata["family"], **hashes
    }  # fmt: skip


def read_pairs(artifact: Artifact) -> list[dict[str, str]]:
    return artifact.table("pairs").to_pylist()
