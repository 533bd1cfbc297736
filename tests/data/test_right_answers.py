"""Right answers are read by one rule, the reward's own; and what can be read in two ways is refused."""

import itertools
import json
import re

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from rewards_rows import batch, sample, trajectory

from thinkimg import records
from thinkimg.answers.numbers import read_number
from thinkimg.answers.text import BOXED
from thinkimg.data.refusal import Refused
from thinkimg.data.row import RawRow
from thinkimg.data.settings import Columns, DataConfig
from thinkimg.data.source import raw_row
from thinkimg.records import AnswerType, Sample, to_row
from thinkimg.rewards.rules.answer import score


def read(answer, answer_type="text", choices=None, *, answer_is="any", **more):
    """Return the row of a record with this answer, or the Refused."""
    columns = Columns(choices=None if choices is None else "choices", **{name: name for name in more})
    data = DataConfig(source="jsonl", path="x.jsonl", answer_type=answer_type, answer_is=answer_is, columns=columns)
    record = {"image": b"x", "question": "?", "answer": answer, "choices": choices, **more}
    return raw_row(record, data, lambda value: lambda: value, id="1", where="line 1")


def right(answer, answer_type="text", choices=None, **more):
    row = read(answer, answer_type, choices, **more)
    return f"refused: {row.reason}" if isinstance(row, Refused) else row.answers[0]


class Images:
    def decoded(self, sha256):
        return Image.new("RGB", (56, 56))  # as large as trajectories see it


def worth(answer, row):
    one = sample(row.answers[0], row.answer_type, row.choices, answers=row.answers)
    return score(batch([trajectory(answer=answer)], one, Images()))[0].value


# Options in every form that people store

COLOURS = ["red", "blue", "green", "yellow"]
LETTERED = dict(zip("ABCD", COLOURS, strict=True))
OPTIONS = {
    "list": COLOURS, "JSON": json.dumps(COLOURS), "repr": str(COLOURS), "object": LETTERED,
    "JSON object": json.dumps(LETTERED), "repr of an object": str(LETTERED),
    "objects": [{"label": letter, "text": text} for letter, text in LETTERED.items()],
    "lines": "\n".join(f"{letter}. {text}" for letter, text in LETTERED.items()),
    "in line": " ".join(f"({letter}) {text}" for letter, text in LETTERED.items()),
    "lettered list": [f"{letter}) {text}" for letter, text in LETTERED.items()],
}  # fmt: skip


@pytest.mark.parametrize("form", OPTIONS)
@pytest.mark.parametrize("index", range(4))
def test_the_right_option_is_that_of_its_letter_index_or_text_or_the_row_is_refused(form, index):
    for answer in ("ABCD"[index], "abcd"[index], f"({'ABCD'[index]})", COLOURS[index], index):
        row = read(answer, "auto", OPTIONS[form])
        assert (row.choices, row.answers) == (tuple(COLOURS), (COLOURS[index],)), answer
    row = read(str(index), "auto", OPTIONS[form])
    assert isinstance(row, Refused) or row.answers == (COLOURS[index],)
    assert isinstance(read(str(index + 4), "auto", OPTIONS[form]), Refused)


@pytest.mark.parametrize("answer", ["1", 1])
def test_written_out_choices_keep_the_doubt_between_text_and_index(answer):
    assert right(answer, "auto", '["1", "2"]') == "refused: answer"
    assert right(answer, "auto", "1. red\n2. blue") == "refused: choices"
    assert right(answer, "auto", '["1", "2"]', answer_is="text") == "1"
    assert right(answer, "auto", '["1", "2"]', answer_is="index") == "2"


@pytest.mark.parametrize("marks", [[0, 1, 0], [1.0, 0.0, 0.0], [True, False, False], [1, 1, 0], [0, 1], [0, 1, 0, 0]])
def test_a_mark_for_each_choice_is_no_list_of_indices_until_the_user_says_so(marks):
    row = read(marks, "auto", ["cat", "dog", "cow", "pig"][: len(marks)])
    assert isinstance(row, Refused) and row.reason == "answer" and "set data.answer_is=index" in row.detail
    assert read([0, 2], "auto", ["cat", "dog", "cow"]).answers == ("cat", "cow")
    assert read([0, 1], "auto", ["cat", "dog"], answer_is="index").answers == ("cat", "dog")


