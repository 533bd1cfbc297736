"""Answers in all forms that people and models write, compared by type."""

import itertools
import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards_rows import sample

from thinkimg.answers import compare as module
from thinkimg.answers.choices import match_choice
from thinkimg.answers.compare import Context, compare, list_formulas
from thinkimg.answers.kinds import guess_type
from thinkimg.answers.right import can_be_right, read_right
from thinkimg.answers.text import normalise
from thinkimg.images.coordinates import Frame
from thinkimg.records import AnswerType
from thinkimg.rewards.maths import verify_formulas

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "pink", "grey")
LETTER_FORMS = ("{0}", "({0})", "[{0}]", "{0}.", "{0})", " {0} ", "**{0}**", "${0}$", r"\boxed{{{0}}}", "Option {0}",
                "option ({0})", "Choice {0}.", "The answer is {0}", "the correct answer is ({0}).", "It is {0}.",
                "I choose {0}", "（{0}）", r"$\text{{{0}}}$", r"\boxed{{\text{{{0}}}}}", "The answer is option {0}.",
                "The best option is {0}", "My answer is {0}")  # fmt: skip
TEXT_FORMS = (
    "{1}",
    "{1}.",
    "({1})",
    '"{1}"',
    "**{1}**",
    r"\boxed{{{1}}}",
    "It is {1}.",
    "It's {1}",
    "The answer is {1}",
)
BOTH_FORMS = ("{0}. {1}", "{0}) {1}", "({0}) {1}", "{0}: {1}", "{0} {1}", "{0} ({1})", "{0}, {1}", "{0} - {1}",
              "{1} ({0})",
              "Option {0}: {1}", "The answer is {0}. {1}", "**{0}.** {1}", "({0}) {1}.")  # fmt: skip


def worth(answer, right, kind, choices=(), *, others=(), frame=None, **more):
    one = sample(right, AnswerType(kind), choices, answers=(right, *others), **more)
    verdicts = verify_formulas(list_formulas(answer, one))
    return compare(answer, one, Context(frame=frame, verdicts=verdicts))


# Choices


@pytest.mark.parametrize("count", range(2, 9))
def test_every_choice_is_named_in_every_form(count):
    texts = COLOURS[:count]
    lettered = tuple(f"({letter}) {text}" for letter, text in zip(string.ascii_uppercase, texts, strict=False))
    for choices, (index, text) in itertools.product((texts, lettered), enumerate(texts)):
        for form in (*LETTER_FORMS, *TEXT_FORMS, *BOTH_FORMS):
            for letter in (string.ascii_uppercase[index], string.ascii_lowercase[index]):
                answer = form.format(letter, text)
                assert match_choice(answer, choices) == index, answer
                assert compare(answer, sample(choices[index], AnswerType.CHOICE, choices)) == 1
                assert compare(answer, sample(choices[index - 1], AnswerType.CHOICE, choices)) == 0


@pytest.mark.parametrize("count", range(2, 9))
def test_two_choices_and_negated_ones_are_none(count):
    choices = COLOURS[:count]
    forms = ("not {0}", "{0} or {1}", "{0} and {1}", "{0}, {1}", "{0}/{1}", "either {0} or {1}", "It is not {0}",
             "{0}{1}",
             "The answer is not {0}", "({0}) ({1})", "{0}. {1}", "option {0} or {1}", "not ({0})", "{0} {1}",
             "{0}; {1}",
             "all but {0}", "neither {0} nor {1}")  # fmt: skip
    for one, other in itertools.permutations(range(count), 2):
        letters = string.ascii_uppercase[one], string.ascii_uppercase[other]
        for form, names in itertools.product(forms, (letters, (choices[one], choices[other]))):
            assert match_choice(form.format(*names), choices) is None, form.format(*names)
        for form in BOTH_FORMS:  # the letter of one with the text of the other
            assert match_choice(form.format(letters[0], choices[other]), choices) is None


def test_letters_beyond_the_choices_name_none():
    for form, letter in itertools.product((*LETTER_FORMS, *BOTH_FORMS), "EZ"):
        assert match_choice(form.format(letter, "blue"), COLOURS[:4]) is None


