"""Conversations in both units: played, replayed, traced to the picture that they show, and shown to people."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from chat_codecs import tiny_codec
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from rewards_rows import call, trajectory

from thinkimg import records
from thinkimg.analysis.figures import holds_region
from thinkimg.analysis.verify_calls import replay
from thinkimg.conversation.episode import ConversationSpec, Episode, play_script, render_system_prompt
from thinkimg.conversation.picture import make_picture
from thinkimg.conversation.protocol import UNITS, Answer, ToolCall, load_protocol
from thinkimg.conversation.regions import tool_images
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.images.decode import encode_png, pixel_hash
from thinkimg.images.settings import ViewLimits
from thinkimg.images.toolbox import load_tools, run_tool
from thinkimg.images.view import view_size
from thinkimg.records import AnswerType, CallStatus, Coordinates, Sample, StopReason, Trajectory
from thinkimg.rewards.pairs import pair_images
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe
from thinkimg.tracking.traces import chat_messages

PIXELS, THOUSANDTHS = Coordinates.PIXELS, Coordinates.THOUSANDTHS
GRID = {"min_pixels": 28 * 28, "max_pixels": 224 * 224, "patch": 16, "merge": 2}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (384, 640, 3), dtype=np.uint8))
SEEN = (288, 160)  # of the picture of 640 x 384 pixels
CALLS = {
    PIXELS: [
        ("crop_image", {"x": 72, "y": 40, "width": 144, "height": 80}),
        ("zoom_image", {"factor": 2, "center_x": 144, "center_y": 80, "image": "original"}),
        ("get_image_info", {"image": 0}),
        ("crop_image", {"x": 0, "y": 0, "width": 1000, "height": 10, "image": 0}),
    ],
    THOUSANDTHS: [
        ("crop_image", {"x": 250, "y": 250, "width": 500, "height": 500}),
        ("zoom_image", {"factor": 2, "center_x": 500, "center_y": 500, "image": "original"}),
        ("get_image_info", {"image": 0}),
        ("crop_image", {"x": 0, "y": 0, "width": 1001, "height": 10, "image": 0}),
    ],
}
"""The same calls in both units; the last one is wrong."""


def play(unit):
    """(sample, trajectory) of the calls of a unit and an answer."""
    limits = ViewLimits(**GRID)
    shown = make_picture(PICTURE, limits)
    assert shown.view.size == SEEN
    sample = Sample("s", "Where?", ("[160, 96, 320, 192]",), AnswerType.BOX, (), (shown.sha256,), "test", "train")
    talk = ConversationConfig(coordinates=unit, max_tokens=9000, max_turn_tokens=500, max_turns=8)
    spec = ConversationSpec(talk, limits, tiny_codec())
    think = load_protocol("think")
    turns = [think.render_turn("t", ToolCall(*call)) for call in CALLS[unit]]
    row = play_script(
        Episode(sample, [shown], spec, policy="p", group_id="g", index=0), [*turns, think.render_turn("t", Answer("1"))]
    )
    assert row.stop is StopReason.ANSWER, row.error
    return sample, row


@pytest.fixture(scope="module")
def played():
    return {unit: play(unit) for unit in Coordinates}


# played ---------------------------------------------------------------------------------------------------------------


def test_the_same_calls_make_the_same_images_and_each_text_speaks_its_unit(played):
    rows = {unit: row for unit, (_, row) in played.items()}
    assert rows[PIXELS].images == rows[THOUSANDTHS].images and len(set(rows[PIXELS].images)) == 3
    assert rows[PIXELS].images[1] == pixel_hash(PICTURE.crop((160, 96, 480, 288)))
    assert rows[PIXELS].sizes == rows[THOUSANDTHS].sizes and rows[PIXELS].sizes[0] == SEEN
    for unit, row in rows.items():
        assert row.coordinates is unit
        assert row.extents == (row.sizes if unit is PIXELS else ((1000, 1000),) * 3)
        crop, zoom, info, wrong, _ = row.turns
        extents = [f"{wide}x{high} {unit}." for wide, high in row.extents]
        assert [crop.observation, zoom.observation] == [f"Image 1: {extents[1]}", f"Image 2: {extents[2]}"]
        assert "288x160 pixels as you see it and 640x384 pixels at full resolution." in info.observation
        assert ("thousandths" in info.observation) == (unit is THOUSANDTHS)
        assert wrong.status is CallStatus.ERROR
        assert ("from 0 to 1000" if unit is THOUSANDTHS else "288x160 pixels") in wrong.observation


@pytest.mark.parametrize("protocol", ["think", "qwen"])
@pytest.mark.parametrize("unit", Coordinates)
def test_a_system_prompt_names_one_unit_of_positions(unit, protocol):
    system = render_system_prompt(ConversationConfig(coordinates=unit, protocol=protocol))
    other = PIXELS if unit is THOUSANDTHS else THOUSANDTHS
    assert UNITS[unit] in system and UNITS[other] not in system
    positions = [line for line in system.splitlines() if "crop_image" in line or "zoom_image" in line]
    assert positions and not any("pixels" in line or "thousandths" in line for line in positions)


# replayed -------------------------------------------------------------------------------------------------------------


def stored(root, sample, table):
    """(rollouts, store) with one conversation."""
    store = Store(root)

    def samples(work):
        image = {"sha256": sample.images[0], "data": encode_png(PICTURE), "width": 640, "height": 384}
        work.table("images.parquet", pa.Table.from_pylist([image], records.image_schema()))
        work.table("samples.parquet", pa.Table.from_pylist([records.to_row(sample)], records.sample_schema()))

    dataset, _ = store.build("dataset", Recipe("prepare", 1, records.SCHEMA_VERSION, {}), samples)
    config = {"conversation": {"tools": None}, "images": GRID}
    recipe = Recipe("rollout", 1, records.SCHEMA_VERSION, config, {"dataset": dataset.reference})
    return store.build("rollouts", recipe, lambda work: work.table("trajectories.parquet", table))[0], store


def table_of(row):
    return pa.Table.from_pylist([records.to_row(row)], records.trajectory_schema())


def test_calls_are_replayed_in_the_unit_of_their_row(tmp_path, played):
    for unit, (sample, row) in played.items():
        result = replay(*stored(tmp_path / unit, sample, table_of(row)))
        assert (result.calls, result.problems, result.note) == (3, [], "")
        other = replace(row, coordinates=PIXELS if unit is THOUSANDTHS else THOUSANDTHS)
        (problem,) = replay(*stored(tmp_path / f"not-{unit}", sample, table_of(other))).problems
        assert "turn 1: crop_image" in str(problem)


def test_a_row_without_a_unit_is_read_in_pixels(tmp_path, played):
    sample, row = played[PIXELS]
    table = table_of(row).drop_columns(["coordinates"])
    rollouts, store = stored(tmp_path, sample, table)
    assert list(rollouts.trajectories()) == [row] and row.coordinates is PIXELS
    assert replay(rollouts, store).problems == []
    (in_thousandths,) = table_of(played[THOUSANDTHS][1]).to_pylist()
    assert records.from_row(Trajectory, in_thousandths) == played[THOUSANDTHS][1]


# traced to the picture ------------------------------------------------------------------------------------------------


@st.composite
def chains(draw):
    """(size of a picture, grid, operations); crops and zooms have edges and centres at quarters of what is seen."""
    quarter = st.integers(0, 3)
    operations = []
    for _ in range(draw(st.integers(1, 4))):
        match draw(st.sampled_from(["crop_image", "zoom_image", "adjust_contrast"])):
            case "crop_image":
                x, y = draw(quarter), draw(quarter)
                operations.append(("crop", x, y, draw(st.integers(1, 4 - x)), draw(st.integers(1, 4 - y))))
            case "zoom_image":
                operations.append(("zoom", draw(st.sampled_from([1.5, 2, 4])), draw(quarter), draw(quarter)))
            case _:
                operations.append(("contrast",))
    size = st.integers(200, 900)
    return (draw(size), draw(size)), draw(st.sampled_from([(14, 2), (16, 2)])), operations


def call_of(operation, view):
    """The call of an operation in a unit in which the image's size is `view`, whole numbers as its sides are by 4."""
    wide, high = (side // 4 for side in view)
    match operation:
        case "crop", x, y, width, height:
            args = {"x": x * wide, "y": y * high, "width": width * wide, "height": height * high}
            return "crop_image", args
        case "zoom", factor, x, y:
            return "zoom_image", {"factor": factor, "center_x": x * wide, "center_y": y * high}
        case _:
            return "adjust_contrast", {"factor": 2}


def share_of(operation):
    """(left, top, right, bottom) of what an operation shows, in shares of its source's sides."""
    match operation:
        case "crop", x, y, width, height:
            return x / 4, y / 4, (x + width) / 4, (y + height) / 4
        case "zoom", factor, x, y:
            left, top = (min(max(edge / 4 - 0.5 / factor, 0), 1 - 1 / factor) for edge in (x, y))
            return left, top, left + 1 / factor, top + 1 / factor
        case _:
            return 0, 0, 1, 1


def run_chain(unit, size, limits, operations):
    """(row, images) of the operations, each on the image before."""
    images, sizes, turns = [Image.linear_gradient("L").convert("RGB").resize(size)], [view_size(*size, limits)], []
    for operation in operations:
        name, args = call_of(operation, unit.extent(sizes[-1]))
        result = run_tool(name, args, images, lambda image: view_size(*image.size, limits), coordinates=unit)
        assume(result.error is None)  # a strip that no model takes
        turns.append(replace(call(name, source=result.source, **args), image=str(len(images))))
        images.append(result.image)
        sizes.append(view_size(*result.image.size, limits))
    names = tuple(map(str, range(len(images))))
    return trajectory(*turns, images=names, sizes=tuple(sizes), coordinates=unit), images


@settings(max_examples=60, deadline=None)
@given(chains())
def test_regions_of_chains_of_calls_are_the_same_in_both_units(chain):
    size, (patch, merge), operations = chain
    limits = ViewLimits(min_pixels=3136, max_pixels=120_000, patch=patch, merge=merge)
    rows = {unit: run_chain(unit, size, limits, operations) for unit in Coordinates}
    assert [image.size for image in rows[PIXELS][1]] == [image.size for image in rows[THOUSANDTHS][1]]
    regions = {unit: [(made.region, made.cut) for made in tool_images(row)] for unit, (row, _) in rows.items()}
    expected = (0.0, 0.0, 1.0, 1.0)
    for number, operation in enumerate(operations):
        left, top, right, bottom = share_of(operation)
        x0, y0, x1, y1 = expected
        wide, high = x1 - x0, y1 - y0
        expected = (x0 + left * wide, y0 + top * high, x0 + right * wide, y0 + bottom * high)
        for unit in Coordinates:
            region, cut = regions[unit][number]
            assert region == pytest.approx(expected)
            share = None if operation == ("contrast",) else pytest.approx((right - left) * (bottom - top))
            assert cut == share
    marked = (size[0] * 0.3, size[1] * 0.3, size[0] * 0.1, size[1] * 0.1)
    assert len({holds_region(row, marked, size) for row, _ in rows.values()}) == 1


# shown ----------------------------------------------------------------------------------------------------------------


def test_a_trace_draws_the_box_of_a_call_where_it_was_cut(played):
    shown = {}
    for unit, (sample, row) in played.items():
        images = {
            sha256: PICTURE if not number else PICTURE.crop((0, 0, 50, 40)) for number, sha256 in enumerate(row.images)
        }
        messages = chat_messages(row, sample, images.get, None)
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        wide, high = row.extents[0]
        assert texts[0] == (
            f"Image 0: {wide}x{high} {unit}. Where?\nAnswer with x, y, width, height in {unit} of image 0."
        )
        assert texts.count("Taken from image 0, 640x384 pixels, at (160, 96, 480, 288):") == 2, "the crop and the zoom"
        shown[unit] = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert shown[PIXELS] == shown[THOUSANDTHS]


def test_judges_compare_the_same_pairs_in_both_units(played):
    pairs = {unit: pair_images(row, sample, None) for unit, (sample, row) in played.items()}
    assert pairs[PIXELS] == pairs[THOUSANDTHS]


# a user's own ---------------------------------------------------------------------------------------------------------


def test_a_tool_of_the_users_maps_positions_by_the_frame_in_both_units(tmp_path, monkeypatch):
    (tmp_path / "halves_of_mine.py").write_text(
        '"""Show the left part of the image, up to x."""\n\n'
        "from thinkimg.images.tool import Number, ToolArgs, ToolError\n\n\n"
        "class Args(ToolArgs):\n    x: Number\n\n\n"
        "def region(args, view):\n    return 0, 0, args.x, view[1]\n\n\n"
        "def apply(image, args, frame):\n"
        "    if args.x > frame.view[0]:\n        raise ToolError(f'x is too large: {frame.limits}')\n"
        "    return image.crop(frame.box_to_full(region(args, frame.view)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    tools = load_tools(("halves_of_mine",))
    (tool,) = tools.values()
    for unit, x in ((PIXELS, 72), (THOUSANDTHS, 250)):
        result = run_tool(tool.name, {"x": x}, [PICTURE], lambda image: SEEN, tools, unit)
        assert pixel_hash(result.image) == pixel_hash(PICTURE.crop((0, 0, 160, 384)))
        view = unit.extent(SEEN)
        left, top, right, bottom = tool.cut({"x": x}, view)
        assert (left / view[0], top / view[1], right / view[0], bottom / view[1]) == (0, 0, 0.25, 1)
        error = run_tool(tool.name, {"x": 1001}, [PICTURE], lambda image: SEEN, tools, unit).error
        assert ("from 0 to 1000" if unit is THOUSANDTHS else "288x160 pixels") in error
