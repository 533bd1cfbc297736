"""The puzzles: the view tells nothing, the stated solution tells all, and no photograph is on both sides."""

import hashlib
import json
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkimg.config.load import load_config
from thinkimg.images.settings import ViewLimits
from thinkimg.images.toolbox import run_tool
from thinkimg.images.view import resize_to_view, view_size
from thinkimg.puzzles.geometry import LEAST_SIDE, SCALE, Geometry
from thinkimg.puzzles.scenes import MAKERS, Family, make_puzzle, photographs, split_photographs

IMAGES = load_config("tiny").images
# Tokens of Qwen2.5-VL and of Qwen3-VL, of a grid that no family has, and the smallest, each seen as a preset says or,
# where that is for others, at the puzzles' own size.
PRESET = {"min_pixels": IMAGES.min_pixels, "max_pixels": IMAGES.max_pixels}
VIEWS = {
    28: ViewLimits(**PRESET, patch=14, merge=2),
    32: ViewLimits(**PRESET, patch=16, merge=2),
    30: ViewLimits(**PRESET, patch=10, merge=3),
    LEAST_SIDE: Geometry(LEAST_SIDE).limits,
}
SIDES = sorted(VIEWS)
PHOTOGRAPHS = ("astronaut", "hubble_deep_field", "gravel", "coffee", "china", "ihc")
CASES = [(side, family, name, seed) for side in SIDES for family in Family for seed, name in enumerate(PHOTOGRAPHS)]
# A digest of what the puzzles were before their size followed from the model: pictures, texts, solutions, targets.
AT_28 = "da70da6f9f378e0cccd1f409820eb92a054b209f34028e19e99a68109a4b4087"


class OtherAnswer:
    """A generator that gives the answer, the first draw of `integers(4)`, another value; all else is as it would be."""

    def __init__(self, seed, turn):
        self.rng, self.turn = np.random.default_rng(seed), turn

    def __getattr__(self, name):
        return getattr(self.rng, name)

    def integers(self, *args, **options):
        drawn = self.rng.integers(*args, **options)
        if args == (4,) and self.turn:
            shape, drawn = np.shape(drawn), np.atleast_1d(drawn).copy()
            drawn[0] = (drawn[0] + self.turn) % 4
            drawn, self.turn = drawn.reshape(shape) if shape else drawn[0], 0
        return drawn


def variants(side, family, name, seed):
    """The same puzzle with each of the four answers."""
    made = [MAKERS[family](name, OtherAnswer(seed, turn), Geometry(side)) for turn in range(4)]
    assert {p.answer for p in made} == set(made[0].choices)
    assert len({(p.question, p.target) for p in made}) == 1
    return made


def seen(picture, side):
    return np.asarray(resize_to_view(Image.fromarray(picture), VIEWS[side])).astype(int)


def solved(made, side):
    """What the model sees after the stated calls, each on the image before."""
    images = [Image.fromarray(made.picture)]
    for call in made.solution:
        result = run_tool(call.name, call.args, images, lambda image: view_size(*image.size, VIEWS[side]))
        assert result.error is None and result.image is not None
        images.append(result.image)
    return np.asarray(resize_to_view(images[-1], VIEWS[side])).astype(int)


@pytest.mark.parametrize(("side", "family", "name", "seed"), [case for case in CASES if case[1] is not Family.TURNED])
def test_the_view_tells_nothing_of_the_answer(side, family, name, seed):
    first, *others = [seen(made.picture, side) for made in variants(side, family, name, seed)]
    assert first.shape == (4 * side, 4 * side, 3) and VIEWS[side].count_tokens(first.shape[:2]) == 16
    for other in others:
        difference = abs(first - other)
        assert difference.max() <= 1
        assert difference.any(axis=-1).mean() < 0.01


@pytest.mark.parametrize(("side", "family", "name", "seed"), CASES)
def test_the_stated_solution_tells_the_answers_apart(side, family, name, seed):
    views = [solved(made, side) for made in variants(side, family, name, seed)]
    for i, one in enumerate(views):
        for other in views[:i]:
            assert one.shape == other.shape
            assert abs(one - other).mean() > 1.5  # before the solution: less than 0.003


