"""Measure held-out accuracy of a policy, greedy and sampled."""

import asyncio
from typing import Annotated

import numpy as np
from pydantic import Field

from thinkimg.closure import engine_package
from thinkimg.config.tree import Config
from thinkimg.engine.play import SamplingMode
from thinkimg.errors import UserError
from thinkimg.puzzles.demonstrations import has_right_calls
from thinkimg.records import Sample, Trajectory
from thinkimg.rewards.batch import Batch
from thinkimg.rewards.mix import RIGHT
from thinkimg.rewards.rules.answer import score as score_answers
from thinkimg.rewards.settings import RewardsConfig
from thinkimg.stages.rollout import PlaySettings, play_parts, play_settings, read_closed, summarise_rows
from thinkimg.stages.stage import Input, Job, Lineage, Parameter, Stage
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Dataset, Evaluation, Policy

GREEDY = 0  # index of the greedy trajectory; 1 to k are the sampled ones
ANSWERS = ("rapidfuzz", "math-verify", "latex2sympy2_extended", "sympy")  # decide what is right


class EvaluateSettings(PlaySettings):
    """Slice of `evaluate`."""

    k: int
    temperature: float
    number_tolerance: float
    samples: int
    blind: bool


def settings_of(config: Config, samples: int | None = None, blind: bool = False) -> EvaluateSettings:
    """Return the slice of the config. samples: None takes config.evaluate.samples."""
    samples = config.evaluate.samples if samples is None else samples
    if samples < 1:
        raise UserError(f"An evaluation of {samples} samples says nothing.", hint="Set --samples to 1 or more.")
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

    blind: every image that a tool makes is replaced by a grey one of the same size. That shows how much accuracy comes
    from these images. Metrics: accuracy with its Wilson interval, avg_at_k with a bootstrap interval over questions,
    figures of tool use, and the same per family of puzzles.
    """
    settings, dataset = job.settings, job.inputs["dataset"]
    samples = dataset.split("held_out")[: settings.samples]
    modes = [SamplingMode(0.0, settings.blind)] + [SamplingMode(settings.temperature, settings.blind)] * settings.k
    asyncio.run(play_parts(job, samples, modes, keep_images=False))
    rows = list(read_closed(job.work))
    by_id = {sample.sample_id: sample for sample in samples}
    rewards = RewardsConfig(answer={"number_tolerance": settings.number_tolerance})
    batch = Batch(trajectories=rows, samples=by_id, config=rewards, images=ImageTable([dataset]))
    values = np.array([score.value or 0.0 for score in score_answers(batch)]).reshape(len(samples), len(modes))
    table = np.array(rows, dtype=object).reshape(values.shape)
    job.work.metrics |= summarise_evaluation(samples, table, values, settings.conversation.tools)


def summarise_evaluation(
    samples: list[Sample], rows: np.ndarray, values: np.ndarray, tools: tuple[str, ...] | None = None
) -> dict[str, float | None]:
    """Return the metrics of (N, 1 + k) trajectories and their answer rewards; column GREEDY is the greedy one."""
    metrics = measure_accuracy(samples, rows, values, tools)
    for name, value in summarise_rows(rows[:, GREEDY]).items():
        if not name.startswith("stop/") or "failed" in name:
            metrics[name] = value
    families = np.array([sample.metadata.get("family", "") for sample in samples])
    for family in sorted(set(families) - {""}):
        chosen = np.flatnonzero(families == family)
        part = measure_accuracy([samples[i] for i in chosen], rows[chosen], values[chosen], tools)
        metrics |= {f"{family}/{name}": value for name, value in part.items()}
    return metrics


def measure_accuracy(
    samples: list[Sample], rows: np.ndarray, values: np.ndarray, tools: tuple[str, ...] | None
) -> dict[str, float | None]:
    """Return the figures of (N, 1 + k) trajectories with these answer rewards."""
    from scipy.stats import binomtest

    right = values[:, GREEDY] >= RIGHT
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    figures: dict[str, float | None] = {
        "accuracy": float(right.mean()),
        "accuracy_low": float(interval.low),
        "accuracy_high": float(interval.high),
        "tool_rate": float(np.mean([saw_tool_image(row) for row in rows[:, GREEDY]])),
    }
    chances = [1 / len(sample.choices) for sample in samples if sample.choices]
    if len(chances) == len(samples):
        figures["chance"] = float(np.mean(chances))
    if values.shape[1] > 1:
        means = (values[:, 1:] >= RIGHT).mean(1)
        figures["avg_at_k"] = float(means.mean())
        figures["avg_at_k_low"], figures["avg_at_k_high"] = bootstrap_interval(means)
    if all("solution" in sample.metadata for sample in samples):
        called = np.array(
            [has_right_calls(sample, row, tools) for sample, row in zip(samples, rows[:, GREEDY], strict=True)]
        )
        figures["right_arguments"] = float(called.mean())
        figures["right_reading"] = float(right[called].mean()) if called.any() else None
    return figures


def saw_tool_image(row: Trajectory) -> bool:
    """Tell whether a tool showed the model an image."""
    return any(turn.image is not None for turn in row.turns)


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, by resampling questions."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return float(values[0]), float(values[0])
    resampled = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=0)
    low, high = resampled.confidence_interval
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
