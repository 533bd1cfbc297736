"""The puzzles: the view tells nothing, the stated solution tells all, and no photograph is on both sides."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkimg.images.toolbox import run_tool
from thinkimg.images.view import resize_to_view, view_size
from thinkimg.puzzles.scenes import MAKERS, SCALE, SIZE, Family, make_puzzle, photographs, split_photographs

LIMITS = {"min_pixels": 56 * 56, "max_pixels": (SIZE // SCALE) ** 2}
PHOTOGRAPHS = ("astronaut", "hubble_deep_field", "gravel", "coffee", "china", "ihc")
CASES = [(family, name, seed) for family in Family for seed, name in enumerate(PHOTOGRAPHS)]


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


def variants(family, name, seed):
    """The same puzzle with each of the four answers."""
    made = [MAKERS[family](name, OtherAnswer(seed, turn)) for turn in range(4)]
    assert {p.answer for p in made} == set(made[0].choices)
    assert len({(p.question, p.target) for p in made}) == 1
    return made


def seen(picture):
    return np.asarray(resize_to_view(Image.fromarray(picture), **LIMITS)).astype(int)


def solved(made):
    """What the model sees after the stated calls, each on the image before."""
    images = [Image.fromarray(made.picture)]
    for call in made.solution:
        result = run_tool(call.name, call.args, images, lambda image: view_size(*image.size, **LIMITS))
        assert result.error is None and result.image is not None
        images.append(result.image)
    return np.asarray(resize_to_view(images[-1], **LIMITS)).astype(int)


@pytest.mark.parametrize(("family", "name", "seed"), [case for case in CASES if case[0] is not Family.TURNED])
def test_the_view_tells_nothing_of_the_answer(family, name, seed):
    first, *others = [seen(made.picture) for made in variants(family, name, seed)]
    assert first.shape == (SIZE // SCALE, SIZE // SCALE, 3)
    for other in others:
        difference = abs(first - other)
        assert difference.max() <= 1
        assert difference.any(axis=-1).mean() < 0.01


@pytest.mark.parametrize(("family", "name", "seed"), CASES)
def test_the_stated_solution_tells_the_answers_apart(family, name, seed):
    views = [solved(made) for made in variants(family, name, seed)]
    for i, one in enumerate(views):
        for other in views[:i]:
            assert one.shape == other.shape
            assert abs(one - other).mean() > 1.5  # before the solution: less than 0.003


def test_a_solved_puzzle_shows_the_pattern_of_its_answer_and_not_the_photograph_behind_it():
    for family in Family:
        by_answer = {}
        for name in PHOTOGRAPHS[:3]:
            for made in variants(family, name, seed=7):
                if family is not Family.DARK or "dark" in made.question:
                    by_answer.setdefault(made.answer, []).append(solved(made)[22:-22, 22:-22].mean(axis=-1))
        for answer, views in by_answer.items():
            for one in views[1:]:
                distance = {other: abs(one - those[0]).mean() for other, those in by_answer.items()}
                assert min(distance, key=distance.get) == answer, (family, distance)


@given(st.sampled_from(list(Family)), st.integers(0, 2**32), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_puzzle_depends_on_its_arguments_alone_and_its_crop_covers_the_target(family, seed, i):
    make = partial(make_puzzle, [family], list(PHOTOGRAPHS), i, seed=seed)
    made, again = make(), make()
    assert np.array_equal(made.picture, again.picture)
    assert (made.answer, made.question, made.solution, made.target) == (
        again.answer,
        again.question,
        again.solution,
        again.target,
    )
    assert made.picture.shape == (SIZE, SIZE, 3) and made.picture.dtype == np.uint8
    assert made.answer in made.choices and made.photograph in PHOTOGRAPHS
    crops = [call.args for call in made.solution if call.name == "crop_image"]
    assert bool(crops) == (made.target is not None) == (family in (Family.DETAIL, Family.BOTH))
    for crop in crops:
        x, y, width, height = made.target
        assert crop["x"] * SCALE <= x and x + width <= (crop["x"] + crop["width"]) * SCALE <= SIZE
        assert crop["y"] * SCALE <= y and y + height <= (crop["y"] + crop["height"]) * SCALE <= SIZE


def test_families_take_turns_and_answers_are_even():
    made = [make_puzzle([Family.DETAIL, Family.TURNED], list(PHOTOGRAPHS), i, seed=3) for i in range(120)]
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
