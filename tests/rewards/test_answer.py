"""The answer's reward: each type of answer, and what a hostile model may write."""

import json
import os
import resource
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rewards_rows import batch, failed, sample, trajectory

from thinkimg.answers.boxes import iou, read_box
from thinkimg.answers.choices import match_choice
from thinkimg.answers.numbers import read_number
from thinkimg.answers.similarity import anls
from thinkimg.answers.text import normalise
from thinkimg.records import AnswerType
from thinkimg.rewards.batch import Score, Status
from thinkimg.rewards.maths import WORKER, verify_formulas
from thinkimg.rewards.maths_worker import SECONDS
from thinkimg.rewards.rules.answer import score

HOSTILE = [
    "", " ", "\x00", "(" * 50_000 + ")" * 50_000, "x" * 200_000, " " * 200_000 + "x", "1" * 100_000, "1e999999999",
    "\ud7ff\U0010ffff",
    "á̖" * 2_000, "__import__('os').system('touch pwned')", "{{7*7}}${7*7}", "[" * 5_000, "nan", "inf", "-inf", "1/0",
    "0/0",
    "[1, 2, 3]", "[1,2,3,1e999]", "1 2 3 4 5", "null", '{"x": 1}', "٣", "½", "九",
]  # fmt: skip
IMAGE = Image.new("RGB", (112, 56))  # trajectories see it as 56 x 56


class Images:
    def decoded(self, sha256: str) -> Image.Image:
        return IMAGE


def answered(
    answer: str, right: str, kind: AnswerType, choices: tuple[str, ...] = (), others=(), tolerance: float = 0.01
) -> Score:
    one = sample(right, kind, choices, answers=(right, *others))
    return score(batch([trajectory(answer=answer)], one, Images(), answer={"number_tolerance": tolerance}))[0]


def test_no_answer_is_zero_with_a_reason():
    assert score(batch([failed(), trajectory()])) == [
        Score(0.0, Status.ZERO, "The conversation failed."),
        Score(0.0, Status.ZERO, "There is no answer (max_turns)."),
    ]


@pytest.mark.parametrize("kind", AnswerType)
def test_hostile_answers_are_judged_quickly_and_earn_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right = {"number": "7", "integer": "7", "box": "[1, 2, 3, 4]", "maths": "x+1"}.get(kind, "red")
    rows = [trajectory(answer=answer) for answer in HOSTILE]
    started = time.process_time()
    scores = score(batch(rows, sample(right, kind, ("red", "blue")), Images()))
    assert time.process_time() - started < 3
    assert {one.value for one in scores} <= ({None, 0} if kind is AnswerType.JUDGE else {0})
    assert all(one.reason and len(one.reason) < 100 for one in scores)
    assert os.listdir() == []


# Choices


@pytest.mark.parametrize(
    "answer", ["Red", " red. ", "A", "a", "(A)", "a)", "A.", "[a]", "A. red", "(a) Red!", "**RED**", '"red"', "A red"]
)
def test_a_choice_is_named_by_text_or_letter(answer):
    assert answered(answer, "red", AnswerType.CHOICE, ("red", "blue")).value == 1
    assert answered(answer, "A", AnswerType.CHOICE, ("red", "blue")).value == 1
    assert answered(answer, "blue", AnswerType.CHOICE, ("red", "blue")).value == 0


@pytest.mark.parametrize("answer", ["C", "B. red", "A or B", "red blue", "A blue", "not red", "(a) or (b)", "ab", "-"])
def test_what_names_no_choice_is_none(answer):
    found = answered(answer, "red", AnswerType.CHOICE, ("red", "blue"))
    assert found == Score(0.0, Status.ZERO, "The answer is none of the choices.")


def test_text_comes_before_letter_and_the_closer_reading_before_the_freer():
    assert match_choice("A", ("B", "A")) == 1 and match_choice("(a)", ("B", "A")) == 1
    assert match_choice("m2", ("m²", "m2")) == 1
    assert match_choice("(0, 1]", ("[0, 1]", "(0, 1]")) == 1
    assert match_choice("X", ("x", "X")) == 1 and match_choice("(X)", ("x", "X")) is None
    assert match_choice("-5", ("5", "-5")) == 1 and match_choice(".5", ("5", ".5")) == 1


words = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=8)


@given(st.lists(words, min_size=2, max_size=6, unique_by=normalise), st.data())
def test_every_choice_is_found_by_its_text_however_it_is_dressed(choices, data):
    index = data.draw(st.integers(0, len(choices) - 1))
    dress = data.draw(st.sampled_from(["{}", " {}\n", "({})", "{}.", "**{}**", '"{}".', "[({})]"]))
    assert match_choice(dress.format(choices[index]), choices) == index


@given(words, words)
def test_comparing_texts_is_symmetric(a, b):
    for dress in ("{}", "({}).", " {} "):
        assert (normalise(dress.format(a)) == normalise(b)) == (normalise(a) == normalise(dress.format(b)))


# Numbers


@pytest.mark.parametrize(
    "text, value",
    [("1,234.5", "1234.5"), ("50%", "0.5"), ("50 percent", "0.5"), ("1e3", "1000"), ("3/4", "0.75"),
     ("-3 / 4", "-0.75"), ("−5", "-5"),
     ("2 million", "2000000"), ("$1.5 million", "1500000"), ("12 cm.", "12"), ("(5)", "5"), ("**5**", "5"),
     (".5", "0.5"), ("5.", "5")],
)  # fmt: skip
def test_numbers_as_people_write_them(text, value):
    assert read_number(text).value == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["5 or 6", "1,5", "12,34", "1.2.3", "5²", "5⅓", "1_000", "0x10", "five", "x5", "1 234", "$5 cm", "--5", "3/0"],
)
def test_what_is_no_plain_number_is_not_guessed_at(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    "answer, right, value",
    [("101", "100.0", 1), ("101.01", "100.0", 0), ("99", "1e2", 1), ("98.99", "100.", 0), ("-100", "100.", 0),
     ("0", "0", 1), ("0.001", "0", 0),
     ("50", "50%", 0), ("0.5", "50%", 1), ("12", "12 cm", 1), ("12 cm", "12", 1), ("12 cm", "12 mm", 0), ("5k", "5", 0),
     ("5x", "5", 0),
     ("5k", "5k", 1), ("none", "None.", 1), ("5", "none", 0), ("1e999", "5", 0)],
)  # fmt: skip
def test_numbers_are_compared_within_the_tolerance(answer, right, value):
    assert answered(answer, right, AnswerType.NUMBER).value == value


def test_the_tolerance_is_a_setting():
    assert answered("101", "100", AnswerType.NUMBER, tolerance=0).value == 0
    assert answered("1/3", "2/6", AnswerType.NUMBER, tolerance=0).value == 1
    assert answered("149", "100.0", AnswerType.NUMBER, tolerance=0.5).value == 1


@pytest.mark.parametrize("right, answer, value", [
    ("1942", "1943", 0), ("1942", "1942.0", 1), ("100", "101", 0), ("12 cm", "12.1 cm", 0), ("1,234", "1234", 1),
    ("12.0 cm", "12.1 cm", 1), ("2 million", "2.01 million", 1), ("50 %", "50.1 %", 1), ("3/4", "0.751", 1),
])  # fmt: skip
def test_a_right_whole_number_is_compared_exactly(right, answer, value):
    assert answered(answer, right, AnswerType.NUMBER).value == value


@pytest.mark.parametrize("right, answer, value", [
    ("5", "5 millions", 0), ("5", "5 thousands", 0), ("5", "5 trillions", 0), ("5", "5 lakh", 0), ("5", "5 crore", 0),
    ("5", "5 MM", 0), ("5", "5 tenths", 0), ("5", "5 dozens", 0), ("5", "5 pct", 0), ("5", "5 percents", 0),
    ("5 million", "5 millions", 1), ("5 million", "$5 mn", 1), ("5 kg", "5 KG", 1), ("5 apples", "5 Apples", 1),
    ("5 m", "5 M", 0), ("5 M", "5 M", 1), ("5 km", "5 kilometers", 1), ("5 km", "5 meters", 0), ("5 h", "5 hrs", 1),
    ("5 MW", "5 mW", 0), ("5 \u00b5m", "5 \u03bcm", 1), ("-5", "–5", 1), ("5 kg", "5 g", 0),
])  # fmt: skip
def test_a_word_that_scales_a_number_is_no_unit(right, answer, value):
    assert answered(answer, right, AnswerType.NUMBER).value == value


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_every_decimal_is_read_exactly_with_and_without_commas(number):
    assert read_number(str(number)).value == read_number(f"{number:,}").value == Fraction(number)


