"""Known pairs: puzzle images of which one is known to help, for teaching, calibrating and measuring the judges."""

from collections.abc import Callable

from thinkimg import records
from thinkimg.config import Config, DataConfig
from thinkimg.images.decode import pixel_hash
from thinkimg.puzzles.known_pairs import known_pairs
from thinkimg.puzzles.scenes import VIEW
from thinkimg.records import SCHEMA_VERSION
from thinkimg.stages.prepare import prepare
from thinkimg.store.artifacts import Artifact, Recipe, Store, Work, package_versions
from thinkimg.store.image_table import ImageTable, encode, image_writer, load_samples

STAGE, VERSION, KIND = "pairs", 1, "pairs"
PUZZLES = 600  # made for the sake of pairs alone, where the data are not puzzles


def recipe(config: Config, dataset: Artifact, split: str, count: int) -> Recipe:
    """dataset: of the built-in puzzles."""
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION,
        config={"split": split, "count": count, "seed": config.seed},
        inputs={"dataset": dataset.reference},
        packages=package_versions("pillow", "numpy"),
    )  # fmt: skip


def puzzles(config: Config) -> Config:
    """The same with the built-in puzzles for data: who judges other data learns from these as well."""
    if config.data.source == "puzzles":
        return config
    return config.model_copy(
        update={
            "data": DataConfig(seed=config.data.seed, train=PUZZLES),
            "images": config.images.model_copy(update=VIEW),
        }
    )


def pairs(
    config: Config, store: Store, *, split: str, count: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """At most `count` pairs of a split of the built-in puzzles, with their images."""
    dataset, _ = prepare(puzzles(config), store, progress=progress)

    def produce(work: Work) -> None:
        fill(work, dataset, split, count, config.seed, progress)

    plan = recipe(config, dataset, split, count)
    return store.build(KIND, plan, produce, seed=config.seed, where=config.where.public())


def fill(work: Work, dataset: Artifact, split: str, count: int, seed: int, progress) -> None:
    import pyarrow as pa

    samples = load_samples(dataset, split)[:count]
    images, rows = ImageTable([dataset]), []
    made: dict[str, tuple[bytes, int, int]] = {}
    for number, pair in enumerate(known_pairs(samples, images.decoded, seed=seed), 1):
        hashes = {name: pixel_hash(getattr(pair, name)) for name in ("original", "right", "wrong")}
        for name, sha in hashes.items():
            if sha not in made:
                image = getattr(pair, name)
                made[sha] = encode(image), *image.size
        asked = {"question": pair.sample.question, "family": pair.sample.metadata["family"]}
        rows.append({"sample_id": pair.sample.sample_id, **asked, **hashes})
        progress(number, len(samples))
    if not work.has("images.parquet"):
        with work.part("images.parquet") as path, image_writer(path) as add:
            for sha in sorted(made):
                add(sha, *made[sha])
    if not work.has("pairs.parquet"):
        work.table("pairs.parquet", pa.Table.from_pylist(rows, records.pairs()))


def read_pairs(artifact: Artifact) -> list[dict[str, str]]:
    return artifact.table("pairs").to_pylist()
