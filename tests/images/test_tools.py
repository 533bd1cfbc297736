"""The tools: what they do to pixels, and that nothing a model can write makes `run_tool` raise."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from thinkimg.images.coordinates import Frame
from thinkimg.images.decode import pixel_hash
from thinkimg.images.settings import ViewLimits
from thinkimg.images.tool import in_place
from thinkimg.images.toolbox import load_tools, run_tool
from thinkimg.images.view import view_size
from thinkimg.records import Coordinates

TOOLS = load_tools()
ARGUMENTS = {
    "crop_image": ["x", "y", "width", "height"],
    "zoom_image": ["factor", "center_x", "center_y"],
    "rotate_image": ["angle", "expand"],
    "flip_image": ["direction"],
    "adjust_brightness": ["factor"],
    "adjust_contrast": ["factor"],
    "apply_blur": ["radius"],
    "apply_sharpen": ["factor"],
    "convert_grayscale": [],
    "resize_image": ["width", "height", "keep_aspect"],
    "get_image_info": [],
}
CALLS = {
    "crop_image": {"x": 10, "y": 5, "width": 18, "height": 13},
    "zoom_image": {"factor": 2.5, "center_x": 20, "center_y": 7},
    "rotate_image": {"angle": 33},
    "flip_image": {"direction": "vertical"},
    "adjust_brightness": {"factor": 1.5},
    "adjust_contrast": {"factor": 1.5},
    "apply_blur": {"radius": 2},
    "apply_sharpen": {"factor": 3},
    "convert_grayscale": {},
    "resize_image": {"width": 100, "height": 100},
}


FEW = ViewLimits(min_pixels=56 * 56, max_pixels=200 * 28 * 28)
THOUSANDTHS = Coordinates.THOUSANDTHS


def see(image):
    """A view of few pixels, so that full resolution is three to four times as fine."""
    return view_size(*image.size, FEW)


def noise(width, height):
    rng = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


PHOTO = noise(1200, 900)
SEEN = see(PHOTO)


def call(name, images=PHOTO, view=see, unit=Coordinates.PIXELS, **args):
    return run_tool(name, args, images if isinstance(images, list) else [images], view, coordinates=unit)


def image_of(name, images=PHOTO, view=see, unit=Coordinates.PIXELS, **args):
    result = call(name, images, view, unit, **args)
    assert result.error is None
    return result.image


def error_of(name, images=PHOTO, view=see, unit=Coordinates.PIXELS, **args):
    error = call(name, images, view, unit, **args).error
    assert error and error.endswith(".") and "\n" not in error
    return error


def same(first, second):
    return pixel_hash(first) == pixel_hash(second)


# ---- the registry


def test_there_are_eleven_tools_with_their_arguments():
    fields = {name: list(tool.Args.model_fields) for name, tool in TOOLS.items()}
    assert fields == {name: ["image", *arguments] for name, arguments in ARGUMENTS.items()}


def test_signatures_state_types_limits_and_defaults():
    signatures = {name: tool.signature() for name, tool in TOOLS.items()}
    crop = 'crop_image {"x": int >= 0, "y": int >= 0, "width": int >= 1, "height": int >= 1}'
    resize = 'resize_image {"width": int 1..4096, "height": int 1..4096, "keep_aspect": bool = true}'
    assert signatures["crop_image"] == crop
    assert signatures["resize_image"] == resize
    assert signatures["flip_image"] == 'flip_image {"direction": "horizontal" | "vertical"}'
    assert signatures["rotate_image"] == 'rotate_image {"angle": number -360..360, "expand": bool = true}'
    assert signatures["convert_grayscale"] == "convert_grayscale {}"
    assert all(tool.description.endswith(".") and "\n" not in tool.description for tool in TOOLS.values())
    json.dumps({name: tool.Args.model_json_schema() for name, tool in TOOLS.items()})


# ---- every tool


@pytest.mark.parametrize("name", CALLS)
def test_tools_are_pure(name):
    before = PHOTO.tobytes()
    first, second = image_of(name, **CALLS[name]), image_of(name, **CALLS[name])
    assert same(first, second) and not same(first, PHOTO)
    assert first is not PHOTO and first.mode == "RGB" and first.info == {}
    assert PHOTO.tobytes() == before and PHOTO.size == (1200, 900)


@pytest.mark.parametrize("name, args", [*CALLS.items(), ("get_image_info", {})])
@pytest.mark.parametrize("size", [(1, 1), (1, 28), (28, 1), (3, 2)])
def test_tools_take_the_smallest_images(name, args, size):
    result = call(name, noise(*size), **args)
    assert result.error is None and (result.image or result.text)


def test_the_image_argument_names_earlier_images():
    images = [noise(100, 90), noise(110, 90), noise(120, 90)]
    for named, index in [("original", 0), ("current", 2), (0, 0), (1, 1), (2, 2), (1.0, 1)]:
        result = call("flip_image", images, direction="horizontal", image=named)
        assert result.source == index
        assert same(result.image, images[index].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert call("get_image_info", images).source == 2
    for wrong in (3, -1, "1", "last", None, True, 0.5, [0], {}):
        assert '"original"' in error_of("get_image_info", images, image=wrong)


@pytest.mark.parametrize("unit", Coordinates)
def test_info_states_both_sizes_in_pixels_and_the_coordinates_where_they_are_others(unit):
    result = call("get_image_info", unit=unit)
    sizes = f"The image is {SEEN[0]}x{SEEN[1]} pixels as you see it and 1200x900 pixels at full resolution."
    further = " But coordinates are thousandths of the image's width and height, from 0 to 1000."
    assert result.text == sizes + (further if unit is THOUSANDTHS else "")
    assert result.image is None and result.error is None


def test_no_description_names_a_unit_of_positions():
    """Pixels are those of a size or a length, which are pixels in either unit."""
    speak_pixels = {name for name, tool in TOOLS.items() if "pixel" in tool.description + tool.signature()}
    assert speak_pixels == {"apply_blur", "resize_image"}
    assert not any("thousandth" in tool.description + tool.signature() for tool in TOOLS.values())


# ---- the region that a tool states


@st.composite
def scenes(draw, *names):
    """(name, arguments, frame): a call of one of the tools that shows something, in any proportions and either unit."""
    size, seen = (draw(st.tuples(*[st.integers(60, 300)] * 2)) for _ in range(2))
    frame = Frame(size, seen, draw(st.sampled_from(Coordinates)))
    view, least = frame.view, 30 if frame.coordinates is Coordinates.PIXELS else 500
    x, y = draw(st.integers(0, view[0] - least)), draw(st.integers(0, view[1] - least))
    arguments = {
        "crop_image": {
            "x": x,
            "y": y,
            "width": draw(st.integers(least, view[0] - x)),
            "height": draw(st.integers(least, view[1] - y)),
        },
        "zoom_image": {
            "factor": draw(st.floats(1, 4)),
            "center_x": draw(st.floats(0, view[0])),
            "center_y": draw(st.floats(0, view[1])),
        },
        "rotate_image": {"angle": draw(st.floats(-360, 360)), "expand": draw(st.booleans())},
        "flip_image": {"direction": draw(st.sampled_from(["horizontal", "vertical"]))},
        "adjust_brightness": {"factor": draw(st.floats(0.5, 3))},
        "adjust_contrast": {"factor": draw(st.floats(0.5, 4))},
        "apply_blur": {"radius": draw(st.floats(0, 2))},
        "apply_sharpen": {"factor": draw(st.floats(0, 4))},
        "convert_grayscale": {},
        "resize_image": {
            "width": draw(st.integers(60, 300)),
            "height": draw(st.integers(60, 300)),
            "keep_aspect": draw(st.booleans()),
        },
    }
    name = draw(st.sampled_from(names or sorted(arguments)))
    return name, arguments[name], frame


def run_in(frame, name, args, image):
    """The image of a call, as a model sees its source at the frame's size and writes in its unit."""
    return run_tool(name, args, [image], lambda _: frame.seen, coordinates=frame.coordinates).image