# Texts


@given(st.text(max_size=20), st.text(max_size=20))
def test_anls_is_bounded_symmetric_and_cut_off(a, b):
    value, similarity = anls(a, b)
    assert anls(b, a) == (value, similarity)
    assert value == 0 or 0.5 < value == similarity <= 1
    assert anls(a, a) == (1, 1) == anls(a, f"  {a.upper().lower()} ") or a.casefold() != a.upper().lower().casefold()


def test_anls_of_known_texts():
    assert answered("kitten", "sitting", AnswerType.TEXT).value == pytest.approx(1 - 3 / 7)
    assert answered("abXX", "abcd", AnswerType.TEXT).value == 0  # exactly half of it is wrong
    assert answered("Coca  cola", "coca cola", AnswerType.TEXT).value == 1


@pytest.mark.parametrize("right, answer", [
    ("1942", "1943"), ("$1,350.00", "$1,250.00"), ("closed", "not closed"), ("10:30", "10:31"), ("Room 21", "Room 12"),
    ("15", "1.5"), ("12", "-12"), ("$12", "-$12"), ("1/8/93", "1/8/98"), ("sixteen", "sixty"), ("2½ cups", "2¼ cups"),
    ("10² km", "10³ km"), ("do not enter", "do enter"), ("parking allowed", "no parking allowed"), ("room 3", "room ٤"),
    ("room 21", "room"), ("version 2.10", "version 21.0"), ("it isn't open", "it is open"), ("A1B22", "A12B2"),
    ("Henry VIII", "Henry VII"), ("World War II", "World War I"), ("5 million", "5 billion"), ("10:30 am", "10:30 pm"),
    ("10 kg", "10 g"), ("$500", "€500"), ("Gate B", "Gate C"), ("fifth floor", "sixth floor"), ("5 hours", "5 years"),
    ("no exit no entry", "no exit, entry"), ("ouvert le soir", "pas ouvert le soir"), ("не курить", "курить"),
    ("two hundred", "two thousand"), ("no two signs", "two signs"), ("1.05", "1.5"), ("10 5", "105"),
    ("$1.2M", "$1.2B"), ("$1.2M", "$1.2"), ("20 MPa", "20 kPa"), ("5 N", "5 kN"), ("5N", "5kN"), ("10bn", "10mn"),
    ("UTC+1", "UTC-1"), ("UTC+1", "UTC -1"), ("2+3", "2-3"), ("±5 V", "+5 V"), ("x < 5", "x > 5"), ("3 A", "3 mA"),
    ("B2B", "B2C"), ("gate 5N", "gate 5S"), ("2 mg tablets", "2 ug tablets"), ("60 km/h", "60 mph"), ("£10m", "£10bn"),
    ("geöffnet am Abend", "nicht geöffnet am Abend"), ("kein Zutritt", "Zutritt"), ("Type A", "Type B"),
])  # fmt: skip
def test_digits_and_negations_are_not_forgiven_in_texts(right, answer):
    assert answered(answer, right, AnswerType.TEXT).value == answered(right, answer, AnswerType.TEXT).value == 0
    assert answered(answer, right, AnswerType.TEXT).evidence["similarity"] < 1


