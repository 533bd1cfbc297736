"""The type of right answers of which nobody says it, and sentences among them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.answers.kinds import guess_type, is_sentence
from thinkimg.records import AnswerType

KINDS = {
    "exact": ["yes", "No.", "True", "FALSE", "tan", "dark blue", "Left", "woman", "B", "(B)", "(A) red", "A. red",
              "Monday"],
    "integer": ["3", "2010", "1,234", "-5", "−3", "12 cm", "$45", "4.", "60°", "12 hours"],
    "number": ["3.5", "45%", "3/4", "$45.00", "2 million", "1.2e3", "2 2/3", ".5"],
    "maths": [r"\frac{3}{4}", "x^2+1", "x=3", r"2\sqrt{3}", "2√3", r"60^\circ", r"5 \pi", "$x+1$", "x = -3.5", "5π"],
    "judge": ["The kite is red and large.", "Yes, the kite is brown and large.", "It has a red roof.",
              "The barrier is on the left side of the picture.", "The color of the towel is blue",
              "A man wearing a blue shirt.", "The store can be found next to the bank", "There's a dog on the sofa",
              "Das Handtuch ist blau.", "图中的毛巾是蓝色的。"],
    "text": ["Johnson & Johnson Co. Ltd.", "123 Main St. N.W.", "The Color of Money", "R. J. Reynolds", "A. Monk",
             "University of California, San Diego", "10:30", "1/8/93", "8.00 A.M.", "8 am", "open daily until 9 p.m.",
             "007", "red and white", "4:1",
             "[2007, 2008]", "a cup of coffee", "on the left side", "What Is Life About Today", "221 Baker", "five",
             "THE STORE IS CLOSED ON SUNDAY", "January 5, 2010", "C:\\Users\\me", "5 to 10 years", "to be or not to be",
             "a can of red paint", "C-3PO", "http://a.b/c_d^e", "St. Mary's Church of England School.", "5 or 6",
             "the man with the blue hat", "Bank of America Corp.", "three red apples and two green pears", "1,5"],
}  # fmt: skip


@pytest.mark.parametrize("kind, answer", [(kind, answer) for kind, answers in KINDS.items() for answer in answers])
def test_the_type_fits_the_answer(kind, answer):
    assert guess_type([answer], []) == kind
    assert guess_type([answer, answer], []) == kind
    assert is_sentence(answer) == (kind == "judge")


def test_several_answers_have_a_type_that_fits_all():
    assert guess_type(["3", "4"], []) == AnswerType.INTEGER
    assert guess_type(["3", "3.5"], []) == AnswerType.NUMBER
    assert guess_type(["3", "yes"], []) == AnswerType.TEXT
    assert guess_type(["red", "It is a red one."], []) == AnswerType.JUDGE
    assert guess_type(["a"] * 10, []) == AnswerType.VOTES
    assert guess_type([], []) == AnswerType.TEXT


@given(st.lists(st.text(max_size=40), max_size=4), st.lists(st.text(), max_size=3))
def test_any_answers_have_a_type(answers, choices):
    found = guess_type(answers, choices)
    assert (found is AnswerType.CHOICE) == bool(choices)


@pytest.mark.parametrize(
    "piece", ["a ", "a.", "x^", "\\frac", "$", "1 ", "(A) ", "is ", "(", "é", "。", "Answer: ", "it is "]
)
def test_a_long_text_has_a_type_as_well(piece):
    long = piece * 200_000
    assert guess_type([long], []) in (AnswerType.TEXT, AnswerType.JUDGE, AnswerType.EXACT)
