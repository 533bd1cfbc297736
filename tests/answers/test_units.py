"""Boxes in both units: what a prompt asks for is what is read, and its worth does not depend on the unit."""

import json
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rewards_rows import batch, sample, trajectory

from thinkimg.answers.boxes import iou, read_stated_box
from thinkimg.answers.compare import Context, compare
from thinkimg.conversation.question import state_form, state_question, state_size
from thinkimg.images.coordinates import Frame
from thinkimg.images.settings import ViewLimits
from thinkimg.images.view import view_size
from thinkimg.records import AnswerType, Coordinates
from thinkimg.rewards.rules.answer import score

PIXELS, THOUSANDTHS = Coordinates.PIXELS, Coordinates.THOUSANDTHS
FORMS = {
    "{x}, {y}, {w}, {h}": "corner and sides",
    "x={x}, y={y}, width={w}, height={h}": "named",
    '{{"bbox_2d": [{x}, {y}, {right}, {bottom}]}}': "as Qwen3-VL writes them",
    '```json\n[{{"bbox_2d": [{x}, {y}, {right}, {bottom}], "label": "cup"}}]\n```': "the same in a fence",
    "<|box_start|>({x},{y}),({right},{bottom})<|box_end|>": "corners",
    "({x}, {y}), ({right}, {bottom})": "points",
}


def test_sizes_and_forms_are_stated_in_the_unit():
    box = sample("[1, 2, 3, 4]", AnswerType.BOX)
    assert state_form(box, PIXELS) == "Answer with x, y, width, height in pixels of image 0."
    assert state_form(box, THOUSANDTHS) == "Answer with x, y, width, height in thousandths of image 0."
    assert state_size(2, (640, 480), PIXELS) == "Image 2: 640x480 pixels."
    assert state_size(2, (640, 480), THOUSANDTHS) == "Image 2: 1000x1000 thousandths."
    assert state_question(box, [(640, 480), (32, 64)], THOUSANDTHS) == (
        "Image 0: 1000x1000 thousandths. Image 1: 1000x1000 thousandths. Which colour?\n"
        "Answer with x, y, width, height in thousandths of image 0."
    )
    for kind in set(AnswerType) - {AnswerType.BOX}:
        choices = ("red", "blue") if kind is AnswerType.CHOICE else ()
        assert state_form(sample("3", kind, choices), PIXELS) == state_form(sample("3", kind, choices), THOUSANDTHS)


def write(form, numbers):
    x, y, w, h = numbers
    return form.format(x=x, y=y, w=w, h=h, right=x + w, bottom=y + h)


@st.composite
def quarters(draw):
    """(frames by unit, box in each unit as whole numbers): one box, of quarters of the sides of a picture."""
    full = draw(st.integers(30, 3000)), draw(st.integers(30, 3000))
    side = draw(st.sampled_from([(14, 2), (16, 2), (4, 7)]))
    assume(max(full) <= 100 * min(full))
    seen = view_size(*full, ViewLimits(min_pixels=3136, max_pixels=1_003_520, patch=side[0], merge=side[1]))
    x, y = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    shares = x, y, draw(st.integers(1, 4 - x)), draw(st.integers(1, 4 - y))
    frames = {unit: Frame(full, seen, unit) for unit in Coordinates}
    return frames, {
        unit: tuple(share * frame.view[axis % 2] // 4 for axis, share in enumerate(shares))
        for unit, frame in frames.items()
    }


@given(quarters(), st.sampled_from(sorted(FORMS)), st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(10, 60)] * 2))
def test_a_box_is_worth_the_same_in_either_unit(case, form, hundredths):
    frames, boxes = case
    full = frames[PIXELS].full
    right = tuple(part * full[axis % 2] / 100 for axis, part in enumerate(hundredths))
    one = sample(json.dumps(right), AnswerType.BOX)
    values = {unit: compare(write(form, boxes[unit]), one, Context(frame=frame)) for unit, frame in frames.items()}
    assert values[PIXELS] == pytest.approx(values[THOUSANDTHS], abs=1e-9)
    exact = tuple(float(Fraction(number * full[axis % 2], 1000)) for axis, number in enumerate(boxes[THOUSANDTHS]))
    assert values[THOUSANDTHS] == pytest.approx(iou(exact, right), abs=1e-9)


@given(st.tuples(*[st.integers(0, 499)] * 2, *[st.integers(1, 500)] * 2), st.integers(1, 4000), st.integers(1, 4000))
def test_thousandths_are_those_of_the_full_picture_whatever_size_was_seen(numbers, width, height):
    stated = read_stated_box(write('{{"bbox_2d": [{x}, {y}, {right}, {bottom}]}}', numbers))
    assert stated is not None and stated.corners
    for seen in ((28, 28), (640, 96)):
        box = stated.in_full(Frame((width, height), seen, THOUSANDTHS))
        assert box == pytest.approx(
            [number * side / 1000 for number, side in zip(numbers, (width, height) * 2, strict=True)]
        )


@pytest.mark.parametrize("unit", Coordinates)
def test_fractions_are_shares_of_the_sides_in_either_unit(unit):
    one = sample("[200, 160, 400, 240]", AnswerType.BOX)
    context = Context(frame=Frame((1680, 1176), (840, 588), unit))
    for answer in ("[0.11905, 0.13605, 0.35714, 0.34014]", '{"bbox_2d": [0.11905, 0.13605, 0.35714, 0.34014]}'):
        assert compare(answer, one, context) == pytest.approx(1, abs=0.002)
    smallest = read_stated_box("0, 0, 1, 1").in_full(context.frame)  # whole numbers: one unit wide and high
    wide, high = context.frame.view
    assert smallest == pytest.approx((0, 0, 1680 / wide, 1176 / high))


class Pictures:
    """A picture of 1680 x 1176 pixels under any hash."""

    def decoded(self, sha256):
        return type("Picture", (), {"size": (1680, 1176)})


@pytest.mark.parametrize("unit, answer", [
    (PIXELS, "100, 80, 200, 120"), (PIXELS, '{"bbox_2d": [100, 80, 300, 200]}'),
    (THOUSANDTHS, "119.0476, 136.0544, 238.0952, 204.0816"),
    (THOUSANDTHS, '{"bbox_2d": [119.0476, 136.0544, 357.1429, 340.136]}'),
])  # fmt: skip
def test_the_reward_reads_a_row_in_its_own_unit(unit, answer):
    row = trajectory(answer=answer, sizes=((840, 588),), coordinates=unit)
    one = sample("[200, 160, 400, 240]", AnswerType.BOX)
    (right,) = score(batch([row], one, Pictures()))
    assert right.value == pytest.approx(1, abs=1e-4)
    assert right.evidence["box"] == pytest.approx([200, 160, 400, 240], abs=0.01), "pixels of the full picture"
    other = trajectory(answer=answer, sizes=((840, 588),), coordinates=PIXELS if unit is THOUSANDTHS else THOUSANDTHS)
    assert score(batch([other], one, Pictures()))[0].value < 0.75