@pytest.mark.parametrize("side", SIDES)
def test_a_solved_puzzle_shows_the_pattern_of_its_answer_and_not_the_photograph_behind_it(side):
    edge = max(2 * side - 34, 17)  # outside are the photograph or the frame
    for family in Family:
        by_answer = {}
        for name in PHOTOGRAPHS[:3]:
            for made in variants(side, family, name, seed=7):
                if family is not Family.DARK or "dark" in made.question:
                    view = solved(made, side)[edge:-edge, edge:-edge]
                    by_answer.setdefault(made.answer, []).append(view.mean(axis=-1))
        for answer, views in by_answer.items():
            for one in views[1:]:
                distance = {other: abs(one - those[0]).mean() for other, those in by_answer.items()}
                assert min(distance, key=distance.get) == answer, (family, distance)


@given(
    st.sampled_from(list(Family)), st.integers(0, 2**32), st.integers(0, 1000), st.integers(LEAST_SIDE, 2 * LEAST_SIDE)
)
@settings(max_examples=15, deadline=None)
def test_a_puzzle_depends_on_its_arguments_alone_and_its_crop_covers_the_target(family, seed, i, side):
    geometry = Geometry(side)
    make = partial(make_puzzle, [family], list(PHOTOGRAPHS), i, seed=seed, geometry=geometry)
    made, again = make(), make()
    assert np.array_equal(made.picture, again.picture)
    assert (made.answer, made.question, made.solution, made.target) == (
        again.answer,
        again.question,
        again.solution,
        again.target,
    )
    assert made.picture.shape == (16 * side, 16 * side, 3) and made.picture.dtype == np.uint8
    assert made.answer in made.choices and made.photograph in PHOTOGRAPHS
    crops = [call.args for call in made.solution if call.name == "crop_image"]
    assert bool(crops) == (made.target is not None) == (family in (Family.DETAIL, Family.BOTH))
    for crop in crops:
        x, y, width, height = made.target
        assert width == height == geometry.cell
        assert crop["x"] * SCALE <= x and x + width <= (crop["x"] + crop["width"]) * SCALE <= geometry.size
        assert crop["y"] * SCALE <= y and y + height <= (crop["y"] + crop["height"]) * SCALE <= geometry.size
    other = make_puzzle([family], list(PHOTOGRAPHS), i, seed=seed, geometry=Geometry(LEAST_SIDE))
    assert (other.answer, other.question, other.photograph) == (made.answer, made.question, made.photograph)
    if made.target and other.target:
        assert [edge / other.target[2] for edge in other.target] == [edge / made.target[2] for edge in made.target]


def test_for_tokens_of_28_pixels_the_puzzles_are_those_of_earlier_versions():
    rows = []
    for i in range(24):
        made = make_puzzle(list(Family), list(PHOTOGRAPHS), i, seed=9, geometry=Geometry(28))
        pixels = hashlib.sha256(made.picture.tobytes()).hexdigest()
        calls = [[call.name, call.args] for call in made.solution]
        rows.append([pixels, made.question, made.answer, made.photograph, calls, made.target])
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest() == AT_28


def test_tokens_that_are_too_small_for_a_puzzle_are_refused():
    with pytest.raises(ValueError, match="smaller"):
        Geometry(LEAST_SIDE - 1)


def test_families_take_turns_and_answers_are_even():
    made = [
        make_puzzle([Family.DETAIL, Family.TURNED], list(PHOTOGRAPHS), i, seed=3, geometry=Geometry(28))
        for i in range(120)
    ]
    assert [p.family for p in made[:3]] == [Family.DETAIL, Family.TURNED, Family.DETAIL]
    for family in (Family.DETAIL, Family.TURNED):
        answers = [p.answer for p in made if p.family is family]
        assert all(answers.count(choice) > 5 for choice in made[0 if family is Family.DETAIL else 1].choices)


@given(st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_no_photograph_is_on_both_sides(share, seed):
    names = list(photographs())
    train, held_out = split_photographs(names, share, seed)
    assert sorted(train + held_out) == sorted(names) and train and held_out
    assert abs(len(held_out) - share * len(names)) <= 1