@given(scenes(), st.tuples(*[st.floats(0.25, 0.75)] * 2))
@settings(max_examples=400, deadline=None)
def test_what_lies_in_the_region_is_seen_at_its_place_in_the_result(scene, place):
    """A bright spot in the region of a grey image: its position in the result follows from the region alone."""
    name, args, frame = scene
    tool, size = TOOLS[name], frame.full
    region = tool.region(tool.Args(**args), frame.view)
    if region is None:
        assert name in ("rotate_image", "flip_image")
        return
    edges = np.array([frame.to_full(*region[:2]), frame.to_full(*region[2:])])  # (low and high, x and y)
    assert (edges >= 0).all() and (edges <= np.array(size) + 1e-9).all()
    sides = edges[1] - edges[0]
    low = np.round(edges[0] + np.array(place) * sides - 0.1 * sides).astype(int)
    high = np.maximum(low + 2, np.round(low + 0.2 * sides).astype(int))
    image = Image.new("RGB", size, (60, 60, 60))
    image.paste((200, 200, 200), (*low.tolist(), *high.tolist()))
    result = run_in(frame, name, args, image)
    seen = np.asarray(result.convert("L"), dtype=float)
    spot = seen > (seen.max() + np.median(seen)) / 2
    found = np.array([np.nonzero(spot)[1].mean(), np.nonzero(spot)[0].mean()]) + 0.5
    expected = ((low + high) / 2 - edges[0]) / sides
    off = np.abs(found / result.size - expected)
    assert (off < 1.5 / np.array(result.size) + 1.5 / sides).all(), (name, found / result.size, expected)