@pytest.mark.parametrize("form", ["{}. {}", "({}) {}", "{}) {}", "[{}] {}", "{}: {}"])
@pytest.mark.parametrize("answer", [1, 2, "1", "2"])
def test_the_own_numbers_of_choices_are_no_indices(form, answer):
    choices = [form.format(number, colour) for number, colour in enumerate(COLOURS[:3], 1)]
    if isinstance(answer, int):
        assert "by own number" in read(answer, "auto", choices).detail
        assert right(answer, "auto", choices, answer_is="index") == choices[answer]
    for answer_is in ("any", "letter") if isinstance(answer, str) else ("letter",):
        assert right(answer, "auto", choices, answer_is=answer_is) == choices[int(answer) - 1]
    from_zero = [form.format(number, colour) for number, colour in enumerate(COLOURS[:3])]
    assert right(answer, "auto", from_zero) == from_zero[int(answer)]


@pytest.mark.parametrize(
    "choices", [["1.5 m", "2.5 m"], ["2. red", "1. blue"], ["1. red", "blue"], ["5. red", "6. blue"]]
)
def test_numbers_that_do_not_count_the_choices_are_no_names_of_these(choices):
    assert right(1, "auto", choices) == choices[1] and right("1", "auto", choices) == "refused: answer"


def test_one_of_ten_annotators_may_say_nan():
    assert read(["stop"] * 9 + ["nan"], "auto").answers == (*["stop"] * 9, "nan")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("", "empty"), (" ", "empty"), (None, "empty"), ([], "empty"), (["cat", ""], "empty"), (["cat", None], "empty"),
     ("nan", "empty"), (["cat", "NaN"], "empty"), (float("nan"), "empty"), ([["cat"], ["dog"]], "text"),
     ({"text": "cat"}, "text"), ([{"answer": "cat"}], "text"), ([1, 2, "x", [3]], "text")],
)  # fmt: skip
def test_an_answer_of_nothing_or_of_no_text_is_refused_by_its_columns_name(answer, reason):
    row = read(answer, "auto")
    assert isinstance(row, Refused) and row.reason == reason and row.detail.startswith("answer ")


# Numbers

HANDED = ["3/4", "12 cm", "$5", "2 million", "−3", "2 2/3", r"\boxed{42}", "1_000", "1,5", "1 000", "2 5/3", "٣", "½"]
pieces = st.sampled_from(
    ["-", "−", "+", "$", "€", "1", "23", "1,234", "12,34", "1_000", "0", ".5", "4.", "1.5", "e3", "E-2", "/", " / ",
     "3", " ", "%", " %", " percent", " million", " cm", "km/h", "x", "²", "⅓", "٣", "(", ")", "**", ".", ",", "~",
     " or ", "The answer is ", r"\boxed{", "}", "nan", "inf", "0x1", "\u2028", "\x00"]
)  # fmt: skip
numbers = st.lists(pieces, min_size=1, max_size=6).map("".join) | st.sampled_from(HANDED) | st.text(max_size=8)


@given(numbers)
@settings(max_examples=500, deadline=None)
def test_prepare_takes_what_the_reward_reads_as_a_number_and_nothing_else(text):
    assume("boxed" not in text or BOXED.fullmatch(text.strip()))  # else a solution, of which the box is the answer
    row = read(text, "number")
    if not text.strip():
        assert isinstance(row, Refused)
        return
    assert isinstance(row, RawRow) == (read_number(text) is not None)
    if isinstance(row, RawRow):
        assert read_number(row.answers[0]) == read_number(text)  # and to the same value
        assert worth(text, row) == 1


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_number_of_json_is_the_number_that_its_digits_say(value):
    row = read(value, "number")
    if isinstance(row, RawRow):
        assert type(value)(read_number(row.answers[0]).value) == value
    else:
        assert len(str(value)) > 60


@pytest.mark.parametrize("text", HANDED)
def test_each_handed_number(text):
    reads = text in HANDED[:7]
    assert right(text, "number") == (text.removeprefix("\\boxed{").strip("}") if reads else "refused: answer")


def test_mixed_numbers_are_sums_in_both_types():
    for kind in (AnswerType.NUMBER, AnswerType.MATHS):
        one = sample("2 2/3", kind)
        answers = ["8/3", "4/3", "2 2/3", "-8/3"]
        scores = score(batch([trajectory(answer=answer) for answer in answers], one, answer={"number_tolerance": 0}))
        assert [found.value for found in scores] == [1, 0, 1, 0]
    one = sample("12", AnswerType.MATHS)
    scores = score(batch([trajectory(answer=answer) for answer in ("3 4", "24 1/2", "1.5 8", "24/2")], one))
    assert [found.value for found in scores] == [0, 0, 0, 1]


