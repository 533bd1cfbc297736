"""Checks before anything is stored: what is surely wrong is refused, what may be wrong is asked, the rest is told."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from survey_rows import FILES, Reads, row, survey_of

from thinkimg.data.settings import DataConfig
from thinkimg.data.survey.advice import common_kind, kind_of
from thinkimg.data.survey.box_checks import find_box_oddity
from thinkimg.data.survey.box_forms import FORMS, PlacedBox, count_fits, place_box
from thinkimg.data.survey.checks import Checker, find_oddities
from thinkimg.data.survey.oddity import Level, ask
from thinkimg.errors import UserError
from thinkimg.records import AnswerType

COLOURS = ("red", "blue", "green", "yellow")


def make(count=10, **values):
    """Return rows that are good, but for the values, which may be functions of a row's number."""
    return [
        row(
            i,
            Reads().reader(f"{i}.png", FILES[i % 60]),
            **{name: value(i) if callable(value) else value for name, value in values.items()},
        )
        for i in range(count)
    ]


def config(**data):
    return DataConfig(source="jsonl", path="a.jsonl", **data)


def oddities(rows, **data):
    return {one.name: one for one in find_oddities(rows, config(**data))}


def test_good_rows_have_no_oddity():
    rows = make(20, answer_type=AnswerType.CHOICE, choices=COLOURS, answers=lambda i: (COLOURS[i % 4],))
    assert oddities(rows) == {}
    assert oddities(make(20)) == {}


def beside_options(answer, question="Which?\nA. red\nB. blue\nC. green\nD. yellow"):
    kind = AnswerType.INTEGER if answer.isdigit() else AnswerType.TEXT
    return [*make(20), *make(1, id="x", question=question, answers=(answer,), answer_type=kind)]


@pytest.mark.parametrize(
    ("answer", "why"), [("0", "a number, or"), ("4", "a number, or"), ("B", "no opt"), ("b", "no o")]
)
def test_a_number_or_letter_beside_options_that_were_not_read_is_refused(answer, why):
    (refused,) = survey_of(beside_options(answer)).refused
    assert refused.reason == "choices" and why in refused.detail


@pytest.mark.parametrize(
    "question",
    ["A: 5\nB: 3\nWhat is A - B?", "A: Hello.\nB: Hi there!\nHow many people talk?", "(a) Who is it?\n(b) How many?"],
)
def test_a_number_is_an_answer_beside_what_is_no_option_above_their_number_or_where_the_user_says_so(question):
    assert set(oddities(beside_options("2", question))) == {"options_in_question"}
    assert not survey_of(beside_options("2", question)).refused and not survey_of(beside_options("5")).refused
    assert not survey_of(beside_options("2"), answer_type="integer").refused