@pytest.mark.parametrize(
    "answer, choices, index",
    [
        ("It is 27D.", ("27B", "37B", "27D", "27E"), 2), ("145", ("135°", "140°", "145°"), 2),
        ("12", ("10 cm", "12 cm"), 1), ("12 mm", ("10 cm", "12 cm"), None), ("1,000", ("100", "1000"), 1),
        ("0.5", ("1/2", "50%", "0.7"), None), ("a", ("a dog", "a cat"), 0), ("a cat", ("a dog", "a cat"), 1),
        ("Option B", ("Option B", "Option A"), 0), ("the left one", ("left", "right"), None),
        ("E", ("no",) * 4 + ("yes",), 4), ("None of the above", ("red", "None of the above"), 1),
        ("K", tuple(f"{n} km" for n in range(12)), 10), ("3/11", ("3/11", "8/11"), 0), ("6/22", ("3/11", "8/11"), 0),
    ],
)  # fmt: skip
def test_choices_that_are_numbers_or_look_like_letters(answer, choices, index):
    assert match_choice(answer, choices) == index


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=10), min_size=2, max_size=8, unique_by=normalise))
def test_any_answer_names_one_choice_or_none(answer, choices):
    found = match_choice(answer, choices)
    assert found is None or 0 <= found < len(choices)
    for index, choice in enumerate(choices):
        assert match_choice(choice, choices) == index


# Exact

EXACT = [
    ("yes", "Yes", 1), ("yes", "yes.", 1), ("yes", "**Yes**", 1), ("yes", "no", 0), ("no", "non", 0), ("no", "Na", 0),
    ("woman", "women", 0), ("man", "woman", 0), ("increase", "Decrease", 0), ("t-shirt", "t shirt", 0),
    ("t-shirt", "tshirt", 1), ("5-star", "5star", 1), ("left", "on the left", 0), ("left", "Left!", 1),
    ("dog", "a dog", 0), ("dog", "dogs", 0),
    ("light blue", "Light  Blue", 1), ("blue", "light blue", 0), ("true", "True", 1), ("true", "yes", 0),
    ("4:1", "4:1", 1), ("4:1", "41", 0), ("1.5", "15", 0), ("2010", "2011", 0), ("C++", "C", 0), ("-5", "5", 0),
    ("[2007, 2008]", "[2007, 2008]", 1), ("[2007, 2008]", "2007 and 2008", 0), ("St. John's", "St Johns", 1),
    ("B", "B", 1), ("B", "B.", 1), ("B", "(B)", 1), ("B", "B. blue", 1), ("B", "D", 0), ("B", "blue", 0), ("B", "b", 0),
    ("B", "not B", 0), ("B", "B or C", 0), ("B", "B. C", 0), ("B", "The answer is B.", 1), ("B", r"\boxed{B}", 1),
    ("(B)", "B", 1), ("(B) blue", "B", 1), ("(B) blue", "blue", 1), ("(B) blue", "B. blue", 1), ("A. red", "red", 1),
    ("(B) blue", "(B) red", 0), ("(B) blue", "(A) blue", 0), ("(B) blue", "A", 0), ("(B) blue", "red", 0),
]  # fmt: skip


@pytest.mark.parametrize("right, answer, value", EXACT)
def test_exact_answers(right, answer, value):
    assert worth(answer, right, "exact") == value


# Numbers

