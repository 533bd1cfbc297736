"""Rule `answer`: correctness of the final answer, compared by its type. The answer is parsed, never evaluated."""

from pydantic import Field

import thinkimg.settings
from thinkimg.answers.compare import NUMBER_TOLERANCE, Context, list_formulas, weigh
from thinkimg.answers.formulas import Verdict
from thinkimg.images.coordinates import Frame
from thinkimg.records import AnswerType, Sample, StopReason, Trajectory
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.maths import verify_formulas
from thinkimg.rewards.sentences import MAX_ANSWER, GivenAnswer, decide


class Settings(thinkimg.settings.Settings):
    """Comparison of answers."""

    judge: thinkimg.settings.Name | None = None
    """Model at `where.teacher.url` that compares answers with right ones that are sentences; without one these answers
    have no score."""
    number_tolerance: float = Field(NUMBER_TOLERANCE, ge=0)
    """Relative tolerance of numbers. A right answer that is a whole number is compared exactly."""


def score(batch: Batch) -> list[Score]:
    """Return the worth of each answer as answers.compare weighs it; the best over several right answers counts.

    Boxes: the answer is in the row's coordinates on the first image, the right answer in those of the full
    resolution. A right answer that is no box leaves the score missing. Answers beside a sentence have the verdict of a
    judge, which rewards/sentences.py asks for.
    """
    pairs = [
        pair
        for trajectory in batch.trajectories
        if trajectory.answer is not None
        for pair in list_formulas(trajectory.answer, batch.sample(trajectory))
    ]
    verdicts = verify_formulas(pairs)
    return [_score(trajectory, batch, verdicts) for trajectory in batch.trajectories]


def _score(trajectory: Trajectory, batch: Batch, verdicts: dict[tuple[str, str], Verdict]) -> Score:
    answer, sample = trajectory.answer, batch.sample(trajectory)
    if trajectory.stop is StopReason.FAILED:
        return Score.zero("The conversation failed.")
    if answer is None:
        return Score.zero(f"There is no answer ({trajectory.stop}).")
    if sample.answer_type is AnswerType.JUDGE:
        return _judged(trajectory, sample, batch)
    frame = _frame(trajectory, batch) if sample.answer_type is AnswerType.BOX else None
    compared = weigh(answer, sample, Context(batch.config.answer.number_tolerance, frame, verdicts))
    if compared.value is None:
        return Score.missing(compared.reason, compared.evidence)
    return Score.of(compared.value, compared.reason, compared.evidence)


def _judged(trajectory: Trajectory, sample: Sample, batch: Batch) -> Score:
    """Return the score of an answer to a question whose right answers are sentences."""
    assert trajectory.answer is not None
    value = decide(trajectory.answer, sample)
    if value is not None:
        return Score.of(value, f"The answer is longer than {MAX_ANSWER} characters.")
    verdict = batch.verdicts.get(GivenAnswer(sample.question, sample.answers, trajectory.answer))
    if verdict is None:
        return Score.missing("No model compares sentences: rewards.answer.judge names none.")
    if verdict.value is None:
        return Score.missing(f"The judge gave no verdict: {verdict.reason}")
    return Score.of(verdict.value, verdict.reason or "?", verdict.evidence)


def _frame(trajectory: Trajectory, batch: Batch) -> Frame:
    assert batch.images is not None, "boxes need the images: the model saw them at another size"
    return Frame(batch.images.decoded(trajectory.images[0]).size, trajectory.sizes[0], trajectory.coordinates)
