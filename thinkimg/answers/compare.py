"""Comparison of an answer with the right ones by their type: pure, but for formulas, whose verdicts are handed in.

rewards/rules/answer ──► weigh(answer, sample, context) ──► Comparison
right.can_be_right   ──► is_paid(answer, sample) ──► bool
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

from thinkimg.answers.boxes import BoxXYWH, iou, read_box, read_stated_box
from thinkimg.answers.choices import match_choice
from thinkimg.answers.exact import match_exactly, match_strictly
from thinkimg.answers.formulas import Verdict, compare_texts
from thinkimg.answers.numbers import Quantity, plain_latex, read_number, read_plain_number
from thinkimg.answers.similarity import anls
from thinkimg.answers.text import drop_invisible, normalise
from thinkimg.answers.votes import count_votes
from thinkimg.images.coordinates import Frame
from thinkimg.records import AnswerType

NUMBER_TOLERANCE = 0.01
WRONG = "The answer is not the right one."
NO_NUMBER = "The answer is no number."


class Right(Protocol):
    """Right answers with all that their comparison depends on: a Sample or a RawRow."""

    @property
    def answers(self) -> Sequence[str]: ...
    @property
    def answer_type(self) -> AnswerType: ...
    @property
    def choices(self) -> Sequence[str]: ...
    @property
    def tolerance(self) -> float | None: ...
    @property
    def decimals(self) -> int | None: ...


@dataclass(frozen=True)
class Context:
    """Facts beyond the sample that a comparison depends on."""

    number_tolerance: float = NUMBER_TOLERANCE
    """`rewards.answer.number_tolerance`, for samples without one of their own."""
    frame: Frame | None = None
    """Sizes of the first image; None where boxes are answered in its own pixels."""
    verdicts: Mapping[tuple[str, str], Verdict] = field(default_factory=dict)
    """(answer, right answer) -> verdict of rewards.maths.verify_formulas, where the texts do not decide."""


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison. value: in [0, 1], None where nothing can be said. reason: where it is 0 or None."""

    value: float | None
    reason: str = WRONG
    evidence: dict[str, Any] | None = None


def compare(answer: str, sample: Right, context: Context = Context()) -> float | None:
    """Return the worth of an answer in [0, 1], the best over the right answers.

    None where nothing can be said: for sentences, which a judge compares, and for formulas that are not equal as texts
    and have no verdict.
    """
    return weigh(answer, sample, context).value


def is_paid(answer: str, sample: Right) -> bool:
    """Tell whether a right answer scores 1: by itself, or else by another; aliases by the hundred cost linear time."""
    if sample.answer_type is not AnswerType.VOTES and _weigh(answer, answer, sample, Context()).value == 1:
        return True
    return compare(answer, sample) == 1


def weigh(answer: str, sample: Right, context: Context = Context()) -> Comparison:
    """Return the comparison of an answer with the right ones of a sample; that with the best one counts."""
    if sample.answer_type is AnswerType.VOTES:
        return Comparison(count_votes(answer, sample.answers), "No annotator gave the answer.")
    compared = [_weigh(answer, right, sample, context) for right in sample.answers]
    return max(compared, key=lambda one: -1 if one.value is None else one.value)


def list_formulas(answer: str, sample: Right) -> list[tuple[str, str]]:
    """Return the pairs (answer, right answer) that rewards.maths.verify_formulas has to compare, in one batch."""
    return [_visible(answer, right) for right in sample.answers] if sample.answer_type is AnswerType.MATHS else []


def _visible(answer: str, right: str) -> tuple[str, str]:
    return drop_invisible(answer), drop_invisible(right)