@given(scenes("crop_image"))
def test_a_crop_is_its_region_pixel_by_pixel(scene):
    _, args, frame = scene
    image, tool = noise(*frame.full), TOOLS["crop_image"]
    box = frame.box_to_full(tool.region(tool.Args(**args), frame.view))
    assert same(run_in(frame, "crop_image", args, image), image.crop(box))


@given(scenes("zoom_image"))
def test_a_zoom_is_its_region_resized(scene):
    _, args, frame = scene
    size, tool = frame.full, TOOLS["zoom_image"]
    left, top, right, bottom = tool.region(tool.Args(**args), frame.view)
    ramp_W, ramp_H = (np.linspace(0, 255, side) for side in size)
    pixels = np.stack(np.broadcast_arrays(ramp_W[None, :], ramp_H[:, None], 128.0), -1).astype(np.uint8)
    image = Image.fromarray(pixels)
    box = (*frame.to_full(left, top), *np.minimum(frame.to_full(right, bottom), size))
    expected = image.resize(frame.seen, Image.Resampling.BICUBIC, box=box)
    zoomed = run_in(frame, "zoom_image", args, image)
    assert zoomed.size == frame.seen, "as large as the model sees the image, whatever the unit"
    assert np.abs(np.asarray(zoomed, dtype=int) - np.asarray(expected, dtype=int)).max() <= 8  # at the cut's edge


def test_every_tool_that_gives_an_image_states_its_region():
    assert [name for name, tool in TOOLS.items() if tool.region is None] == ["get_image_info"]
    cutting = {name for name, tool in TOOLS.items() if tool.cut(CALLS.get(name, {}), (100, 100)) is not None}
    assert cutting == {"crop_image", "zoom_image"}
    whole = {"adjust_brightness", "adjust_contrast", "apply_blur", "apply_sharpen", "convert_grayscale", "resize_image"}
    assert {name for name, tool in TOOLS.items() if tool.region is in_place} == whole
    assert TOOLS["crop_image"].cut({"x": 1}, (100, 100)) is None  # of a version that took other arguments


# ---- pixels of single tools


@given(st.data(), st.sampled_from(Coordinates))
def test_a_crop_is_the_full_resolution_region(data, unit):
    wide, high = unit.extent(SEEN)
    x, y = data.draw(st.integers(0, wide - 1)), data.draw(st.integers(0, high - 1))
    width, height = data.draw(st.integers(1, wide - x)), data.draw(st.integers(1, high - y))
    result = call("crop_image", unit=unit, x=x, y=y, width=width, height=height)
    left, right = Fraction(x * 1200, wide), Fraction((x + width) * 1200, wide)
    top, bottom = Fraction(y * 900, high), Fraction((y + height) * 900, high)
    left, top, right, bottom = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    if max(right - left, bottom - top) > 200 * min(right - left, bottom - top):
        assert "200 times" in result.error
    else:
        assert same(result.image, PHOTO.crop((left, top, right, bottom)))


def test_a_crop_gains_detail():
    fine = Image.new("RGB", (1200, 900))
    fine.putpixel((600, 450), (255, 255, 255))  # one pixel, all but invisible in the view
    assert np.asarray(fine.resize(SEEN, Image.Resampling.BICUBIC)).max() < 60
    x, y = 600 * SEEN[0] // 1200, 450 * SEEN[1] // 900
    cropped = image_of("crop_image", fine, x=x, y=y, width=10, height=10)
    assert np.asarray(cropped).max() == 255


