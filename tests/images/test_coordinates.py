"""The coordinate contract: properties of Frame in both units, and of the view that it is made for."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from thinkimg.images.coordinates import Frame
from thinkimg.images.settings import ViewLimits
from thinkimg.images.view import resize_to_view, view_size
from thinkimg.records import Coordinates

sides = st.integers(1, 5000)
units = st.sampled_from(Coordinates)
GRIDS = ((14, 2), (16, 2), (10, 3))
"""Patch and merge: tokens of 28, 32 and 30 pixels."""
grids = st.sampled_from(GRIDS)


def limits_of(grid, min_pixels=56 * 56, max_pixels=1280 * 28 * 28):
    return ViewLimits(min_pixels=min_pixels, max_pixels=max_pixels, patch=grid[0], merge=grid[1])


@st.composite
def frames_and_boxes(draw, side=sides):
    frame = Frame((draw(side), draw(side)), (draw(side), draw(side)), draw(units))
    edges = [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in frame.view]
    (left, right), (top, bottom) = edges
    return frame, (left, top, right, bottom)


@given(frames_and_boxes())
@example((Frame((1, 1), (56, 56)), (3, 4, 5, 6)))
@example((Frame((7, 7), (3, 3)), (0, 1, 2, 3)))
def test_box_goes_to_the_smallest_covering_box(case):
    frame, box = case
    full = frame.box_to_full(box)
    assert all(type(edge) is int for edge in full)
    for axis in (0, 1):
        size, seen = frame.full[axis], frame.view[axis]
        low, high = full[axis], full[axis + 2]
        assert 0 <= low < high <= size
        # In units of 1 / (size * seen), where everything is an integer: the box is covered, and by no pixel too many.
        assert low * seen <= box[axis] * size < (low + 1) * seen
        assert (high - 1) * seen < box[axis + 2] * size <= high * seen


@given(sides, sides, sides, sides, units)
def test_the_whole_frame_maps_to_the_whole_frame(width, height, seen_w, seen_h, unit):
    frame = Frame((width, height), (seen_w, seen_h), unit)
    assert frame.view == ((seen_w, seen_h) if unit is Coordinates.PIXELS else (1000, 1000))
    assert frame.box_to_full((0, 0, *frame.view)) == (0, 0, width, height)
    assert frame.to_full(0, 0) == (0, 0)
    assert frame.to_full(*frame.view) == (width, height)


@given(frames_and_boxes())
def test_equal_sizes_are_the_identity(case):
    frame, box = case
    for same in (Frame(frame.view, frame.view), Frame((1000, 1000), frame.seen, Coordinates.THOUSANDTHS)):
        if same.view == frame.view:
            assert same.box_to_full(box) == box
            assert same.to_full(*box[:2]) == box[:2]


@st.composite
def seen_frames(draw):
    """The frame of a picture of any size on one of the grids."""
    width, height = draw(st.integers(1, 9000)), draw(st.integers(1, 9000))
    assume(max(width, height) <= 200 * min(width, height))
    return Frame((width, height), view_size(width, height, limits_of(draw(grids))), draw(units))


@given(seen_frames(), st.data())
def test_points_and_boxes_come_back_from_the_model_where_they_were(frame, data):
    """full -> the model's coordinates -> full, on every grid and in both units; integers alone lose nothing."""
    x, y = (data.draw(st.integers(0, side)) for side in frame.full)
    written = [Fraction(edge * extent, side) for edge, extent, side in zip((x, y), frame.view, frame.full, strict=True)]
    assert frame.to_full(*written) == (x, y)
    assert frame.to_full(*map(float, written)) == pytest.approx((x, y))
    right, bottom = data.draw(st.integers(x, frame.full[0])), data.draw(st.integers(y, frame.full[1]))
    corner = [
        Fraction(edge * extent, side)
        for edge, extent, side in zip((right, bottom), frame.view, frame.full, strict=True)
    ]
    assert frame.box_to_full((*written, *corner)) == (x, y, right, bottom)
    # A model writes whole numbers: the box that covers them covers what was meant, and less than a unit more.
    rounded = (*map(math.floor, written), *map(math.ceil, corner))
    for axis, (low, high) in enumerate(((x, right), (y, bottom))):
        covered = frame.box_to_full(rounded)[axis::2]
        unit = math.ceil(frame.full[axis] / frame.view[axis])
        assert low - unit <= covered[0] <= low and high <= covered[1] <= high + unit


