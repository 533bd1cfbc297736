"""The evaluate stage: held-out accuracy, greedy and sampled, with intervals, and what it is made of."""

import asyncio
from collections.abc import Callable

import numpy as np

from thinkimg.closure import engine_package
from thinkimg.config import Config
from thinkimg.errors import UserError
from thinkimg.puzzles.demonstrations import right_calls
from thinkimg.records import SCHEMA_VERSION, Sample, Trajectory
from thinkimg.resources import Machines, machines
from thinkimg.rewards.batch import Batch
from thinkimg.rewards.mix import RIGHT
from thinkimg.rewards.rules.answer import score as score_answers
from thinkimg.rollout import Play, view_limits
from thinkimg.stages.rollout import play_parts, precision, read_rows, summary
from thinkimg.store.artifacts import Artifact, Recipe, Store, Work, package_versions
from thinkimg.store.image_table import ImageTable, load_samples

STAGE, VERSION, KIND = "evaluate", 1, "evaluation"
GREEDY = 0  # index of the greedy trajectory; 1 to k are the sampled ones
JUDGES = ("rapidfuzz", "math-verify", "latex2sympy2_extended", "sympy")  # decide what is right


def recipe(config: Config, dataset: Artifact, policy: Artifact, samples: int, blind: bool) -> Recipe:
    return Recipe(
        STAGE, VERSION, SCHEMA_VERSION,
        config={
            "conversation": config.conversation.model_dump(mode="json"),
            "images": view_limits(config),
            "k": config.evaluate.k,
            "temperature": config.evaluate.temperature,
            "number_tolerance": config.rewards.number_tolerance,
            "precision": precision(config),
            "samples": samples,
            "blind": blind,
        },
        inputs={"dataset": dataset.reference, "policy": policy.reference},
        packages=package_versions("pillow", "transformers", "tokenizers", engine_package(), *JUDGES),
    )  # fmt: skip


def evaluate(
    config: Config, dataset: Artifact, policy: Artifact, store: Store, *, samples: int | None = None, blind: bool = False,
    force: bool = False, progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Artifact, bool]:  # fmt: skip
    """Answer the first `samples` held-out questions once greedily and k times sampled.

    samples: None takes config.evaluate.samples. blind: every image that a tool makes is replaced by a grey one of the same
    size, which shows how much of the accuracy comes through these images. Metrics: accuracy with its Wilson interval,
    avg_at_k with a bootstrap interval over questions, tool figures, and the same per family of puzzles.
    """
    samples = config.evaluate.samples if samples is None else samples
    if samples < 1:
        raise UserError(f"an evaluation of {samples} samples says nothing", hint="set --samples to 1 or more")

    def produce(work: Work) -> None:
        with machines(config) as crew:
            asyncio.run(fill(work, config, dataset, policy, crew, samples, blind, progress))

    where = config.where.public()
    return store.build(
        KIND, recipe(config, dataset, policy, samples, blind), produce, seed=config.seed, where=where, force=force
    )


async def fill(
    work: Work, config: Config, dataset: Artifact, policy: Artifact, crew: Machines, count: int, blind: bool, progress
):
    samples = load_samples(dataset, "held_out")[:count]
    plays = [Play(0.0, blind)] + [Play(config.evaluate.temperature, blind)] * config.evaluate.k
    await play_parts(work, config, dataset, policy, crew, samples, plays, progress, keep_images=False)
    rows = read_rows(work)
    by_id = {sample.sample_id: sample for sample in samples}
    batch = Batch(trajectories=rows, samples=by_id, config=config.rewards, images=ImageTable([dataset]))
    values = np.array([score.value or 0.0 for score in score_answers(batch)]).reshape(len(samples), len(plays))
    work.metrics |= report(samples, np.array(rows, dtype=object).reshape(values.shape), values)


def report(samples: list[Sample], rows: np.ndarray, values: np.ndarray) -> dict[str, float | None]:
    """Metrics of (N, 1 + k) trajectories and their answer rewards; column GREEDY is the greedy one."""
    metrics = figures(samples, rows, values) | {
        name: value
        for name, value in summary(rows[:, GREEDY]).items()
        if not name.startswith("stop/") or "failed" in name
    }
    families = np.array([sample.metadata.get("family", "") for sample in samples])
    for family in sorted(set(families) - {""}):
        chosen = np.flatnonzero(families == family)
        part = figures([samples[i] for i in chosen], rows[chosen], values[chosen])
        metrics |= {f"{family}/{name}": value for name, value in part.items()}
    return metrics


def figures(samples: list[Sample], rows: np.ndarray, values: np.ndarray) -> dict[str, float | None]:
    right = values[:, GREEDY] >= RIGHT
    low, high = wilson(int(right.sum()), len(right))
    found = {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "tool_rate": float(np.mean([used_tool(row) for row in rows[:, GREEDY]])),
    }
    chances = [1 / len(sample.choices) for sample in samples if sample.choices]
    if len(chances) == len(samples):
        found["chance"] = float(np.mean(chances))
    if values.shape[1] > 1:
        means = (values[:, 1:] >= RIGHT).mean(1)
        found["avg_at_k"] = float(means.mean())
        found["avg_at_k_low"], found["avg_at_k_high"] = bootstrap(means)
    if all("solution" in sample.metadata for sample in samples):
        called = np.array([right_calls(sample, row) for sample, row in zip(samples, rows[:, GREEDY], strict=True)])
        found["right_arguments"] = float(called.mean())
        found["right_reading"] = float(right[called].mean()) if called.any() else None
    return found


def used_tool(row: Trajectory) -> bool:
    """Whether a tool showed the model an image."""
    return any(turn.image is not None for turn in row.turns)


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share. Wilson (1927), as in Brown, Cai and DasGupta (2001), eq. 4."""
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def bootstrap(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling questions."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