def test_what_no_formula_can_match_is_refused():
    for text in ("5 6", "10 000", "2 5/3", "))((", "?"):
        assert right(text, "maths") == "refused: answer"
    for text in ("x^2 + 2 x", "2 2/3", "2⅔", "60°", "2√3", r"2\frac{2}{3}", "blue", "(0, 1]", "B"):
        assert right(text, "maths") == text


def test_signs_of_formulas_are_read():
    for one, other in (("2⅔", "8/3"), ("2⁄3", "4/6"), ("60°", "60"), ("60", r"60^\circ"), ("2√3", r"2\sqrt{3}")):
        scores = score(batch([trajectory(answer=other), trajectory(answer="7")], sample(one, AnswerType.MATHS)))
        assert [found.value for found in scores] == [1, 0]


def test_a_right_box_is_stored_as_the_reward_reads_it():
    assert right("(1, 2, 3e1, 4)", "box") == right([1, 2, 30.0, 4], "box") == "[1.0, 2.0, 30.0, 4.0]"
    for box in ("1e12, 1, 2, 3", [1, 2, 0, 4], [1, 2, 3, float("inf")], [1, 2, True, 4], "1, 2, 3"):
        assert right(box, "box") == "refused: answer"


# Choices

LISTS = [
    ["1", "2", "3"], ["3", "2", "1"], ["0", "1"], [1, 2, 3], [0, 1, 2], [10, 20, 30], [1.5, 2.5], ["red", "blue", "1"],
    ["A", "B", "C"], ["B", "A"], ["b", "red"], ["(B) blue", "(A) red"], ["A. x", "B. y"], ["Yes", "No"], [True, False],
    ["True", "False"], ["1.0", "2.0"], ["2009", "2010"], ["a" * 70, "b"], ["one", "two", "A", "B"],
    [1, 2, 3, "None of these"], ["More than 2", 2, 1, 0],
]  # fmt: skip
ANSWERS = [0, 1, 2, 3, -1, 10, 2010, 1.0, 0.0, 1.5, True, False, "0", "1", "2", "A", "B", "b", "(A)", "B.", "A. red",
           "red", "Blue", "blue.", "Yes", "no", "True", "2010", "B) blue", " C ", "D", "Z", "1.0", "one"]  # fmt: skip


def plain(choice):
    return str(int(choice)) if isinstance(choice, float) and choice.is_integer() else str(choice)


def unlettered(choice):
    """Return a choice without the letter that prepare takes away."""
    return re.sub(r"^\(?[A-Za-z][).] ", "", choice)


def readings(answer, choices):
    """Return index -> choice by each reading that somebody may have meant, computed otherwise than by the code."""
    texts, meant = [plain(choice) for choice in choices], {}
    is_number = not isinstance(answer, bool | str)
    numeric = any(not isinstance(choice, bool | str) for choice in choices)
    digits = isinstance(answer, str) and answer.isdigit() and numeric  # no type says what it is
    if (is_number or digits) and float(answer).is_integer() and 0 <= int(answer) < len(choices):
        meant["index"] = texts[int(answer)]
    if not is_number or numeric:
        fits = [text for text in texts if text.strip("(). ").lower() == plain(answer).strip("(). ").lower()]
        meant |= {"text": fits[0]} if fits else {}
    if isinstance(answer, str) and len(letter := answer.strip("(). ")) == 1 and letter.isalpha():
        heads = (letter.lower() + ")", letter.lower() + ".")
        own = [text for text in texts if text.lstrip("(").lower().startswith(heads)]
        place = ord(letter.upper()) - ord("A")
        if own:
            meant["letter"] = own[0]
        elif 0 <= place < len(texts):
            meant["letter"] = texts[place]
    return meant


def test_every_form_of_answer_with_every_list_of_choices():
    for choices, answer in itertools.product(LISTS, ANSWERS):
        found, meant = right(answer, "choice", choices), readings(answer, choices)
        if found.startswith("refused"):
            compound = isinstance(answer, str) and len(answer.strip("(). ")) > 1
            assert len(set(meant.values())) != 1 or compound, (choices, answer, found, meant)
        else:
            assert {unlettered(text) for text in meant.values()} <= {unlettered(found)}, (choices, answer, found, meant)