def test_boxes_are_clamped_and_fractions_rounded_outwards():
    frame = Frame((200, 100), (100, 100))
    assert frame.box_to_full((-5, -5, 500, 500)) == (0, 0, 200, 100)
    assert frame.box_to_full((0.4, 0.4, 1.1, 1.1)) == (0, 0, 3, 2)
    assert frame.box_to_full((150, 0, 160, 10)) == (200, 0, 200, 10)


@pytest.fixture(scope="module")
def smart_resize():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    return smart_resize


pixel_limits = st.lists(st.integers(1, 5_000_000), min_size=2, max_size=2).map(sorted)


@given(st.integers(1, 20_000), st.integers(1, 20_000), pixel_limits, grids)
@example(8200, 41, [3136, 1_003_520], (14, 2))
@example(1, 200, [3136, 1_003_520], (14, 2))
@example(1, 201, [3136, 1_003_520], (14, 2))
@example(8200, 41, [3136, 1_003_520], (16, 2))
@example(45, 75, [3136, 1_003_520], (10, 3))
def test_view_size_equals_smart_resize_of_transformers(smart_resize, width, height, pixels, grid):
    limits = limits_of(grid, *pixels)
    assert limits.token_side == grid[0] * grid[1]
    try:
        expected = smart_resize(height, width, limits.token_side, *pixels)
    except ValueError:
        with pytest.raises(ValueError, match="aspect"):
            view_size(width, height, limits)
    else:
        assert view_size(width, height, limits) == expected[::-1]


@given(sides, sides, grids)
def test_what_is_seen_would_be_seen_unchanged(width, height, grid):
    assume(max(width, height) <= 100 * min(width, height))
    limits = limits_of(grid)
    seen = view_size(width, height, limits)
    assert view_size(*seen, limits) == seen


@given(sides, sides, grids, pixel_limits)
def test_a_view_has_whole_tokens_and_no_more_than_the_most(width, height, grid, pixels):
    assume(max(width, height) <= 100 * min(width, height) and pixels[1] >= 200 * 32 * 32)
    limits = limits_of(grid, min(pixels[0], pixels[1] // 4), pixels[1])  # closer ones leave no size between them
    seen = view_size(width, height, limits)
    _, rows, columns = limits.count_patches(seen)
    assert (columns * grid[0], rows * grid[0]) == seen and rows % grid[1] == columns % grid[1] == 0
    assert limits.count_tokens(seen) * grid[1] ** 2 == rows * columns
    assert limits.count_tokens(seen) <= limits.most_tokens


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (41, 8200), (2, 3)])
def test_view_of_tiny_and_elongated_images(size, grid):
    limits = limits_of(grid)
    seen = resize_to_view(Image.new("RGB", size, (9, 99, 199)), limits)
    assert seen.size == view_size(*size, limits)
    assert seen.getcolors() == [(seen.width * seen.height, (9, 99, 199))]
    assert limits.count_patches(seen.size) == (1, seen.height // grid[0], seen.width // grid[0])


def test_view_is_bicubic_and_the_identity_where_the_size_fits():
    fits = Image.effect_noise((84, 56), 90).convert("RGB")
    assert resize_to_view(fits, limits_of((14, 2))) is fits
    other = Image.effect_noise((100, 90), 90).convert("RGB")
    for grid, size in (((14, 2), (112, 84)), ((16, 2), (96, 96)), ((10, 3), (90, 90))):
        assert (
            resize_to_view(other, limits_of(grid)).tobytes() == other.resize(size, Image.Resampling.BICUBIC).tobytes()
        )
