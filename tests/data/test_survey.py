"""The survey: it decodes what it takes and little more, whatever it refuses; nothing looks the same on both sides."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from survey_rows import FILES, LIMITS, Reads, encode, picture, row, source_of, survey_of

from thinkimg.data.pictures import prints as pictures
from thinkimg.data.pictures.prints import Gallery, look_at
from thinkimg.data.refusal import Reason, Refused
from thinkimg.data.row import RawRow
from thinkimg.data.survey.survey import make_row_jobs
from thinkimg.errors import UserError
from thinkimg.images.decode import decode
from thinkimg.records import AnswerType


def rows_of(count: int, reads: Reads, bad=frozenset()) -> list[RawRow]:
    """Return rows of one picture each; those of `bad` rows are missing."""
    return [row(i, reads.reader(f"{i}.png", None if i in bad else FILES[i % 60])) for i in range(count)]


def distinct(count: int, reads: Reads) -> list[RawRow]:
    noise = np.random.default_rng(0).integers(256, size=(count, 8, 8, 3), dtype=np.uint8)
    files = [encode(Image.fromarray(one)) for one in noise]
    return [row(i, reads.reader(f"{i}.png", data)) for i, data in enumerate(files)]


def sides(surveyed) -> dict[str, str]:
    return {id: taken.sample.split for id, taken in surveyed.taken.items()}


def test_a_hundred_samples_cost_about_a_hundred_pictures(monkeypatch):
    """Of 2,000 rows 100 are for training and 100 held out: 210 pictures are decoded, and 200 read once more."""
    decoded = []
    monkeypatch.setattr(pictures, "decode", lambda *args: decoded.append(1) or decode(*args))
    monkeypatch.setattr("thinkimg.data.survey.survey.decode", lambda *args: decoded.append(1) or decode(*args))
    reads = Reads()
    rows = distinct(2000, reads)
    surveyed = survey_of(rows, train=100, held_out=100)
    assert Counter(sides(surveyed).values()) == {"train": 100, "held_out": 100}
    assert surveyed.accepted == 2000 and surveyed.looked == 210
    prepared = [job() for job in make_row_jobs(source_of(rows), surveyed.taken, LIMITS)]
    assert len(prepared) == 200 and len(decoded) == 210
    assert reads.count.total() == 410
    assert [one.sample.columns for one in prepared] == [
        {"number": i} for i in range(2000) if f"row {i}" in surveyed.taken
    ]


def test_a_draw_is_part_of_a_larger_one_and_its_seed_is_the_settings():
    rows = distinct(200, Reads())
    draws = [sides(survey_of(rows, train=count, held_out=20)) for count in (5, 20, 80)]
    assert draws[0].items() <= draws[1].items() <= draws[2].items()
    assert sides(survey_of(rows, train=20, held_out=20, seed=1)) != draws[1]
    assert sides(survey_of(rows[::-1], train=20, held_out=20)) == draws[1], "the order of the rows has no influence"
    assert [Counter(draw.values())["train"] for draw in draws] == [5, 20, 80]


@settings(deadline=None, max_examples=25)
@given(st.sets(st.integers(0, 59), max_size=50), st.integers(1, 30), st.integers(1, 15), st.integers(0, 5))
def test_whatever_pictures_are_missing_the_rest_is_taken_and_no_more_is_read_than_needed(bad, train, held_out, seed):
    reads = Reads()
    rows = rows_of(60, reads, bad)
    surveyed = survey_of(rows, train=train, held_out=held_out, seed=seed, max_refused=1)
    good = sides(survey_of(rows_of(60, Reads()), train=60, held_out=60, seed=seed))
    taken = sides(surveyed)
    assert not {f"row {i}" for i in bad} & taken.keys()
    assert {refused.where for refused in surveyed.refused} <= {f"a.jsonl line {i + 1}" for i in bad}
    assert max(reads.count.values()) == 1 and len(reads.count) == surveyed.looked
    for side, wanted in (("train", train), ("held_out", held_out)):
        left = [id for id, where in good.items() if where == side and int(id.split()[1]) not in bad]
        if left:  # a side of which all is missing is split anew
            assert sum(where == side for where in taken.values()) == min(wanted, len(left))
    assert all(good[id] == side for id, side in taken.items()) or not {"train", "held_out"} <= {
        side for id, side in good.items() if int(id.split()[1]) not in bad
    }


def test_too_many_missing_pictures_end_the_survey_before_all_are_read():
    reads = Reads()
    rows = rows_of(600, reads, set(range(0, 600, 2)))
    with pytest.raises(UserError, match=r"of 22 rows that were looked at are refused, .*for path; a.jsonl line"):
        survey_of(rows, train=10, held_out=10)
    assert len(reads.count) < 30
    with pytest.raises(UserError, match="300 of 600 rows are refused"):
        texts = [Refused(f"a line {i}", Reason.EMPTY, "x") if i % 2 else one for i, one in enumerate(rows)]
        survey_of(texts, train=10, held_out=10)


def test_rows_of_one_picture_stay_together_without_a_look_at_it():
    reads = Reads()
    rows = [row(i, reads.reader(f"{i // 4}.png", FILES[i // 4])) for i in range(80)]
    surveyed = survey_of(rows, train=80, held_out=80)
    where = {}
    for id, side in sides(surveyed).items():
        where.setdefault(int(id.split()[1]) // 4, set()).add(side)
    assert all(len(found) == 1 for found in where.values()) and len(where) == 20 == surveyed.groups
    assert len(surveyed.taken) == 80


VARIANTS = {
    "the same": lambda image: encode(image),
    "JPEG": lambda image: encode(image, "JPEG", quality=60),
    "half": lambda image: encode(image.resize((160, 120), Image.Resampling.LANCZOS)),
    "a third, WebP": lambda image: encode(image.resize((107, 80), Image.Resampling.BILINEAR), "WEBP", quality=50),
    "double": lambda image: encode(image.resize((640, 480), Image.Resampling.BICUBIC), "JPEG", quality=80),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_picture_is_found_again_however_it_was_written_and_others_are_not(variant):
    originals = [picture(seed, (320, 240)) for seed in range(12)]
    gallery = Gallery.of([look_at(encode(image), LIMITS) for image in originals])
    for image in originals:
        assert gallery.has(look_at(VARIANTS[variant](image), LIMITS))
    for seed in range(100, 130):
        assert not gallery.has(look_at(VARIANTS[variant](picture(seed, (320, 240))), LIMITS))
    assert not Gallery.of([]).has(look_at(FILES[0], LIMITS))


def test_slightly_other_pictures_are_told_apart_and_flat_ones_by_their_pixels():
    page = np.full((240, 320, 3), 255, np.uint8)
    page[40:60, 20:300] = 0
    marked = page.copy()
    marked[100:140, 100:160] = 0

    def look(levels):
        return look_at(encode(Image.fromarray(levels)), LIMITS)

    gallery = Gallery.of([look(page), look(page[100:])])  # the second one is flat
    assert gallery.has(look(page)) and gallery.has(look(page.repeat(2, 0).repeat(2, 1)))
    assert not gallery.has(look(marked)) and not gallery.has(look(page // 2))
    assert not gallery.has(look(page[:, :100])) and not gallery.has(look(page.repeat(2, 0)))  # of another shape
    assert gallery.has(look(page[100:])) and not gallery.has(look(page[101:])) and not gallery.has(look(page[100:] - 1))


def test_a_picture_that_is_held_out_is_left_out_of_training_and_the_next_row_is_taken():
    """Each picture twice under two names, once resized: whatever is held out is not trained on."""
    reads = Reads()
    files = [data for seed in range(20) for data in (VARIANTS["the same"](picture(seed, (320, 240))),
                                                     VARIANTS["half"](picture(seed, (320, 240))))]  # fmt: skip
    rows = [row(i, reads.reader(f"{i}.png", data)) for i, data in enumerate(files)]
    surveyed = survey_of(rows, train=40, held_out=40)
    by_side = {}
    for id, side in sides(surveyed).items():
        by_side.setdefault(side, set()).add(int(id.split()[1]) // 2)
    assert not by_side["train"] & by_side["held_out"]
    both = [refused for refused in surveyed.refused if refused.reason == "both_sides"]
    assert both and len(surveyed.taken) + len(both) == 40
    assert {o.name: o.count for o in surveyed.oddities}["both_sides"] == len(both)


def test_a_benchmark_is_held_out_as_a_whole():
    rows = [row(i, Reads().reader("one.png", FILES[0])) for i in range(30)]
    surveyed = survey_of(rows, role="benchmark", train=3, held_out=5)
    assert Counter(sides(surveyed).values()) == {"held_out": 30}
    with pytest.raises(UserError, match="one group"):
        survey_of(rows, train=3, held_out=5)


def boxed(boxes, size=(640, 480)):
    """Return rows with a box to look at, and a right answer that is the same box."""
    return [
        row(
            i, Reads().reader(f"{i}.png", encode(picture(i, size))), targets=(box,), answers=(str(list(box)),),
            answer_type=AnswerType.BOX,
        )
        for i, box in enumerate(boxes)
    ]  # fmt: skip


FORMS = {
    "xywh": [(10.0, 20.0, 300.0, 200.0), (400.0, 300.0, 240.0, 180.0), (5.0, 450.0, 630.0, 25.0)],
    "xyxy": [(330.0, 20.0, 635.0, 200.0), (400.0, 300.0, 640.0, 480.0)],
    "yxyx": [(20.0, 330.0, 200.0, 635.0), (300.0, 400.0, 480.0, 640.0)],
    "unit_xywh": [(0.5, 0.1, 0.4, 0.3), (0.1, 0.6, 0.9, 0.4)],
    "unit_xyxy": [(0.5, 0.5, 0.9, 0.8), (0.3, 0.6, 0.9, 1.0)],
    "thousandths_xyxy": [(500.0, 500.0, 900.0, 800.0), (100.0, 200.0, 990.0, 1000.0)],
}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_become_pixels_in_the_only_form_that_fits_or_a_question(form):
    from thinkimg.data.survey.box_forms import place_box

    rows = boxed(FORMS[form] * 4)
    stated = survey_of(rows, boxes=form, train=50, held_out=50)
    expected = [place_box(box, form, (640, 480)) for box in FORMS[form] * 4]
    got = {id: taken.sample for id, taken in stated.taken.items()}
    assert [got[f"row {i}"].targets[0] for i in range(len(rows))] == expected
    assert [got[f"row {i}"].answers[0] for i in range(len(rows))] == [str(list(box)) for box in expected]
    try:
        guessed = survey_of(rows, train=50, held_out=50)
    except UserError as error:
        assert form in error.message and "data.boxes=" in error.hint
        assert form in ("xyxy", "yxyx")  # numbers below 1000 may always be thousandths
    else:
        assert {id: taken.sample for id, taken in guessed.taken.items()} == got
        (oddity,) = (one for one in guessed.oddities if one.name == "box_form")
        assert oddity.form == form and oddity.count == 2 * len(rows)


def test_a_box_outside_of_its_picture_is_refused_in_the_stated_form_and_asked_about_otherwise():
    rows = boxed([(10.0, 20.0, 300.0, 200.0)] * 8 + [(500.0, 20.0, 300.0, 200.0)], size=(640, 480))
    surveyed = survey_of(rows, boxes="xywh", max_refused=0.5, train=50, held_out=50)
    assert [(one.where, one.reason) for one in surveyed.refused] == [("a.jsonl line 9", "target")]
    assert "does not lie inside its picture of 640x480" in surveyed.refused[0].detail
    rows += boxed([(600.0, 20.0, 300.0, 1200.0)])
    rows = [row(i, one.images[0], targets=one.targets) for i, one in enumerate(rows)]
    with pytest.raises(UserError, match="In no form do all 10 boxes lie inside") as error:
        survey_of(rows, max_refused=0.5, train=50, held_out=50)
    assert "data.boxes" in error.value.hint


def test_a_box_of_one_of_several_pictures_is_refused():
    boxes = boxed([(10.0, 20.0, 300.0, 200.0)] * 8, size=(640, 480))
    rows = [
        replace(one, targets=(), answer_type=AnswerType.BOX, answers=("[10, 20, 300, 200]",), images=one.images * count)
        for one, count in zip(boxes, [1] * 7 + [2], strict=True)
    ]
    surveyed = survey_of(rows, boxes="xywh", max_refused=0.5, train=50, held_out=50)
    assert [(one.where, one.reason) for one in surveyed.refused] == [("a.jsonl line 8", "answer")]


def test_more_rows_move_few_of_the_others():
    reads = Reads()
    rows = distinct(220, reads)
    before = sides(survey_of(rows[:200], train=300, held_out=300))
    after = sides(survey_of(rows, train=300, held_out=300))
    assert len(before) == 200 and len(after) == 220
    assert sum(after[id] != side for id, side in before.items()) <= 12


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.integers(0, 9)), min_size=12, max_size=30))
def test_no_group_and_no_picture_of_rows_without_one_is_on_both_sides(kinds):
    rows = [
        row(i, Reads().reader(f"{picture}.png", FILES[picture]), group=group)
        for i, (group, picture) in enumerate([*kinds, ("d", 10), (None, 11)])
    ]
    surveyed = survey_of(rows, train=50, held_out=50, max_refused=1)
    where, seen = {}, {}
    for id, taken in surveyed.taken.items():
        one = rows[int(id.split()[1])]
        where.setdefault(one.group or one.images[0].key, set()).add(taken.sample.split)
        seen.setdefault(taken.sample.images, set()).add(taken.sample.split)
    assert all(len(found) == 1 for found in (*where.values(), *seen.values()))