INTEGERS = [
    ("3", "3", 1), ("3", "3.0", 1), ("3", "3.", 1), ("3", "three", 0), ("3", "4", 0), ("1000", "1,000", 1),
    ("1,000", "1000", 1), ("2010", "2011", 0), ("2010", "2015", 0), ("1000", "1005", 0), ("4", "4.3", 0),
    ("4", "3.9999", 0), ("-5", "−5", 1), ("-5", "–5", 1), ("5", "-5", 0), ("12", "12 cm", 1), ("12 cm", "12", 1),
    ("12 cm", "12 mm", 0), ("$45", "45", 1), ("45", "45%", 0), ("3", "3 or 4", 0), ("3", "1/3", 0), ("2", "4/2", 1),
    ("1000", "1000 g", 0), ("5", "5k", 0), ("4.0", "4.01", 0), ("4.0", "4", 1),
    ("60", r"60^\circ", 1), ("60", r"$60^{\circ}$", 1), ("60", r"61^\circ", 0), ("12", r"12\text{ cm}", 1),
    ("12 cm", r"$12\,\mathrm{cm}$", 1), ("12 cm", r"12\text{ mm}", 0), ("1234", "1{,}234", 1), ("45", r"\$45", 1),
    ("12", r"12\text{ or }13", 0), ("5", "$5 and $6", 0), ("60", r"\boxed{60^\circ}", 1), ("3", r"\text{three}", 0),
]  # fmt: skip
RELAXED = [
    ("100", "104.9", 1), ("100", "105", 1), ("100", "105.1", 0), ("100", "95", 1), ("100", "94.9", 0),
    ("1234", "1200", 1),
    ("0.45", "45%", 1), ("45%", "0.45", 1), ("45%", "46%", 1), ("45%", "45", 0), ("45", "45%", 0), ("0", "0", 1),
    ("0", "0.0", 1), ("0", "0.01", 0), ("-3.5", "−3.5", 1), ("3.5", "-3.5", 0), ("3", "three", 0),
    ("12.5", "12.5 kg", 0),
    ("1.5", "1,5", 0), ("3.2", "3.2 million", 0), ("12", "12 (approx.)", 0), ("Yes", "yes", 1), ("Yes", "No", 0),
    ("China", "china", 1), ("China", "Chnia", 0), ("4:1", "4:1", 1), ("4:1", "4", 0), ("Increase", "Decrease", 0),
    ("[2007, 2008]", "[2007, 2008]", 1), ("[2007, 2008]", "2007, 2008", 0), ("45", r"\boxed{45}", 1),
    ("China", r"\boxed{China}", 1),
]  # fmt: skip
ROUNDED = [
    ("1.2", "1.2", 1), ("1.2", "1.20", 1), ("1.2", "1.25", 1), ("1.2", "1.26", 0), ("1.2", "1.15", 0),
    ("1.2", "1.3", 0),
    ("1.2", "-1.2", 0), ("0.6", "60%", 0), ("1.2", "1.2 cm", 0), ("1.2", "12", 0), ("-1.2", "−1.2", 1),
    ("1.2", "6/5", 0),
]  # fmt: skip


@pytest.mark.parametrize("right, answer, value", INTEGERS)
def test_whole_numbers(right, answer, value):
    assert worth(answer, right, "integer") == value


@pytest.mark.parametrize("right, answer, value", RELAXED)
def test_numbers_of_a_data_set_with_a_tolerance(right, answer, value):
    assert worth(answer, right, "number", tolerance=0.05) == value


@pytest.mark.parametrize("right, answer, value", ROUNDED)
def test_numbers_of_a_data_set_with_decimal_places(right, answer, value):
    assert worth(answer, right, "number", decimals=1) == value


def test_whole_numbers_of_a_data_set_with_decimal_places_are_plain_digits():
    assert [worth(answer, "1000", "integer", decimals=0) for answer in ("1000", "1000.0", "1,000", "1000 g",
    "1000.4")] == [
        1, 1, 0, 0, 0,
    ]  # fmt: skip


@given(st.integers(-(10**12), 10**12), st.integers(-3, 3))
def test_integers_are_right_at_no_distance_and_in_every_form(number, distance):
    for form in ("{}", "{:,}", "{}.", "**{}**", "{}.0", "The answer is {}."):
        answer = form.format(number + distance)
        for written in (answer, answer.replace("-", "−")):
            assert worth(written, str(number), "integer") == (distance == 0)


@given(st.decimals(1, 10**6, places=2), st.floats(-0.2, 0.2), st.floats(0.001, 0.1))
def test_a_number_is_right_within_the_tolerance_and_not_beyond(right, share, tolerance):
    answer = f"{float(right) * (1 + share):.6f}"
    off = abs(float(answer) - float(right)) / float(right)
    if abs(off - tolerance) > 1e-6:
        assert worth(answer, str(right), "number", tolerance=tolerance) == (off < tolerance)


# Annotators


TEN = ("stop", "go", "go", "go", "go", "go", "go", "go", "go", "go")
THREES = ("3",) * 4 + ("three",) * 4 + ("2",) * 2


