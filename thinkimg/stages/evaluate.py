"""Measure held-out accuracy of a policy, greedy and sampled."""

import asyncio
from typing import Annotated

import numpy as np
from pydantic import Field

from thinkimg.closure import engine_package
from thinkimg.config.tree import Config
from thinkimg.engine.play import SamplingMode
from thinkimg.errors import UserError
from thinkimg.puzzles.demonstrations import right_calls
from thinkimg.records import Sample, Trajectory
from thinkimg.rewards.batch import Batch
from thinkimg.rewards.mix import RIGHT
from thinkimg.rewards.rules.answer import score as score_answers
from thinkimg.rewards.settings import RewardsConfig
from thinkimg.stages.rollout import PlaySettings, closed_rows, play_parts, play_settings, summary
from thinkimg.stages.stage import Input, Job, Lineage, Parameter, Stage
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Dataset, Evaluation, Policy

GREEDY = 0  # index of the greedy trajectory; 1 to k are the sampled ones
ANSWERS = ("rapidfuzz", "math-verify", "latex2sympy2_extended", "sympy")  # decide what is right


class EvaluateSettings(PlaySettings):
    k: int
    temperature: float
    number_tolerance: float
    samples: int
    blind: bool


def settings_of(config: Config, samples: int | None = None, blind: bool = False) -> EvaluateSettings:
    """samples: None takes config.evaluate.samples."""
    samples = config.evaluate.samples if samples is None else samples
    if samples < 1:
        raise UserError(f"an evaluation of {samples} samples says nothing", hint="set --samples to 1 or more")
    return EvaluateSettings(
        **play_settings(config),
        k=config.evaluate.k,
        temperature=config.evaluate.temperature,
        number_tolerance=config.rewards.answer.number_tolerance,
        samples=samples,
        blind=blind,
    )


def run(job: Job[EvaluateSettings]) -> None:
    """Answer the first `samples` held-out questions once greedily and k times sampled.

    blind: every image that a tool makes is replaced by a grey one of the same size, which shows how much of the accuracy
    comes through these images. Metrics: accuracy with its Wilson interval, avg_at_k with a bootstrap interval over questions,
    tool figures, and the same per family of puzzles.
    """
    settings, dataset = job.settings, job.inputs["dataset"]
    samples = dataset.split("held_out")[: settings.samples]
    modes = [SamplingMode(0.0, settings.blind)] + [SamplingMode(settings.temperature, settings.blind)] * settings.k
    asyncio.run(play_parts(job, samples, modes, keep_images=False))
    rows = list(closed_rows(job.work))
    by_id = {sample.sample_id: sample for sample in samples}
    rewards = RewardsConfig(answer={"number_tolerance": settings.number_tolerance})
    batch = Batch(trajectories=rows, samples=by_id, config=rewards, images=ImageTable([dataset]))
    values = np.array([score.value or 0.0 for score in score_answers(batch)]).reshape(len(samples), len(modes))
    job.work.metrics |= report(
        samples, np.array(rows, dtype=object).reshape(values.shape), values, settings.conversation.tools
    )


def report(
    samples: list[Sample], rows: np.ndarray, values: np.ndarray, tools: tuple[str, ...] | None = None
) -> dict[str, float | None]:
    """Metrics of (N, 1 + k) trajectories and their answer rewards; column GREEDY is the greedy one."""
    metrics = figures(samples, rows, values, tools) | {
        name: value
        for name, value in summary(rows[:, GREEDY]).items()
        if not name.startswith("stop/") or "failed" in name
    }
    families = np.array([sample.metadata.get("family", "") for sample in samples])
    for family in sorted(set(families) - {""}):
        chosen = np.flatnonzero(families == family)
        part = figures([samples[i] for i in chosen], rows[chosen], values[chosen], tools)
        metrics |= {f"{family}/{name}": value for name, value in part.items()}
    return metrics


def figures(
    samples: list[Sample], rows: np.ndarray, values: np.ndarray, tools: tuple[str, ...] | None
) -> dict[str, float | None]:
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
        called = np.array(
            [right_calls(sample, row, tools) for sample, row in zip(samples, rows[:, GREEDY], strict=True)]
        )
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


Samples = Annotated[int, Field(ge=1, le=10_000_000)]

evaluate = Stage(
    name="evaluate",
    version=1,
    makes=Evaluation,
    settings=settings_of,
    run=run,
    reads={
        "policy": Input(Policy),
        "dataset": Input(Dataset, origin=Lineage("policy", "dataset"), shown=True),
    },
    parameters={
        "samples": Parameter(Samples | None, None, "Held-out samples; left out, as the preset says."),
        "blind": Parameter(bool, False, "Show grey images in place of those that tools make."),
    },
    packages=lambda settings: ("pillow", "transformers", "tokenizers", engine_package(), *ANSWERS),
    uses=lambda config: frozenset({"engine"}),
    player="policy",
)