def test_crop_states_the_size_that_the_model_sees():
    for box in ((0, 0, SEEN[0] + 1, 5), (SEEN[0], 0, 1, 1), (0, SEEN[1] - 4, 5, 5), (10**8, 0, 1, 1)):
        error = error_of("crop_image", **dict(zip(("x", "y", "width", "height"), box, strict=True)))
        assert f"{SEEN[0]}x{SEEN[1]} pixels" in error
    assert same(image_of("crop_image", x=0, y=0, width=SEEN[0], height=SEEN[1]), PHOTO)


def test_crop_states_the_limit_of_thousandths():
    for box in ((0, 0, 1001, 5), (1000, 0, 1, 1), (0, 999, 5, 2), (10**8, 0, 1, 1), (600, 700, 600, 100)):
        error = error_of("crop_image", unit=THOUSANDTHS, **dict(zip(("x", "y", "width", "height"), box, strict=True)))
        assert error == (
            f"crop_image: the rectangle ends at x={box[0] + box[2]}, y={box[1] + box[3]}, but coordinates are "
            "thousandths of the image's width and height, from 0 to 1000."
        )
    whole = {"x": 0, "y": 0, "width": 1000, "height": 1000}
    for size in ((1200, 900), (7, 1), (333, 1001), (40, 2001)):
        assert same(image_of("crop_image", noise(*size), unit=THOUSANDTHS, **whole), noise(*size))


def test_crop_refuses_what_the_model_cannot_take():
    strip = noise(3000, 100)
    seen = see(strip)
    assert "200 times" in error_of("crop_image", strip, x=0, y=0, width=seen[0], height=1)


def test_zoom_shows_a_part_of_the_frame_at_view_size():
    image = noise(1120, 840)
    seen = see(image)
    assert same(image_of("zoom_image", image, factor=1, center_x=3, center_y=5), image.resize(seen, 3))
    center = {"center_x": seen[0] / 2, "center_y": seen[1] / 2}
    assert same(image_of("zoom_image", image, factor=2, **center), image.crop((280, 210, 840, 630)).resize(seen, 3))
    deep = image_of("zoom_image", image, factor=4, **center)
    assert same(deep, image.crop((420, 315, 700, 525)).resize(seen, 3))


@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_zoom_stays_inside(corner):
    image = noise(1120, 840)
    seen = see(image)
    left, top = corner[0] * 560, corner[1] * 420
    result = image_of("zoom_image", image, factor=2, center_x=corner[0] * seen[0], center_y=corner[1] * seen[1])
    assert same(result, image.crop((left, top, left + 560, top + 420)).resize(seen, Image.Resampling.BICUBIC))