@pytest.mark.parametrize("votes, answer, value", [
    (TEN, "stop", 0.3), (TEN, "go", 1), (TEN, "Go.", 1), (TEN, "the go", 1), (TEN, "halt", 0), (THREES, "three", 1),
    (THREES, "3", 1), (THREES, "two", 0.6), (("stop",) * 2 + ("go",) * 8, "stop", 0.6),
    (("x",) * 3 + TEN[3:], "x", 0.9),
    (("blue",) * 10, "blu", 0), (("yes",) * 10, "Yes, it is", 0), (("dont walk",) * 10, "don't walk", 1),
    (("the white house",) * 10, "White House", 1), (("t-shirt",) * 10, "t shirt", 1), (("1,000",) * 10, "1000", 1),
    (("4.5",) * 10, "45", 0), (("yes",), "yes", 1), (("yes",), "no", 0), (("a b", "c"), "a b", 0.5),
    (("a b",) * 2, "a b", 1),
])  # fmt: skip
def test_soft_accuracy_of_annotators(votes, answer, value):
    assert worth(answer, votes[0], "votes", others=votes[1:]) == pytest.approx(value)


@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=10, max_size=10), st.sampled_from(["red", "blue"]))
def test_soft_accuracy_is_the_mean_over_annotators(votes, answer):
    others = [votes[:index] + votes[index + 1 :] for index in range(10)]
    expected = sum(min(1, other.count(answer) / 3) for other in others) / 10
    assert worth(answer, votes[0], "votes", others=tuple(votes[1:])) == pytest.approx(expected)


# Formulas

FORMULAS = [
    ("60", "60°", 1), ("60°", "60", 1), (r"60^\circ", "60", 1), (r"2\sqrt{3}", "2√3", 1),
    (r"2 \sqrt { 221 }", r"2\sqrt{221}", 1),
    (r"\frac{3}{4}", "0.75", 1), (r"\frac{3}{4}", "3/4", 1), ("x=3", "3", 1), ("12", "12 cm", 1), ("[1, 2]", "1, 2", 1),
    ("[1, 2]", "[1,2]", 1), (r"5 \pi", "5π", 1), ("7.5", "15/2", 1), (r"2\sqrt{3}", "3.464", 0), ("1:3", "1/3", 0),
    ("1:3", "1:3", 1), ("1:3", "1 : 3", 1), ("4", "four", 0), ("No", "No.", 1), ("(0, 1]", "[0, 1]", 0), ("3", "-3", 0),
    (r"\frac{3}{4}", r"The answer is \boxed{\frac{3}{4}}.", 1),
    ("x²", "x^2", 1), ("10³", "1000", 1), ("10³", "100", 0), ("2⁻³", "1/8", 1), ("∞", r"\infty", 1), ("∞", "8", 0),
    (r"(-\infty, 3]", "(-∞, 3]", 1), ("–5", "-5", 1), ("−5", "-5", 1), ("–5", "5", 0), ("x–3", "x-3", 1),
    ("1e-3", "0.001", 1), ("1e-3", "10^{-3}", 1), ("1e-3", "0.01", 0), ("2·x", r"2\cdot x", 1),
    (r"30\%", "30", 0), (r"30\%", "0.3", 1), (r"30\%", "30 %", 1), (r"30\%", "30 percent", 1), ("30", "30%", 0),
    ("X", "x", 0), ("X", "X", 1), ("x+1", "X+1", 0), ("x+1", "1+x", 1), (r"\pi r^2", r"\pi R^2", 0), ("2x", "2X", 0),
    ("x+X", "X+x", 1), (r"\text{X}", "x", 0), ("E=mc^2", "E=mc²", 1), ("5xy", "5yx", 1), ("5xy", "5", 0),
    ("k+m", "m+k", 1), ("2mg+3ml", "3ml+2mg", 1), ("(1,234)", "1234", 0), ("1,234", "1234", 1), ("5 kg", "5 KG", 1),
    (r"5\text{ l}", "5 L", 1), (r"5\text{ m}", "5 meters", 1), (r"5\text{ h}", "5 hours", 1), (r"5\text{ m}", "5", 1),
    (r"5\text{ cm}^2", "5 cm²", 1), (r"5\text{ cm}^2", "5 cm^2", 1), (r"5\text{ cm}^2", r"5\text{ cm}^3", 0),
    (r"2\sqrt{3}\text{ cm}", "2√3 cm", 1), (r"2\sqrt{3}\text{ cm}", "2√3 mm", 0), (r"x=5\text{ cm}", "x = 5 mm", 0),
    (r"50\text{ km/h}", r"50\text{ km}/\text{h}", 1), (r"50\text{ km/h}", "50 m/s", 0), (r"12\text{ kg}", "12 g", 0),
]  # fmt: skip
UNITS = (
    "m",
    "km",
    "cm",
    "mm",
    "kg",
    "g",
    "mg",
    "s",
    "ms",
    "min",
    "h",
    "kN",
    "kPa",
    "MPa",
    "kW",
    "MW",
    "Hz",
    "kHz",
    "°C",
)


