"""Rule `answer`: correctness of the final answer, compared by its type. The answer is parsed, never evaluated."""

from fractions import Fraction

from pydantic import Field

import thinkimg.settings
from thinkimg.answers.boxes import BoxXYWH, iou, read_box
from thinkimg.answers.choices import match_choice
from thinkimg.answers.numbers import read_number
from thinkimg.answers.similarity import anls
from thinkimg.answers.text import normalise
from thinkimg.images.coordinates import Frame
from thinkimg.records import AnswerType, StopReason, Trajectory
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.maths import Verdict, verify_formulas

WRONG = "The answer is not the right one."


class Settings(thinkimg.settings.Settings):
    """Comparison of answers."""

    number_tolerance: float = Field(0.01, ge=0)
    """Relative tolerance of numbers. A right answer that is a whole number is compared exactly."""


def score(batch: Batch) -> list[Score]:
    """Return 1 or 0 for choices, numbers and maths, ANLS for texts, IoU for boxes; the best over several right answers.

    Boxes: the answer is in pixels of the first image as the model saw it, the right answer in those of the full
    resolution. A right answer that is no number or no formula is compared as text; one that is no box leaves the score
    missing.
    """
    pairs = [
        (trajectory.answer, right)
        for trajectory in batch.trajectories
        if batch.sample(trajectory).answer_type is AnswerType.MATHS and trajectory.answer is not None
        for right in batch.sample(trajectory).answers
    ]
    verdicts = verify_formulas(pairs)
    return [_score(trajectory, batch, verdicts) for trajectory in batch.trajectories]


def _score(trajectory: Trajectory, batch: Batch, verdicts: dict[tuple[str, str], Verdict]) -> Score:
    answer, sample = trajectory.answer, batch.sample(trajectory)
    if trajectory.stop is StopReason.FAILED:
        return Score.zero("The conversation failed.")
    if answer is None:
        return Score.zero(f"There is no answer ({trajectory.stop}).")
    rights = sample.answers
    match sample.answer_type:
        case AnswerType.CHOICE:
            scores = [_choice(answer, right, sample.choices) for right in rights]
        case AnswerType.NUMBER:
            # From its decimal form, so that 0.01 is 1/100 exactly, and 101 is within it of 100.
            tolerance = Fraction(str(batch.config.answer.number_tolerance))
            scores = [_number(answer, right, tolerance) for right in rights]
        case AnswerType.TEXT:
            scores = [_text(answer, right) for right in rights]
        case AnswerType.BOX:
            scores = [_box(_in_full(answer, trajectory, batch), right) for right in rights]
        case AnswerType.MATHS:
            compared = [verdicts[answer, right] for right in rights]
            scores = [Score.of(float(verdict.equal), verdict.reason or WRONG) for verdict in compared]
    return max(scores, key=lambda score: -1 if score.value is None else score.value)


def _choice(answer: str, right: str, choices: tuple[str, ...]) -> Score:
    wanted, chosen = match_choice(right, choices), match_choice(answer, choices)
    if wanted is None:
        return Score.of(float(normalise(answer) == normalise(right)), WRONG)
    if chosen is None:
        return Score.zero("The answer is none of the choices.")
    return Score.of(float(chosen == wanted), WRONG, {"chosen": choices[chosen]})


def _number(answer: str, right: str, tolerance: Fraction) -> Score:
    wanted, given = read_number(right), read_number(answer)
    if wanted is None:
        return Score.of(float(normalise(answer) == normalise(right)), WRONG)
    if given is None:
        return Score.zero("The answer is no number.")
    return Score.of(float(given.is_near(wanted, tolerance)), WRONG)


def _text(answer: str, right: str) -> Score:
    value, similarity = anls(answer, right)
    evidence = {"similarity": similarity, "right": right}
    return Score.of(value, "The answer is not similar enough to the right one.", evidence)


def _in_full(answer: str, trajectory: Trajectory, batch: Batch) -> BoxXYWH | None:
    """Return the answer's box in pixels of the full-resolution image; None if the answer is no box."""
    box = read_box(answer)
    if box is None:
        return None
    assert batch.images is not None, "boxes need the images: the model saw them at another size"
    frame = Frame(batch.images.decoded(trajectory.images[0]).size, trajectory.sizes[0])
    return *frame.to_full(*box[:2]), *frame.to_full(*box[2:])


def _box(given: BoxXYWH | None, right: str) -> Score:
    wanted = read_box(right)
    if wanted is None:
        return Score.missing("The right answer is no box x, y, width, height.")
    if given is None:
        return Score.zero("The answer is no box x, y, width, height.")
    return Score.of(iou(given, wanted), "The boxes do not overlap.", {"box": list(given), "right": list(wanted)})