def test_zoom_outside_states_the_size():
    assert f"{SEEN[0]}x{SEEN[1]}" in error_of("zoom_image", factor=2, center_x=SEEN[0] + 1, center_y=0)
    assert "at least 1" in error_of("zoom_image", factor=0.5, center_x=0, center_y=0)
    for center in ((1000.5, 0), (0, 1001), (SEEN[0], 5000)):
        error = error_of("zoom_image", unit=THOUSANDTHS, factor=2, center_x=center[0], center_y=center[1])
        assert f"x={center[0]:g}, y={center[1]:g}" in error
        assert "thousandths of the image's width and height, from 0 to 1000" in error
    corner = image_of("zoom_image", unit=THOUSANDTHS, factor=2, center_x=1000, center_y=1000)
    assert same(corner, PHOTO.crop((600, 450, 1200, 900)).resize(SEEN, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("angle, method", [(90, 2), (180, 3), (270, 4), (-90, 4), (-180, 3), (-270, 2)])
def test_right_angles_are_exact_and_counter_clockwise(angle, method):
    image = noise(70, 50)
    assert same(image_of("rotate_image", image, angle=angle), image.transpose(Image.Transpose(method)))


def test_rotation_expands_and_fills_black():
    white = Image.new("RGB", (101, 101), "white")
    rotated = image_of("rotate_image", white, angle=45)
    assert 142 <= rotated.width <= 145 and rotated.getpixel((0, 0)) == (0, 0, 0)
    assert rotated.getpixel((72, 72)) == (255, 255, 255)
    kept = image_of("rotate_image", white, angle=45, expand=False)
    assert kept.size == (101, 101) and kept.getpixel((0, 0)) == (0, 0, 0)
    assert same(image_of("rotate_image", PHOTO, angle=360), PHOTO)
    marked = Image.new("RGB", (101, 101))
    marked.paste((255, 255, 255), (70, 45, 90, 56))  # right of the centre, so above it after 90 degrees and a bit
    turned = np.asarray(image_of("rotate_image", marked, angle=80, expand=False))[..., 0]
    assert turned[:45].sum() > 100 * turned[55:].sum()


def test_a_rotation_too_large_is_refused_before_it_is_computed(monkeypatch):
    strip = Image.new("RGB", (60_000, 600))
    monkeypatch.setattr(Image.Image, "rotate", lambda *args, **options: pytest.fail("rotated"))
    assert "pixels are more than" in error_of("rotate_image", strip, angle=45)


def test_flips():
    image = Image.new("RGB", (2, 2))
    image.putdata([(1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4)])
    flipped = {d: image_of("flip_image", image, direction=d) for d in ("horizontal", "vertical")}
    levels = {direction: np.asarray(result)[..., 0].ravel().tolist() for direction, result in flipped.items()}
    assert levels == {"horizontal": [2, 1, 4, 3], "vertical": [3, 4, 1, 2]}


@given(st.floats(0, 256))
def test_brightness_and_contrast(factor):
    image = noise(28, 28)
    array = np.asarray(image, dtype=float)
    bright = np.asarray(image_of("adjust_brightness", image, factor=factor), dtype=float)
    assert np.abs(bright - np.clip(array * factor, 0, 255)).max() <= 1
    mean = round(np.asarray(image.convert("L")).mean())
    contrast = np.asarray(image_of("adjust_contrast", image, factor=factor), dtype=float)
    assert np.abs(contrast - np.clip(mean + factor * (array - mean), 0, 255)).max() <= 1


def test_a_dark_scene_becomes_visible():
    dark = Image.new("RGB", (56, 56), (1, 0, 2))
    assert image_of("adjust_brightness", dark, factor=100).getpixel((0, 0)) == (100, 0, 200)
    assert "at most 256" in error_of("adjust_brightness", dark, factor=257)


def test_blur_is_measured_in_view_pixels():
    scale = 1200 / SEEN[0], 900 / SEEN[1]
    expected = PHOTO.filter(ImageFilter.GaussianBlur((3 * scale[0], 3 * scale[1])))
    assert all(same(image_of("apply_blur", unit=unit, radius=3), expected) for unit in Coordinates)
    assert same(image_of("apply_blur", radius=0), PHOTO)
    dot = Image.new("RGB", (301, 301))
    dot.paste((255, 255, 255), (140, 140, 161, 161))
    blurred = np.asarray(image_of("apply_blur", dot, lambda image: (100, 100), radius=5), dtype=float)[..., 0]
    offsets_W = np.arange(301) - 150
    variance = (blurred.sum(axis=0) * offsets_W**2).sum() / blurred.sum()
    assert math.sqrt(variance - (21**2 - 1) / 12) == pytest.approx(15, rel=0.1)  # sigma, without that of the dot itself


def test_sharpen_raises_edges():
    edge = Image.new("RGB", (56, 56), (100, 100, 100))
    edge.paste((150, 150, 150), (28, 0, 56, 56))
    sharp = image_of("apply_sharpen", edge, factor=5)
    assert sharp.getpixel((27, 20))[0] < 100 and sharp.getpixel((28, 20))[0] > 150
    assert sharp.getpixel((5, 20))[0] == 100
    assert same(image_of("apply_sharpen", edge, factor=1), edge)


def test_grayscale_is_luma():
    image = Image.new("RGB", (56, 56), (255, 0, 0))
    assert image_of("convert_grayscale", image).getpixel((0, 0)) == (76, 76, 76)


@given(st.integers(1, 600), st.integers(1, 600))
@settings(deadline=None)
def test_resize_keeps_proportions_unless_told_otherwise(width, height):
    image = noise(300, 200)
    kept = image_of("resize_image", image, width=width, height=height)
    assert kept.width <= width and kept.height <= height
    assert kept.width == width or kept.height == height
    assert abs(kept.width * 200 / 300 - kept.height) <= 1
    thin = image_of("resize_image", Image.new("RGB", (100, 1)), width=min(width, 99), height=height)
    assert thin.size == (min(width, 99), 1)
    free = call("resize_image", image, width=width, height=height, keep_aspect=False)
    if max(width, height) <= 200 * min(width, height):
        assert same(free.image, image.resize((width, height), Image.Resampling.BICUBIC))
    else:
        assert "200 times" in free.error


def test_no_result_has_a_view_that_a_second_preprocessing_refuses():
    def see_large(image):
        return view_size(*image.size, ViewLimits(min_pixels=56 * 56, max_pixels=1280 * 28 * 28))

    strip = Image.new("RGB", (41, 8200))
    assert see_large(strip) == (28, 8204)
    assert "28x8204" in error_of("flip_image", strip, see_large, direction="vertical")
    assert image_of("crop_image", strip, see_large, x=0, y=0, width=28, height=4000).size == (41, 3999)  # ceil(3998.05)


# ---- wrong calls


def test_unknown_tools():
    unknown = run_tool("cut_image", {}, [PHOTO], see).error
    assert '"cut_image"' in unknown and all(name in unknown for name in TOOLS)
    offered = run_tool("crop_image", {}, [PHOTO], see, load_tools(("get_image_info", "flip_image"))).error
    assert offered == 'There is no tool "crop_image"; on offer: flip_image, get_image_info.'
    assert run_tool("flip_image", {"direction": "vertical"}, [PHOTO], see, load_tools(("flip_image",))).image


@pytest.mark.parametrize(
    "name, args, told",
    [
        ("crop_image", {"x": "1", "y": 0, "width": 5, "height": 5}, '"x" must be a number, not a string'),
        ("crop_image", {"x": True, "y": 0, "width": 5, "height": 5}, '"x" must be a number, not a boolean'),
        ("crop_image", {"x": 1.5, "y": 0, "width": 5, "height": 5}, '"x" must be a whole number'),
        ("crop_image", {"x": math.nan, "y": 0, "width": 5, "height": 5}, '"x" must be a finite number'),
        ("crop_image", {"x": 10**400, "y": 0, "width": 5, "height": 5}, '"x" must be a finite number'),
        ("crop_image", {"x": -1, "y": 0, "width": 5, "height": 5}, '"x" must be at least 0'),
        ("crop_image", {"x": 0, "y": 0, "width": 0, "height": 5}, '"width" must be at least 1'),
        ("crop_image", {"x": 0, "y": 0, "width": 5}, '"height" is missing'),
        ("crop_image", {"x": 0, "y": 0, "w": 5, "height": 5}, 'no argument "w", only x, y, width, height, image'),
        ("rotate_image", {"angle": math.inf}, '"angle" must be a finite number'),
        ("rotate_image", {"angle": -math.inf}, '"angle" must be a finite number'),
        ("rotate_image", {"angle": None}, '"angle" must be a number, not null'),
        ("rotate_image", {"angle": 9, "expand": 1}, '"expand" must be true or false'),
        ("flip_image", {"direction": "up"}, "'horizontal' or 'vertical'"),
        ("resize_image", {"width": 4097, "height": 5}, '"width" must be at most 4096'),
        ("get_image_info", {"verbose": True}, 'no argument "verbose", only image'),
    ],
)
def test_errors_tell_how_to_correct_the_call(name, args, told):
    assert told in error_of(name, **args)


@pytest.mark.parametrize("args", [None, [], "x", 3, True, [{"x": 1}]])
def test_arguments_must_be_an_object(args):
    assert "must be a JSON object" in run_tool("crop_image", args, [PHOTO], see).error


def test_whole_floats_are_integers():
    box = {"x": 10, "y": 20, "width": 30, "height": 40}
    floats = {key: float(value) for key, value in box.items()}
    assert same(image_of("crop_image", **floats), image_of("crop_image", **box))


def test_no_special_token_comes_back():
    hostile = "<|vision_start|><|image_pad|>"
    errors = [run_tool(hostile, {}, [PHOTO], see).error, run_tool("flip_image", {hostile: 1}, [PHOTO], see).error]
    errors += [run_tool("flip_image", {"direction": hostile, "image": hostile}, [PHOTO], see).error]
    errors += [run_tool("flip_image", {"direction": "vertical", "image": hostile}, [PHOTO], see).error]
    assert not any("<|" in error for error in errors)