@pytest.fixture(scope="module")
def verdicts():
    """Verdicts on all of FORMULAS, of one process."""
    return verify_formulas([(answer, right) for right, answer, _ in FORMULAS])


@pytest.mark.parametrize("right, answer, value", FORMULAS)
def test_formulas(right, answer, value, verdicts):
    assert compare(answer, sample(right, AnswerType.MATHS), Context(verdicts=verdicts)) == value


@pytest.mark.parametrize(
    "form", [r"5\text{{ {}}}", r"$5\,\mathrm{{{}}}$", r"\boxed{{5 \text{{{}}}}}", "5 {}", "5{}", "5.0 {}."]
)
def test_a_formula_with_another_unit_is_another(form):
    for right, unit in itertools.product(UNITS, UNITS):
        answers = rf"5\text{{ {right}}}", form.format(unit)
        assert compare(answers[1], sample(answers[0], AnswerType.MATHS)) == (right == unit), answers


INVISIBLE = ("\u200b", "\u200e", "\ufeff", "\u00ad", "\u2060", "\u202a")


@pytest.mark.parametrize("kind, right", [
    ("number", "5.5"), ("integer", "5"), ("exact", "yes"), ("exact", "B"), ("text", "closed on 5 May"), ("votes", "go"),
    ("maths", "x+1"), ("box", "[1, 2, 3, 4]"), ("choice", "blue"), ("choice", "(B) blue"),
])  # fmt: skip
def test_what_is_not_seen_does_not_count(kind, right):
    for sign, place in itertools.product(INVISIBLE, (0, 1, len(right))):
        strange = right[:place] + sign + right[place:]
        choices = ("red", "blue", "(B) blue")
        for one, other in ((strange, right), (right, strange), (strange, strange)):
            assert (
                worth(one, other, kind, (*choices, strange) if kind == "choice" and other == strange else choices) == 1
            )
        if kind not in ("votes", "box", "choice"):
            assert guess_type([strange], ()) == guess_type([right], ())
    if kind in ("integer", "number"):
        assert worth(f"6{INVISIBLE[0]}", right, kind) == 0


def test_formulas_without_a_verdict_have_no_worth_but_for_equal_texts():
    one = sample("x+1", AnswerType.MATHS)
    assert [compare(answer, one) for answer in ("x+1", r"\boxed{x+1}", "1+x", "9" * 600)] == [1, 1, None, 0]


# Boxes

FRAME = Frame((1680, 1176), (840, 588))
"""The model sees the picture at half its sides."""
X, Y, W, H = 100, 80, 200, 120
RIGHT = str([2 * X, 2 * Y, 2 * W, 2 * H])
BOXES = [
    "100, 80, 200, 120", "[100, 80, 200, 120]", "100 80 200 120", "(100.0, 80.0, 200.0, 120.0)", "100,80,200,120 px",
    "100 px, 80 px, 200 px, 120 px", "The box is [100, 80, 200, 120].", r"\boxed{100, 80, 200, 120}",
    "x=100, y=80, width=200, height=120", "x: 100, y: 80, w: 200, h: 120",
    '{"x": 100, "y": 80, "width": 200, "height": 120}',
    "width=200, height=120, x=100, y=80", "left=100, top=80, right=300, bottom=200", "x1=100, y1=80, x2=300, y2=200",
    "xmin: 100, ymin: 80, xmax: 300, ymax: 200", '{"bbox_2d": [100, 80, 300, 200]}', "{'bbox_2d': [100, 80, 300, 200]}",
    '[{"bbox_2d": [100, 80, 300, 200], "label": "box 7"}]', '```json\n[{"bbox_2d": [100, 80, 300, 200]}]\n```',
    'bbox_2d: [100, 80, 300, 200]', "<|box_start|>(100,80),(300,200)<|box_end|>", "(100, 80), (300, 200)",
    "<box>(100,80),(300,200)</box>", "<box>[[100, 80, 300, 200]]</box>", "from (100, 80) to (300, 200)",
    "[0.11905, 0.13605, 0.35714, 0.34014]", '{"bbox_2d": [0.11905, 0.13605, 0.35714, 0.34014]}',
]  # fmt: skip
NO_BOXES = [
    "100, 80, 200", "100, 80, 200, 120, 5", "box", "",
    '{"bbox_2d": [1, 2, 3]}', "1. [100, 80, 200, 120] 2. [1, 2, 3, 4]",
    '[{"bbox_2d": [100, 80, 300, 200]}, {"bbox_2d": [1, 2, 3, 4]}]', "100, 80, 0, 120", "(300, 200), (100, 80)",
    "x=100, y=80, width=200", "x1=100, y1=80, width=200, height=120", "[100, 80, 200, 120] or [1, 2, 3, 4]",
    "x=100, x=80, width=200, height=120", "100; 80; 200; 120", "the 2 boxes are [100, 80, 200, 120]",
]  # fmt: skip