@pytest.mark.parametrize("right, answer, value", [
    ("$975.00", "975.00", 6 / 7), ("R. J. Reynolds", "Reynolds", 4 / 7), ("A. C. Monk", "A.C. Monk", 0.9),
    ("do not enter", "don't enter", 5 / 6), ("invoice no. 77", "invoice 77", 5 / 7), ("man", "woman", 0.6),
    ("2010-2011", "2010 - 2011", 9 / 11), ("the white house", "white house", 11 / 15), ("non-fat", "nonfat", 6 / 7),
    ("One Way", "Oneway", 6 / 7), ("Not Found", "Notfound", 8 / 9), ("1990-1995", "1990 -1995", 0.9),
    ("7-Eleven", "7 -Eleven", 8 / 9), ("UTC+1", "UTC 1", 0.8), ("F-16", "F16", 0.75), ("1920s", "1920", 0.8),
    ("10-12yrs", "10-12 years", 8 / 11), ("12 dogs", "12 dog", 6 / 7), ("3 x 4", "3 × 4", 0.8),
    ("24 hr", "24 hrs", 5 / 6),
    ("the 3 kgs bag", "the 3 kg bag", 12 / 13), ("30 metres", "30 meters", 7 / 9), ("60 km/h", "60 kmh", 6 / 7),
])  # fmt: skip
def test_else_texts_are_worth_what_anls_says(right, answer, value):
    assert answered(answer, right, AnswerType.TEXT).value == pytest.approx(value)


@pytest.mark.parametrize("right, answer", [
    (r"\boxed{red}", "red"), ("closed", r"$\boxed{closed}$."), ("closed", "(closed)"), ("yes", "Yes."),
    ("closed", "The answer is closed."), ("8.00 A.M.", "8:00 am"), ("1,234", "1234"), ("two dogs", "2 dogs"),
    ("3 cats", "٣ cats"), ("−5 °C", "-5 °C"), ("–5", "-5"), ("03/04/2010", "3/4/2010"), ("twenty-one", "21"),
    ("twenty-first", "21st"), ("$1.00", "$1"), ("don`t walk", "don't walk"), ("5 seconds", "five seconds"),
    ("Coca  cola", "coca cola"), ("closed", "closed"), ("$1.2M", "$1.2 million"), ("10bn", "10 billion"),
    ("$5k", "$5 thousand"),
])  # fmt: skip
def test_the_same_text_in_another_form_is_worth_all(right, answer):
    assert answered(answer, right, AnswerType.TEXT).value == answered(right, answer, AnswerType.TEXT).value == 1


@given(st.text("0123456789", min_size=1, max_size=8), st.text("0123456789", min_size=1, max_size=8), words)
def test_texts_with_other_digits_are_worth_nothing(digits, others, word):
    for form in ("{} {}", "{0}{1}", "{1}: {0}", "({0}) no. {1}"):
        right, answer = form.format(digits, word), form.format(others, word)
        worth = answered(answer, right, AnswerType.TEXT).value
        assert worth == 1 if digits == others else worth == 0 or int(digits) == int(others)


DRESSED = [r"\boxed{42}", "The answer is 42.", "The answer: 42", r"$\boxed{42}$", "So the answer is **42**."]


def test_what_stands_around_an_answer_does_not_count():
    for kind, choices in (
        (AnswerType.NUMBER, ()),
        (AnswerType.MATHS, ()),
        (AnswerType.TEXT, ()),
        (AnswerType.CHOICE, ("41", "42")),
    ):
        rows = [trajectory(answer=answer) for answer in [*DRESSED, "The answer isn't 42."]]
        for right in ("42", "41"):
            scores = score(batch(rows, sample(right, kind, choices), Images()))
            assert [one.value for one in scores] == [float(right == "42")] * len(DRESSED) + [0]


def test_the_best_of_several_right_answers_counts():
    for answer in ("red", "crimson", "scarlet"):
        assert answered(answer, "red", AnswerType.TEXT, others=("crimson", "scarlet")).value == 1


# Boxes


boxes = st.tuples(*[st.integers(0, 50)] * 2, *[st.integers(1, 50)] * 2)


@given(boxes, boxes, st.integers(-9, 9))
def test_iou_is_symmetric_bounded_and_moves_with_its_boxes(a, b, shift):
    def moved(box):
        return box[0] + shift, box[1], *box[2:]

    assert iou(a, b) == iou(b, a) == iou(moved(a), moved(b))
    assert 0 <= iou(a, b) <= 1
    assert (iou(a, b) == 1) == (a == b)


@given(boxes, boxes)
def test_iou_counts_pixels(a, b):
    def pixels(box):
        return {(x, y) for x in range(box[0], box[0] + box[2]) for y in range(box[1], box[1] + box[3])}

    assert iou(a, b) == pytest.approx(len(pixels(a) & pixels(b)) / len(pixels(a) | pixels(b)))


