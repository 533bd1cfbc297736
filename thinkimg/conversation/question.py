"""Text of a question: sizes of its images, the question, its choices, and the form of the answer.

    episode.render_prompt ──┐
    stages/demonstrate ─────┼──► state_question ──► state_size, state_form
    tracking/traces ────────┘

What the sentences on the form ask for, answers.compare reads.
"""

from collections.abc import Sequence

from thinkimg.answers.choices import OWN_LETTER, label_choices
from thinkimg.records import AnswerType, Coordinates, Sample

FORMS = {
    AnswerType.CHOICE: "Answer with the letter or the text of one option.",
    AnswerType.INTEGER: "Answer with a whole number.",
    AnswerType.NUMBER: "Answer with a number.",
    AnswerType.TEXT: "Answer with as few words as possible.",
    AnswerType.EXACT: "Answer with a word or a short phrase.",
    AnswerType.VOTES: "Answer with a word or a short phrase.",
    AnswerType.BOX: "Answer with x, y, width, height in {unit} of image 0.",
    AnswerType.MATHS: "Answer with a number or a formula in LaTeX.",
    AnswerType.JUDGE: "Answer with one short sentence.",
}
"""Answer type -> sentence that says how the answer is written."""


def state_question(
    sample: Sample, sizes: Sequence[tuple[int, int]], coordinates: Coordinates = Coordinates.PIXELS
) -> str:
    """Return the text of a question: the images' sizes as the model sees them, the question, its choices by letter.

    Each choice has a line of its own, and the last line says how the answer is written. sizes: in pixels.
    """
    statements = [state_size(number, size, coordinates) for number, size in enumerate(sizes)]
    form = state_form(sample, coordinates)
    return "\n".join([" ".join([*statements, sample.question]), *list_choices(sample.choices), form])


def state_size(number: int, size: tuple[int, int], coordinates: Coordinates = Coordinates.PIXELS) -> str:
    """Return the sentence that states an image's largest coordinates. size: in pixels, as the model sees it."""
    width, height = coordinates.extent(size)
    return f"Image {number}: {width}x{height} {coordinates}."


def state_form(sample: Sample, coordinates: Coordinates = Coordinates.PIXELS) -> str:
    """Return the sentence that says how the answer to a sample is written."""
    if sample.answer_type is AnswerType.NUMBER and sample.decimals is not None:
        return f"Answer with a number to {sample.decimals} decimal place{'s' * (sample.decimals != 1)}."
    if sample.answer_type is AnswerType.NUMBER and sample.tolerance is not None:
        return "Answer with a number or a word."
    if sample.answer_type is AnswerType.CHOICE and not sample.choices:
        return FORMS[AnswerType.EXACT]
    return FORMS[sample.answer_type].format(unit=coordinates)


def list_choices(choices: Sequence[str]) -> list[str]:
    """Return the choices with their letters: 'A. red'. Those with letters of their own stay, as do those after Z."""
    letters, texts = label_choices(choices)
    if list(choices) != texts or all(map(OWN_LETTER.fullmatch, choices)):
        return list(choices)
    lettered = [f"{letter.upper()}. {text}" for letter, text in zip(letters, texts, strict=False)]
    return [*lettered, *texts[len(lettered) :]]
