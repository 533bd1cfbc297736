"""Measure held-out accuracy of a policy, greedy and sampled."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated

import numpy as np
from pydantic import Field

from thinkimg.closure import engine_package
from thinkimg.config.tree import Config
from thinkimg.data.split import draw
from thinkimg.engine.play import SamplingMode
from thinkimg.errors import UserError, check_share
from thinkimg.puzzles.demonstrations import has_right_calls
from thinkimg.records import Sample, StopReason, Trajectory
from thinkimg.rewards import sentences
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.mix import RIGHT
from thinkimg.rewards.part import add_failed
from thinkimg.rewards.rules.answer import score as score_answers
from thinkimg.rewards.sentences import Verdicts
from thinkimg.rewards.settings import RewardsConfig
from thinkimg.stages.rollout import (
    PARTS,
    PlaySettings,
    compare_settings,
    discard_parts,
    has_failed,
    play_parts,
    play_settings,
    read_closed,
    report_failures,
    summarise_rows,
)
from thinkimg.stages.stage import Input, Job, Lineage, Parameter, Stage
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Dataset, Evaluation, Policy
from thinkimg.store.manifest import Artifact

GREEDY = 0  # index of the greedy trajectory; 1 to k are the sampled ones
LEDGER = f"{sentences.TABLE}-00000.parquet"
ANSWERS = ("rapidfuzz", "math-verify", "latex2sympy2_extended", "sympy")  # decide what is right


class EvaluateSettings(PlaySettings):
    """Slice of `evaluate`."""

    k: int
    temperature: float
    number_tolerance: float
    judge: str | None
    """Model that compares answers with sentences."""
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
        judge=config.rewards.answer.judge,
        samples=samples,
        blind=blind,
    )


def run(job: Job[EvaluateSettings]) -> None:
    """Answer `samples` random held-out questions once greedily and k times sampled.

    blind: every image that a tool makes is replaced by a grey one of the same size. That shows how much accuracy comes
    from these images. Metrics: accuracy with its Wilson interval, avg_at_k with a bootstrap interval over questions,
    figures of tool use, and the same per family of puzzles. Conversations that failed, and answers that can't be
    judged, are counted and left out. Raises UserError where that is more than half of the greedy ones.
    """
    settings, dataset = job.settings, job.inputs["dataset"]
    # One seed for all: the questions are the same after every iteration, and for policies of other seeds.
    samples = draw(dataset.split("held_out"), settings.samples, 0, "evaluated")
    modes = [SamplingMode(0.0, settings.blind)] + [SamplingMode(settings.temperature, settings.blind)] * settings.k
    asyncio.run(play_parts(job, samples, modes, keep_images=False))
    rows = list(read_closed(job.work))
    report_failures(rows)
    by_id = {sample.sample_id: sample for sample in samples}
    judge = sentences.make_judge(settings.judge, job.resources.where.teacher, job.store)
    asked = sentences.collect_answers(rows, by_id)
    verdicts = sentences.fill_ledger(job.work, LEDGER, asked, judge) if judge else {}
    values = judge_answers(rows, by_id, settings.number_tolerance, ImageTable([dataset]), verdicts)
    values = values.reshape(-1, len(modes))
    table = np.array(rows, dtype=object).reshape(values.shape)
    unjudged = [row for row, value in zip(table[:, GREEDY], values[:, GREEDY], strict=True) if np.isnan(value)]
    try:
        explained = sentences.explain_unjudged_of(dataset, settings.judge) or "The answer can't be judged."
        check_share([row.error or explained for row in unjudged], len(table), "answers")
    except UserError:
        discard_parts(job.work, filter(partial(has_failed, job.work), range(PARTS)))
        raise
    job.work.metrics |= summarise_evaluation(samples, table, values, settings.conversation.tools)


def judge_answers(
    rows: Sequence[Trajectory],
    samples: Mapping[str, Sample],
    tolerance: float,
    images: ImageTable,
    verdicts: Verdicts | None = None,
) -> np.ndarray:
    """Return the values of `score_rows`, (N,) float64; NaN where one is missing."""
    scores = score_rows(rows, samples, tolerance, images, verdicts)
    return np.array([np.nan if score.value is None else score.value for score in scores], dtype=np.float64)


def score_rows(
    rows: Sequence[Trajectory],
    samples: Mapping[str, Sample],
    tolerance: float,
    images: ImageTable,
    verdicts: Verdicts | None = None,
) -> list[Score]:
    """Return the answers' scores; one is missing where a conversation failed or its answer can't be judged.

    samples: by id. tolerance: of numbers. verdicts: on answers that are compared with sentences.
    """
    config = RewardsConfig(answer={"number_tolerance": tolerance})
    played = [row for row in rows if row.stop is not StopReason.FAILED]
    return add_failed(rows, score_answers(Batch(played, samples, config, images, verdicts=verdicts or {})))


def summarise_evaluation(
    samples: list[Sample], rows: np.ndarray, values: np.ndarray, tools: tuple[str, ...] | None = None
) -> dict[str, float | None]:
    """Return the metrics of (N, 1 + k) trajectories and their answer rewards; column GREEDY is the greedy one.

    values: NaN where a conversation failed or its answer can't be judged.
    """
    metrics = measure_accuracy(samples, rows, values, tools)
    metrics["failed"] = int((list_stops(rows) == StopReason.FAILED).sum())
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
    """Return the figures of (N, 1 + k) trajectories with these answer rewards, over those that have one.

    judged: number of greedy answers behind `accuracy`. A figure without any answer is None.
    """
    judged = np.flatnonzero(~np.isnan(values[:, GREEDY]))
    figures: dict[str, float | None] = {"judged": len(judged)}
    figures |= dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "tool_rate"))
    chances = [1 / len(sample.choices) for sample in samples if sample.choices]
    if len(chances) == len(samples):
        figures["chance"] = float(np.mean(chances))
    if values.shape[1] > 1:
        figures |= measure_sampled(values[:, 1:])
    if not len(judged):
        return figures
    right, greedy = values[judged, GREEDY] >= RIGHT, rows[judged, GREEDY]
    figures["accuracy"] = float(right.mean())
    figures["accuracy_low"], figures["accuracy_high"] = wilson_interval(int(right.sum()), len(right))
    figures["tool_rate"] = float(np.mean([saw_tool_image(row) for row in greedy]))
    if all("solution" in sample.metadata for sample in samples):
        called = np.array([has_right_calls(samples[i], row, tools) for i, row in zip(judged, greedy, strict=True)])
        figures["right_arguments"] = float(called.mean())
        figures["right_reading"] = float(right[called].mean()) if called.any() else None
    return figures


def measure_sampled(values: np.ndarray) -> dict[str, float | None]:
    """Return the mean share of right answers per question, and its interval, of (N, k) answer rewards."""
    answered = ~np.isnan(values)
    questions = answered.any(1)
    if not questions.any():
        return dict.fromkeys(("avg_at_k", "avg_at_k_low", "avg_at_k_high"))
    means = ((values >= RIGHT).sum(1)[questions]) / answered.sum(1)[questions]
    low, high = bootstrap_interval(means)
    return {"avg_at_k": float(means.mean()), "avg_at_k_low": low, "avg_at_k_high": high}


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(hits, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def list_stops(rows: np.ndarray) -> np.ndarray:
    """Return the reasons for which trajectories stopped, in the same shape."""
    return np.array([row.stop for row in rows.flat]).reshape(rows.shape)


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


def describe_accuracy(metrics: Mapping[str, float | None]) -> str:
    """Return accuracy with its 95 % interval, avg@k, chance, and the number of conversations that failed."""

    def show(*names: str) -> str:
        values = [metrics.get(name) for name in names]
        return "" if None in values else "–".join(f"{100 * value:.0f}" for value in values if value is not None)

    accuracy, interval = show("accuracy"), show("accuracy_low", "accuracy_high")
    parts = [f"held-out accuracy {accuracy} % (95 %: {interval})" if accuracy else "no held-out accuracy"]
    parts += [f"{label} {text} %" for label, text in (("avg@k", show("avg_at_k")), ("chance", show("chance"))) if text]
    if failed := metrics.get("failed"):
        parts.append(f"{failed:.0f} conversations failed and don't count")
    judged, asked = metrics.get("judged"), metrics.get("trajectories")
    if judged is not None and asked is not None and judged + (failed or 0) < asked:
        parts.append(f"{judged:.0f} of {asked:.0f} answers judged")
    return ", ".join(parts)


def warn(settings: EvaluateSettings, inputs: Mapping[str, Artifact], store: Store) -> str:
    """Return sentences on other settings than the policy's, and on samples whose answers nobody compares."""
    unjudged = sentences.explain_unjudged_of(inputs["dataset"], settings.judge)
    return " ".join(filter(None, [compare_settings(settings, inputs, store), unjudged]))


Samples = Annotated[int, Field(ge=1, le=10_000_000)]

evaluate = Stage(
    name="evaluate",
    version=6,
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
    check=lambda config: sentences.check_judge(config.rewards.answer.judge, config.where.teacher),
    warn=warn,
    report=lambda artifact: describe_accuracy(artifact.metrics),
    uses=lambda config: frozenset({"engine"}),
    player="policy",
)
