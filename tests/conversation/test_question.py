"""The text of a question: options by letter, one per line, and the form of the answer."""

from dataclasses import replace

import pytest
from rewards_rows import sample

from thinkimg.answers.choices import match_choice
from thinkimg.answers.compare import compare
from thinkimg.conversation.question import list_choices, state_question
from thinkimg.records import AnswerType


def test_a_question_has_its_images_its_choices_by_letter_and_the_form_of_the_answer():
    one = sample("red", AnswerType.CHOICE, ("red", "1,500"))
    assert state_question(one, [(56, 28), (28, 28)]) == (
        "Image 0: 56x28 pixels. Image 1: 28x28 pixels. Which colour?\nA. red\nB. 1,500\n"
        "Answer with the letter or the text of one option."
    )


@pytest.mark.parametrize("kind", AnswerType)
def test_the_last_line_says_how_the_answer_is_written(kind):
    one = sample("3", kind, ("3", "4") if kind is AnswerType.CHOICE else ())
    *question, form = state_question(one, []).split("\n")
    assert question[0] == "Which colour?"
    assert form.startswith("Answer with ") and len(form.split()) < 12
    assert ("x, y, width, height" in form) == (kind is AnswerType.BOX)


def test_the_form_of_a_number_is_that_of_its_data_set():
    number = sample("1.25", AnswerType.NUMBER)
    forms = [state_question(replace(number, **more), []).split("\n")[-1]
             for more in ({}, {"decimals": 1}, {"decimals": 2}, {"tolerance": 0.05})]  # fmt: skip
    assert forms == ["Answer with a number.", "Answer with a number to 1 decimal place.",
                     "Answer with a number to 2 decimal places.", "Answer with a number or a word."]  # fmt: skip


@pytest.mark.parametrize("choices", [
    ("red", "blue"), ("(A) red", "(B) blue"), ("A. red", "B) blue"), tuple(f"c{n}" for n in range(30)), ("1.5", "2.5"),
    ("A", "B"), ("B", "A"), ("(A) red", "blue"), ("(A) red", "(A) blue"), ("(B) red", "(A) blue"),
])  # fmt: skip
def test_what_a_line_shows_names_its_choice_and_no_letter_stands_twice(choices):
    lines = list_choices(choices)
    assert len(lines) == len(choices)
    for index, (line, choice) in enumerate(zip(lines, choices, strict=True)):
        assert line.endswith(choice)
        assert match_choice(choice, choices) == index
        if all("(" in one or ")" in one or "." in one for one in choices):
            assert line == choice or not choice[0].isalpha()
        if line != choice and choices not in (("B", "A"), ("A", "B")):
            assert match_choice(line, choices) == match_choice(line.split(".")[0], choices) == index
            assert compare(line, sample(choice, AnswerType.CHOICE, choices)) == 1
