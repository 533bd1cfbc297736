"""The coordinate contract: properties of Frame, and of the view that it is made for."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from thinkimg.images.coordinates import Frame
from thinkimg.images.view import count_patches, resize_to_view, view_size

sides = st.integers(1, 5000)
LIMITS = {"min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}


@st.composite
def frames_and_boxes(draw, side=sides):
    frame = Frame(full=(draw(side), draw(side)), view=(draw(side), draw(side)))
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


@given(sides, sides, sides, sides)
def test_the_whole_frame_maps_to_the_whole_frame(width, height, view_w, view_h):
    frame = Frame((width, height), (view_w, view_h))
    assert frame.box_to_full((0, 0, view_w, view_h)) == (0, 0, width, height)

    assert frame.to_full(0, 0) == (0, 0)
    assert frame.to_full(view_w, view_h) == (width, height)


@given(frames_and_boxes())
def test_equal_sizes_are_the_identity(case):
    frame, box = case
    same = Frame(frame.view, frame.view)
    assert same.box_to_full(box) == box
    assert same.to_full(*box[:2]) == box[:2]


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


@given(st.integers(1, 20_000), st.integers(1, 20_000), pixel_limits)
@example(8200, 41, [3136, 1_003_520])
@example(1, 200, [3136, 1_003_520])
@example(1, 201, [3136, 1_003_520])
def test_view_size_equals_smart_resize_of_transformers(smart_resize, width, height, limits):
    limits = dict(zip(("min_pixels", "max_pixels"), limits, strict=True))
    try:
        expected = smart_resize(height, width, factor=28, **limits)
    except ValueError:
        with pytest.raises(ValueError, match="aspect"):
            view_size(width, height, **limits)
    else:
        assert view_size(width, height, **limits) == expected[::-1]


@given(sides, sides)
def test_what_is_seen_would_be_seen_unchanged(width, height):
    assume(max(width, height) <= 100 * min(width, height))
    seen = view_size(width, height, **LIMITS)
    assert view_size(*seen, **LIMITS) == seen


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (41, 8200), (2, 3)])
def test_view_of_tiny_and_elongated_images(size):
    seen = resize_to_view(Image.new("RGB", size, (9, 99, 199)), **LIMITS)
    assert seen.size == view_size(*size, **LIMITS)
    assert seen.getcolors() == [(seen.width * seen.height, (9, 99, 199))]
    assert count_patches(*seen.size) == (1, seen.height // 14, seen.width // 14)


def test_view_is_bicubic_and_the_identity_where_the_size_fits():
    fits = Image.effect_noise((84, 56), 90).convert("RGB")
    assert resize_to_view(fits, **LIMITS) is fits
    other = Image.effect_noise((100, 90), 90).convert("RGB")
    assert resize_to_view(other, **LIMITS).tobytes() == other.resize((112, 84), Image.Resampling.BICUBIC).tobytes()