@pytest.mark.parametrize(
    "text", ["1, 2, 3, 4", "[1, 2, 3, 4]", "(1.0,2.0,3.0,4.0)", " 1 2 3 4 ", json.dumps([1.0, 2, 3, 4e0])]
)
def test_boxes_are_read_in_several_forms(text):
    assert read_box(text) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "text", ["1, 2, 3", "1, 2, 0, 4", "1, 2, -3, 4", "1, 2, 3, 4, 5", "a, b, c, d", "1e99, 2, 3, nan"]
)
def test_what_is_no_box_is_none(text):
    assert read_box(text) is None


def test_a_box_is_answered_in_pixels_as_the_model_sees_them():
    # The view is half as wide as the image and as high.
    found = answered("10, 20, 5, 10", "[20.0, 20.0, 10.0, 10.0]", AnswerType.BOX)
    assert found == Score(1.0, Status.OK, None, {"box": [20, 20, 10, 10], "right": [20, 20, 10, 10]})
    assert answered("20, 20, 10, 10", "[20.0, 20.0, 10.0, 10.0]", AnswerType.BOX).value == 0
    assert answered("1, 2, 3, 4", "somewhere", AnswerType.BOX).status is Status.MISSING


# Maths


def test_maths_answers_are_compared_as_formulas():
    equal = [("0.5", r"\frac{1}{2}"), (r"$2\sqrt{2}$", r"\sqrt{8}"), ("(x-1)*(x+1)", "x^2-1"), ("x**2", "x^2"),
             (r"\boxed{3}", "x=3"),
             (r"\{2, 1\}", r"\{1, 2\}"), ("0.333333", "1/3"), ("1.50", r"\frac32"), ("50\\%", "0.5"), ("blue.", "blue"),
             ("1 + x", "x+1")]  # fmt: skip
    different = [("0.51", r"\frac{1}{2}"), ("x^2+1", "x^2-1"), ("lube", "blue"), ("", "3"), ("x=", "3"), ("3", "]"),
                 ("yes", "Yes"), ("1/3", "1:3"), ("(1, 2)", "[1, 2]")]  # fmt: skip
    verdicts = verify_formulas(equal + different)
    assert [pair for pair in different if verdicts[pair].equal] == []
    assert [pair for pair in equal if not verdicts[pair].equal] == []


def test_a_formula_without_end_costs_two_seconds_and_not_its_neighbours():
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    endless = r"9^{9^{9^{9}}}"
    verdicts = verify_formulas(
        [(endless, "3"), (endless, "3"), ("4/2", "2"), ("(" * 240 + ")" * 240, "3"), ("x" * 501, "3")]
    )
    assert [pair for pair, verdict in verdicts.items() if verdict.equal] == [("4/2", "2")]
    assert verdicts[endless, "3"].reason == f"Comparing the formulas took more than {SECONDS:g} s of CPU time."
    assert "too long" in verdicts["x" * 501, "3"].reason
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started < 15


def test_the_worker_ends_with_its_parent_even_while_it_computes():
    with subprocess.Popen(
        [sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdin.write(json.dumps(["3", "9^{9^{9^{9}}}"]).encode() + b"\n")
        process.stdin.close()
        assert process.wait(60) < 0


def test_no_text_of_the_model_is_ever_compiled():
    code = """
import sys
from thinkimg.rewards.maths_worker import close_eval, verify_pair
close_eval()
compiled = []
sys.addaudithook(lambda event, args: compiled.append(str(args[0])) if event == "compile" else None)
sys.addaudithook(lambda event, args: sys.exit(event) if event in ("os.system", "subprocess.Popen") else None)
for text in ["__import__('os').system('id')", "4242+1", "1.4242", "4242.5", "4242\\\\%", "(4242)*(2)", "4242",
             "\\\\operatorname{eval}(4242)", "\\\\text{4242}", "$4242$"]:
    verify_pair("1/2", text)
    verify_pair(text, "1/2")
sources = [source for source in compiled if "4242" in source or "system" in source]
assert not sources, sources
assert verify_pair("8484.0", "4242 \\\\times 2.0") == (True, None)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