@pytest.mark.parametrize("choices", [["1", "2", "3"], ["2", "3", "1"], ["a", "b", "c"], ["2010", "2011", "2012"]])
def test_an_integer_into_choices_is_an_index(choices):
    assert [right(index, "choice", choices) for index in range(3)] == choices
    assert [right(float(index), "choice", choices) for index in range(3)] == choices
    assert right(3, "choice", choices) == right(-1, "choice", choices) == "refused: answer"


def test_what_may_be_two_choices_is_refused_until_the_data_say_what_they_mean():
    for answer, choices, by in (
        (1, [1, 2, 3], {"text": "1", "index": "2"}),
        ("1", [1, 2, 3], {"text": "1", "index": "2"}),
        ("A", ["B", "A"], {"text": "A", "letter": "B"}),
        (2, [1, 2, 3, "None of these"], {"text": "2", "index": "3"}),
        ("0", '["2", "0", "1", "3"]', {"text": "0", "index": "2"}),
    ):
        refused = read(answer, "choice", choices)
        assert refused.reason == "answer" and "data.answer_is" in refused.detail
        for form, choice in by.items():
            assert f"by {form} '{choice}'" in refused.detail
            assert right(answer, "choice", choices, answer_is=form) == choice
    assert right("1", "choice", ["x", "y"], answer_is="index") == "y"
    assert right("1", "choice", '["x", "y"]') == "y" and right("1", "choice", '["0", "1"]') == "1"  # as CSV has it
    assert "data.answer_is=text fits" in read(2010, "choice", ["2009", "2010"]).detail
    assert right(2010, "choice", ["2009", "2010"], answer_is="text") == "2010"


def test_further_answers_are_read_as_the_first_is():
    assert read("A", "choice", ["x", "y"], answers=["y", 0, "B"]).answers == ("x", "y")  # each once
    assert read("1", "number", answers=["3/4", "2 cm"]).answers == ("1", "3/4", "2 cm")
    assert read([1, 2, 3, 4], "box", answers=[[5, 6, 7, 8], "1,2,3,4"]).answers[1] == "[5.0, 6.0, 7.0, 8.0]"
    for first, answer_type, answers in (
        ("1", "number", ["many"]), ([1, 2, 3, 4], "box", [[1, 2, 3]]),
        ("a", "text", [{"no": "text"}]), ("a", "text", [None, "b"]),
    ):  # fmt: skip
        assert isinstance(read(first, answer_type, answers=answers), Refused)


def test_whole_numbers_are_compared_exactly():
    assert worth("1943", read("1942", "number")) == 0 and worth("1942.0", read("1942", "number")) == 1


# Whatever is accepted

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**18, 10**5000) | st.floats() | st.text() | numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
boxes = st.lists(st.integers(-9, 10**20) | st.floats(), min_size=4, max_size=4)


@given(values | boxes, values | boxes, st.lists(values, max_size=4), st.sampled_from(AnswerType), st.data())
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_sample_that_can_be_stored_and_answered_or_a_reason(answer, target, choices, answer_type, data):
    answer = data.draw(st.sampled_from([answer, *choices, 0, 1, "A"])) if choices else answer
    check(answer, target, choices, answer_type)


def test_a_target_of_large_integers_can_be_stored():
    check("a", [0, 0, 10**17 + 1, 5], [], AnswerType.TEXT)
    assert read("a", target=[0, 0, 10**400, 5]).reason == "target"


def check(answer, target, choices, answer_type):
    """Read a record; what is accepted can be stored, and is worth 1 when the model writes it."""
    row = read(answer, answer_type, choices or None, target=target, answers=choices[:1])
    if isinstance(row, Refused):
        assert row.reason and row.detail and f"{row.where}{row.detail}".encode()
        return
    stored = Sample("s", row.question, row.answers, row.answer_type, row.choices, ("ab" * 32,), "x", "train",
                    columns=row.columns, targets=row.targets)  # fmt: skip
    table = pa.Table.from_pylist([to_row(stored)], records.sample_schema())
    assert json.loads(table["columns"][0].as_py()) == row.columns
    others = (AnswerType.MATHS, AnswerType.JUDGE, AnswerType.VOTES)  # a process, a model, and several annotators
    if answer_type not in others:
        assert worth(row.answers[0], row) == 1