@pytest.mark.parametrize("answer", BOXES)
def test_a_box_is_read_in_every_form_that_says_its_order(answer):
    assert worth(answer, RIGHT, "box", frame=FRAME) == pytest.approx(1, abs=0.002)


@pytest.mark.parametrize("answer", NO_BOXES)
def test_what_is_no_single_box_is_worth_nothing(answer):
    assert worth(answer, RIGHT, "box", frame=FRAME) == 0


def test_numbers_alone_are_corner_and_sides_and_never_two_corners():
    for answer in ("[100, 80, 300, 200]", "(100, 80, 300, 200)", "100, 80, 300, 200"):
        assert worth(answer, RIGHT, "box", frame=FRAME) == pytest.approx(0.4)


# Right answers


@pytest.mark.parametrize("kind, right, more, good", [
    ("number", "12 cm", {}, True), ("number", "five", {}, False), ("number", "Yes", {"tolerance": 0.05}, True),
    ("integer", "3", {}, True), ("integer", "3.5", {}, False), ("integer", "4.0", {}, True), ("exact", "yes", {}, True),
    ("maths", "5 6", {}, False), ("maths", r"\frac12", {}, True), ("box", "[1.0, 2.0, 3.0, 4.0]", {}, True),
    ("box", "somewhere", {}, False), ("text", "closed", {}, True), ("judge", "It is red.", {}, True),
    ("judge", " ", {}, False),
    ("choice", "red", {"choices": ("red", "blue")}, True), ("choice", "pink", {"choices": ("red", "blue")}, False),
    ("choice", "A", {"choices": ("red", "blue")}, False), ("exact", "B", {}, True),
    ("number", "1.25", {"decimals": 1}, True),
])  # fmt: skip
def test_a_right_answer_that_is_never_paid_for_is_seen(kind, right, more, good):
    choices = more.pop("choices", ())
    assert can_be_right(sample(right, AnswerType(kind), choices, **more)) == good


@pytest.mark.parametrize("kind", ["text", "number", "exact"])
def test_many_right_answers_are_each_compared_with_few(kind, monkeypatch):
    compared, original = [], module._weigh
    monkeypatch.setattr(module, "_weigh", lambda *args: compared.append(args) or original(*args))
    row = replace(sample("0", AnswerType(kind)), answers=tuple(map(str, range(200))))
    assert can_be_right(row) and len(compared) <= 2 * 200


@given(st.text(max_size=30), st.sampled_from(AnswerType), st.sampled_from([None, 0.05]))
def test_what_is_read_as_right_is_paid_for(text, kind, tolerance):
    if not text.strip():
        return
    try:
        right = read_right(text, text, kind, tolerance=tolerance)
    except ValueError:
        return
    if kind not in (AnswerType.JUDGE, AnswerType.VOTES):
        assert compare(right, sample(right, kind, tolerance=tolerance)) == 1
    assert can_be_right(sample(right, kind, tolerance=tolerance)) or not right.strip()


@pytest.mark.parametrize("kind", ["number", "integer", "exact", "text", "maths", "choice"])
def test_a_label_before_a_right_answer_goes_and_before_an_answer_stays(kind):
    right = read_right("Answer: 42", "Answer: 42", AnswerType(kind))
    assert right == "42"
    assert worth("42", right, kind) == worth("The answer is 42.", right, kind) == 1
    assert worth("Answer: 42", right, kind) < 1


def test_a_judge_has_the_last_word_on_sentences():
    assert worth("It is red.", "It is red.", "judge") is None