def _weigh(answer: str, right: str, sample: Right, context: Context) -> Comparison:
    answer, right = _visible(answer, right)
    match sample.answer_type:
        case AnswerType.CHOICE:
            return _choice(answer, right, sample.choices)
        case AnswerType.NUMBER | AnswerType.INTEGER:
            return _number(answer, right, sample, context)
        case AnswerType.TEXT:
            value, similarity = anls(answer, right)
            evidence = {"similarity": similarity, "right": right}
            return Comparison(value, "The answer is not similar enough to the right one.", evidence)
        case AnswerType.BOX:
            return _box(_in_full(answer, context.frame), right)
        case AnswerType.MATHS:
            verdict = compare_texts(answer, right) or context.verdicts.get((answer, right))
            if verdict is None:
                return Comparison(None, "The formulas were not compared.")
            return Comparison(float(verdict.equal), verdict.reason or WRONG)
        case AnswerType.JUDGE:
            return Comparison(None, "No rule compares sentences; a judge does.")
        case _:
            return Comparison(float(match_exactly(answer, right)))


def _choice(answer: str, right: str, choices: Sequence[str]) -> Comparison:
    wanted, chosen = match_choice(right, choices), match_choice(answer, choices)
    if wanted is None:
        return Comparison(float(match_exactly(answer, right)))
    if chosen is None:
        return Comparison(0.0, "The answer is none of the choices.")
    return Comparison(float(chosen == wanted), WRONG, {"chosen": choices[chosen]})


def _number(answer: str, right: str, sample: Right, context: Context) -> Comparison:
    """Compare numbers. One of a data set with its own precision or tolerance is read in plain digits, as it does."""
    if sample.tolerance is not None:
        return _number_or_word(answer, right, sample.tolerance)
    if sample.decimals is not None and (plain := read_plain_number(right)) is not None:
        return _rounded(read_plain_number(normalise(answer)), plain, sample.decimals, sample.answer_type)
    wanted, given = read_number(right), read_number(plain_latex(answer))
    if wanted is None:
        return Comparison(float(normalise(answer) == normalise(right)))
    if given is None:
        return Comparison(0.0, NO_NUMBER)
    if sample.answer_type is AnswerType.INTEGER:
        wanted = Quantity(wanted.value, wanted.unit, is_integer=True)
    # From its decimal form, so that 0.01 is 1/100 exactly, and 101 is within it of 100.
    tolerance = Fraction(str(context.number_tolerance))
    return Comparison(float(given.is_near(wanted, tolerance)))


def _number_or_word(answer: str, right: str, tolerance: float) -> Comparison:
    """Compare by ChartQA's relaxed accuracy (arXiv 2203.10244, section 5.1): numbers within a tolerance, or words.

    A question for a year is none of these: it has the type integer.
    """
    wanted, given = (read_plain_number(text, percent=True) for text in (right, normalise(answer)))
    if wanted is None or given is None:
        return Comparison(float(match_strictly(answer, right)))
    allowed = Fraction(str(tolerance)) * abs(Fraction(str(wanted)))
    return Comparison(float(abs(Fraction(str(given)) - Fraction(str(wanted))) <= allowed))


def _rounded(given: float | None, wanted: float, decimals: int, answer_type: AnswerType) -> Comparison:
    """Compare after rounding (MathVista, calculate_score.py); whole numbers as they are."""
    if given is None:
        return Comparison(0.0, NO_NUMBER)
    if answer_type is AnswerType.INTEGER:
        return Comparison(float(given == wanted))
    return Comparison(float(round(given, decimals) == round(wanted, decimals)))


def _in_full(answer: str, frame: Frame | None) -> BoxXYWH | None:
    """Return the answer's box in pixels of the full-resolution image; None if the answer is no box."""
    stated = read_stated_box(answer)
    return stated.in_full(frame) if stated else None


def _box(given: BoxXYWH | None, right: str) -> Comparison:
    wanted = read_box(right)
    if wanted is None:
        return Comparison(None, "The right answer is no box x, y, width, height.")
    if given is None:
        return Comparison(0.0, "The answer is no box x, y, width, height.")
    return Comparison(iou(given, wanted), "The boxes do not overlap.", {"box": list(given), "right": list(wanted)})