REFUSED = {
    "placeholders": {"question": "<image>\nWhat is it?"},
    "right_scores_one": {"answers": ("many",), "answer_type": AnswerType.NUMBER},
    "options_in_question": {"question": "Which?\nA. red\nB. blue\nAnswer.", "answers": ("B",),
                            "answer_type": AnswerType.EXACT},
    "letters_in_options": {"choices": ("(B) red", "(A) blue"), "order": (1, 0), "answers": ("(A) blue",),
                           "answer_type": AnswerType.CHOICE},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_is_surely_wrong_is_refused_with_a_reason_and_counted(name):
    rows = make(20)
    rows[3] = make(4, **REFUSED[name])[3]
    surveyed = survey_of(rows, train=50, held_out=50)
    assert [refused.where for refused in surveyed.refused] == ["a.jsonl line 4"]
    assert surveyed.refused[0].detail and "row 3" not in surveyed.taken and len(surveyed.taken) == 19
    (oddity,) = surveyed.oddities
    assert (oddity.name, oddity.count, oddity.level) == (name, 1, Level.REFUSE)
    assert oddities(rows)[name] == oddity


@pytest.mark.parametrize(("answer_type", "right", "wrong"), [
    (AnswerType.NUMBER, "3/4", "three or four"), (AnswerType.INTEGER, "1,200", "1.5"), (AnswerType.INTEGER, "7", "x"),
    (AnswerType.BOX, "[1.0, 2.0, 3.0, 4.0]", "the left one"),
])  # fmt: skip
def test_the_right_answer_must_be_paid_for_under_its_own_type(answer_type, right, wrong):
    assert oddities(make(4, answer_type=answer_type, answers=(right,))) == {}
    found = oddities(make(4, answer_type=answer_type, answers=(wrong,)))
    assert found["right_scores_one"].count == 4


ASKED = {
    "one_place": (
        {"choices": lambda i: tuple(COLOURS[(i + k) % 4] for k in range(4)), "answers": lambda i: (COLOURS[i % 4],),
         "answer_type": AnswerType.CHOICE},
        [{"shuffle_choices": False}, {"shuffle_choices": True}],
    ),
    "sentences": (
        {"answers": lambda i: (f"The man on the left wears a hat of colour {i}.",)},
        [{"answer_type": "text"}],
    ),
    "letters_alone": (
        {"answers": lambda i: ("ABCD"[i % 4] if i % 2 else f"({'ABCD'[i % 4]}) red",), "answer_type": AnswerType.EXACT},
        [{"answer_type": "exact"}],
    ),
    "letters_alone in lower case": (
        {"answers": lambda i: ("abcd"[i % 4] if i % 2 else f"({'abcd'[i % 4]})",)},
        [{"answer_type": "exact"}],
    ),
    "other_kind of bare numbers": (
        {"answers": lambda i: (f"{i}, 2, 3{i}, 40" if i % 2 else f"x={i}, y=2, width=3, height=4",)},
        [{"answer_type": "text"}],
    ),
    "other_kind": (
        {"answers": lambda i: (f"({i},2),(3{i},40)" if i % 2 else f"[{{'Position': [{i}, 2, 3{i}, 40]}}]",)},
        [{"answer_type": "text"}],
    ),
    "test_split": (
        {"where": lambda i: f"data/test-00000.parquet row {i + 1}"},
        [{"role": "benchmark"}, {"files": "test-*"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_what_may_be_wrong_is_asked_before_a_picture_is_read_and_a_setting_answers(name):
    values, answers = ASKED[name]
    reads = Reads()
    rows = [
        row(i, reads.reader(f"{i}.png", FILES[i]), **{k: v(i) if callable(v) else v for k, v in values.items()})
        for i in range(30)
    ]
    with pytest.raises(UserError) as error:
        survey_of(rows)
    assert error.value.hint.startswith("Set data.") and not reads.count
    name = name.partition(" ")[0]
    assert oddities(rows)[name].level is Level.ASK and oddities(rows)[name].count == 30
    for setting in answers:
        assert all(one.level is not Level.ASK for one in oddities(rows, **setting).values())
        assert len(survey_of(rows, train=50, held_out=50, **setting).taken) == 30


def test_few_letters_are_no_lost_options_and_long_texts_are_as_bad_as_sentences():
    letters = make(4, answers=("B",), answer_type=AnswerType.EXACT)
    others = make(20, id=lambda i: f"other {i}")
    assert "letters_alone" not in oddities([*letters, *others])
    assert oddities([*letters, *others[:8]])["letters_alone"].count == 4
    assert oddities(make(10, answers=("word " * 60,)))["sentences"].level is Level.ASK


def test_few_answers_of_four_numbers_are_no_boxes_of_a_set():
    assert "other_kind" not in oddities([*make(4, answers=("1, 2, 3, 4",)), *make(16, id=lambda i: f"other {i}")])
    assert oddities([*make(5, answers=("1, 2, 3, 4",)), *make(16, id=lambda i: f"o {i}")])["other_kind"].count == 5
    orders = ("1, 2, 3, 4", "4, 3, 2, 1")
    assert "other_kind" not in oddities(make(20, answers=orders[:1], choices=orders, answer_type=AnswerType.CHOICE))


def test_several_right_options_and_a_first_one_that_is_never_right_are_told():
    values = {"answer_type": AnswerType.CHOICE, "choices": COLOURS}
    both = oddities(make(20, **values, answers=lambda i: (COLOURS[i % 4], COLOURS[(i + 1) % 4])))
    assert both["several_right"].count == 20 and both["several_right"].level is Level.WARN
    late = oddities(make(24, **values, answers=lambda i: (COLOURS[1 + i % 3],)))
    assert set(late) == {"never_first"} and "count from 1" in late["never_first"].sentence
    assert oddities(make(23, **values, answers=lambda i: (COLOURS[1 + i % 3],))) == {}
    assert oddities(make(24, **values, answers=lambda i: (COLOURS[i % 4],))) == {}


@pytest.mark.parametrize("name", ["bbox", "bboxes", "boxes", "box", "target"])
def test_a_column_of_boxes_that_is_not_used_is_told(name):
    rows = make(10, columns={name: [1, 2, 3, 4]})
    assert f"data.columns.target={name}" in oddities(rows)["unused_column"].sentence
    assert "unused_column" not in oddities(make(10, columns={name: [1]}, targets=((1.0, 2.0, 3.0, 4.0),)))


def test_a_column_that_lists_the_right_answer_among_others_may_be_options():
    lists = {"columns": lambda i: {"my_options": [f"thing {i}", "other"], "tags": ["other", "more"], "n": i}}
    found = oddities(make(10, **lists))
    assert set(found) == {"unused_column"} and "data.columns.choices=my_options" in found["unused_column"].sentence
    assert oddities([*make(2, **lists), *make(12)[2:]]) == {}
    assert oddities(make(10, **lists, answer_type=AnswerType.MATHS)) == {}
    both = oddities(make(10, columns=lambda i: {"answers": [f"thing {i}", "other"]}))
    assert "data.columns.answers" in both["unused_column"].sentence and "choices" not in both["unused_column"].sentence
    chosen = {"answer_type": AnswerType.CHOICE, "choices": COLOURS, "answers": lambda i: (COLOURS[i % 4],)}
    assert oddities(make(10, **chosen, columns=lambda i: {"tags": list(COLOURS)})) == {}


def test_one_place_is_found_in_one_of_two_tables_and_not_in_few_rows_or_shuffled_ones():
    first = ASKED["one_place"][0]
    mixed = {"choices": COLOURS, "answers": lambda i: (COLOURS[i % 4],), "answer_type": AnswerType.CHOICE}
    table = {"where": lambda i: f"vstar.jsonl line {i + 1}", "id": lambda i: f"v{i}"}
    found = oddities([*make(40, **mixed), *make(8, **first | table)])
    assert found["one_place"].count == 8 and "vstar.jsonl" in found["one_place"].sentence
    assert "one_place" not in oddities([*make(40, **mixed), *make(7, **first | table)])
    assert "one_place" not in oddities(make(40, **first | {"order": (2, 0, 3, 1)}))


@pytest.mark.parametrize(("name", "is_test"), [
    ("test.jsonl", True), ("data/test-00000-of-00001.parquet", True), ("val2017.json", True),
    ("testmini.parquet", True),
    ("VisualProbe_test.json", True), ("validation/metadata.csv", True), ("geoTest.jsonl", True), ("dev.json", True),
    ("train.jsonl", False), ("latest.jsonl", False), ("contest-train.jsonl", False), ("device.json", False),
    ("values.csv", False), ("attested.jsonl", False), ("evaluated_by_people.jsonl", False),
])  # fmt: skip
def test_a_split_for_testing_is_told_by_its_name(name, is_test):
    rows = make(4, where=lambda i: f"{name} line {i}")
    assert ("test_split" in oddities(rows)) is is_test
    assert "test_split" not in oddities(rows, role="benchmark")


TOLD = {
    "options_in_question": {"question": "Which?\nA. red\nB. blue"},
    "letters_in_options": {"choices": ("(A) red", "(B) blue"), "answer_type": AnswerType.CHOICE,
                           "answers": lambda i: (("(A) red", "(B) blue")[i % 2],)},
    "duplicate_question": {"question": "What is it?", "images": (Reads().reader("one.png", FILES[0]),)},
    "unused_column": {"columns": {"answers": ["a"]}},
    "heavy_text": {"changes": ("column 'trace' left out: above 4 KB",)},
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_what_only_looks_odd_is_told_with_its_count(name):
    found = oddities(make(10, **TOLD[name]))
    assert list(found) == [name] and found[name].level is Level.WARN
    assert found[name].count == (9 if name == "duplicate_question" else 10)
    ask(found.values())


def test_a_contradiction_is_told_apart_from_a_repetition():
    same = {"question": "What is it?", "images": (Reads().reader("one.png", FILES[0]),)}
    assert "9 of them with another right answer" in oddities(make(10, **same))["duplicate_question"].sentence
    assert "another" not in oddities(make(10, **same, answers=("a",)))["duplicate_question"].sentence


@pytest.mark.parametrize(("kind", "answer"), [("numbers", "7 cm"), ("yes or no", "Yes."), ("dates", "2020-01-02")])
def test_answers_of_another_kind_are_told_above_three_in_a_hundred(kind, answer):
    def answers(share):
        return make(100, answers=lambda i: (answer if i < share else f"thing {i} of many",))

    assert "other_kind" not in oddities(answers(3), answer_type="text")
    assert f"4 {kind}" in oddities(answers(4), answer_type="text")["other_kind"].sentence
    assert "exactly" in oddities(answers(95), answer_type="text")["other_kind"].sentence
    assert "other_kind" not in oddities(answers(95))  # each by its own kind
    assert kind_of(answer) == kind and common_kind([answer] * 9 + ["x"])[:2] == (9, kind)


def test_boxes_and_small_sides_are_looked_at_where_pictures_were_decoded():
    rows = make(6, targets=((0.1, 0.1, 0.8, 0.3),))
    assert oddities(rows) == {}
    found = {one.name: one for one in find_oddities(rows, config(), {one.id: [(640, 480)] for one in rows[:4]})}
    assert found["box_form"].count == 4 and "unit_xywh" in found["box_form"].sentence
    small = find_oddities(make(6), config(), {"row 1": [(640, 20)], "row 2": [(28, 28)], "row 3": [(9, 9), (90, 90)]})
    assert [(one.name, one.count) for one in small] == [("small_side", 2)]


sides = st.tuples(st.integers(30, 3000), st.integers(30, 3000))
numbers = st.floats() | st.integers(-100, 4000).map(float) | st.floats(-0.2, 1.2)


@given(st.tuples(*[numbers] * 4), st.sampled_from(FORMS), sides)
@settings(max_examples=300, deadline=None)
def test_a_placed_box_lies_inside_its_picture_or_there_is_none(box, form, size):
    placed = place_box(box, form, size)
    if placed is not None:
        x, y, width, height = placed
        assert 0 <= x < x + width <= size[0] and 0 <= y < y + height <= size[1]


INVERSE = {
    "xywh": lambda x, y, w, h, W, H: (x, y, w, h),
    "xyxy": lambda x, y, w, h, W, H: (x, y, x + w, y + h),
    "yxyx": lambda x, y, w, h, W, H: (y, x, y + h, x + w),
    "unit_xywh": lambda x, y, w, h, W, H: (x / W, y / H, w / W, h / H),
    "unit_xyxy": lambda x, y, w, h, W, H: (x / W, y / H, (x + w) / W, (y + h) / H),
    "thousandths_xyxy": lambda x, y, w, h, W, H: (1000 * x / W, 1000 * y / H, 1000 * (x + w) / W, 1000 * (y + h) / H),
}


@given(st.lists(st.tuples(sides, *[st.floats(0, 1)] * 4), min_size=1, max_size=30), st.sampled_from(FORMS))
@settings(max_examples=200, deadline=None)
def test_the_true_form_is_found_or_among_those_asked_about_and_never_another(rows, form):
    boxes, expected = [], []
    for (wide, high), a, b, c, d in rows:
        width, height = 2 + c * (wide - 2), 2 + d * (high - 2)
        x, y = a * (wide - width), b * (high - height)
        boxes.append(PlacedBox("a line 1", INVERSE[form](x, y, width, height, wide, high), (wide, high)))
        expected.append((x, y, width, height))
    assert count_fits(boxes)[form] == len(boxes)
    for box, right in zip(boxes, expected, strict=True):
        assert place_box(box.numbers, form, box.size) == pytest.approx(right, abs=1e-6)
    (oddity,) = find_box_oddity(boxes, config())
    assert oddity.form == form or (oddity.form is None and oddity.level is Level.ASK and form in oddity.sentence)


def test_shares_that_may_begin_with_a_centre_are_asked_about():
    boxes = [PlacedBox("a line 1", (0.5, 0.5, 0.2, 0.3), (640, 480))] * 9
    (asked,) = find_box_oddity(boxes, config())
    assert asked.level is Level.ASK and "YOLO" in asked.sentence and "unit_xywh" in asked.hint
    (found,) = find_box_oddity([*boxes, PlacedBox("a line 2", (0.1, 0.5, 0.7, 0.3), (640, 480))], config())
    assert found.form == "unit_xywh" and find_box_oddity(boxes, config(boxes="unit_xywh")) == []


values = st.recursive(st.none() | st.text(max_size=8) | st.integers(), lambda inner: st.lists(inner, max_size=3))


@given(st.text(min_size=1), st.lists(st.text(min_size=1), min_size=1, max_size=3), st.lists(st.text(), max_size=5),
       st.sampled_from(AnswerType), st.lists(st.integers(0, 4), max_size=4))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_whatever_a_row_holds_it_is_accepted_or_refused_with_a_reason(question, answers, choices, answer_type, order):
    checker = Checker(config())
    one = row(0, Reads().reader("a", b""), question=question, answers=tuple(answers), choices=tuple(choices),
              answer_type=answer_type, order=tuple(order))  # fmt: skip
    refused = checker.add(one, ["a"])
    assert refused is None or (refused.reason and refused.detail.isprintable())
    assert all(json.dumps([o.sentence, o.count]) for o in checker.oddities())


@pytest.mark.parametrize(
    "text",
    [
        "A. x\n" * 20_000,
        " " * 100_000,
        "[{" + "[1," * 50_000,
        "options" + " " * 100_000,
        "\n" * 100_000,
        "(" * 100_000 + "A",
    ],
)
def test_a_long_question_is_checked_at_once(text):
    """A search that starts anew at each character would take hours."""
    assert Checker(config()).add(row(0, Reads().reader("a", b""), question=text)) is None or True
    Checker(config()).add(row(0, Reads().reader("a", b""), answers=(text,)))
