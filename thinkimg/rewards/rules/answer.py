"""Answer: how right the final answer is, compared according to its type. It is the model's text: parsed, never
evaluated."""

from fractions import Fraction

from pydantic import Field

import thinkimg.settings
from thinkimg.images.coordinates import Frame
from thinkimg.records import AnswerType, StopReason, Trajectory
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.boxes import Box, iou, read_box
from thinkimg.rewards.maths import Verdict, check
from thinkimg.rewards.numbers import read_number
from thinkimg.rewards.text import anls, choose, plain

WRONG = "The answer is not the right one."


class Settings(thinkimg.settings.Settings):
    number_tolerance: float = Field(0.01, ge=0)
    """Relative tolerance of numeric answers."""


def score(batch: Batch) -> list[Score]:
    """Choices, numbers and maths: 1 or 0. Texts: ANLS. Boxes: IoU; the answer in pixels of the first image as the model
    saw it, the right answer in those of the full-resolution image.

    Of several right answers the best counts. A right answer
    that is no number or no formula is compared as text; one that is no box leaves the score missing.
    """
    pairs = [
        (trajectory.answer, right)
        for trajectory in batch.trajectories
        if batch.sample(trajectory).answer_type is AnswerType.MATHS and trajectory.answer is not None
        for right in batch.sample(trajectory).answers
    ]
    verdicts = check(pairs)
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
            # From its decimal form: a tolerance of 0.01 is 1/100, and 101 is within it of 100.
            tolerance = Fraction(str(batch.config.answer.number_tolerance))
            scores = [_number(answer, right, tolerance) for right in rights]
        case AnswerType.TEXT:
            scores = [_text(answer, right) for right in rights]
        case AnswerType.BOX:
            scores = [_box(_in_full(answer, trajectory, batch), right) for right in rights]
        case AnswerType.MATHS:
            found = [verdicts[answer, right] for right in rights]
            scores = [Score.of(float(verdict.equal), verdict.reason or WRONG) for verdict in found]
    return max(scores, key=lambda score: -1 if score.value is None else score.value)


def _choice(answer: str, right: str, choices: tuple[str, ...]) -> Score:
    wanted, chosen = choose(right, choices), choose(answer, choices)
    if wanted is None:
        return Score.of(float(plain(answer) == plain(right)), WRONG)
    if chosen is None:
        return Score.zero("The answer is none of the choices.")
    return Score.of(float(chosen == wanted), WRONG, {"chosen": choices[chosen]})


def _number(answer: str, right: str, tolerance: Fraction) -> Score:
    wanted, found = read_number(right), read_number(answer)
    if wanted is None:
        return Score.of(float(plain(answer) == plain(right)), WRONG)
    if found is None:
        return Score.zero("The answer is no number.")
    return Score.of(float(found.is_near(wanted, tolerance)), WRONG)


def _text(answer: str, right: str) -> Score:
    value, similarity = anls(answer, right)
    return Score.of(
        value, "The answer is not similar enough to the right one.", {"similarity": similarity, "right": right}
    )


def _in_full(answer: str, trajectory: Trajectory, batch: Batch) -> Box | None:
    """The answer's box in pixels of the full-resolution image."""
    box = read_box(answer)
    if box is None:
        return None
    assert batch.images is not None, "boxes need the images: the model saw them at another size"
    frame = Frame(batch.images.decoded(trajectory.images[0]).size, trajectory.sizes[0])
    return *frame.to_full(*box[:2]), *frame.to_full(*box[2:])


def _box(found: Box | None, right: str) -> Score:
    wanted = read_box(right)
    if wanted is None:
        return Score.missing("The right answer is no box x, y, width, height.")
    if found is None:
        return Score.zero("The answer is no box x, y, width, height.")
    return Score.of(iou(found, wanted), "The boxes do not overlap.", {"box": list(found), "right": list(wanted)})
