"""A user's own tool, in a file outside of the clone: named in the config, played, judged, shown, and replayed."""

import hashlib
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from chat_codecs import tiny_codec
from PIL import Image

from thinkimg import records
from thinkimg.analysis.figures import holds_region
from thinkimg.analysis.verify_calls import replay
from thinkimg.config.load import load_config
from thinkimg.conversation.episode import ConversationSpec, Episode, play_script
from thinkimg.conversation.picture import make_picture
from thinkimg.conversation.protocol import Answer, ToolCall, load_protocol
from thinkimg.conversation.regions import tool_images
from thinkimg.errors import UserError
from thinkimg.images.decode import encode_png
from thinkimg.images.toolbox import TOOLS, load_tools, user_sources
from thinkimg.records import AnswerType, CallStatus, Sample, StopReason
from thinkimg.rewards.judgement import Pair
from thinkimg.rewards.pairs import pair_images
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe
from thinkimg.tracking.traces import chat_messages

MAGNIFY = '''"""Magnify a corner of the image."""

from typing import Literal

from PIL import Image
from pydantic import Field

from thinkimg.images.coordinates import Box, Frame
from thinkimg.images.tool import Number, ToolArgs


class Args(ToolArgs):
    corner: Literal["first", "last"] = "first"
    share: Number = Field(gt=0, le=1)


def region(args: Args, view: tuple[int, int]) -> Box:
    width, height = view[0] * args.share, view[1] * args.share
    if args.corner == "first":
        return 0, 0, width, height
    return view[0] - width, view[1] - height, view[0], view[1]


def apply(image: Image.Image, args: Args, frame: Frame) -> Image.Image:
    return image.crop(frame.box_to_full(region(args, frame.view))).resize(frame.view)
'''
STAMP = '''"""Say nothing of what the image shows."""

from thinkimg.images.tool import ToolArgs as Args


def apply(image, args, frame):
    return image.rotate(180)
'''
GREY = '''"""Give an image of another kind than the promised one."""

from thinkimg.images.tool import ToolArgs as Args


def apply(image, args, frame):
    return image.convert("L")
'''
FILES = {
    "tools/magnify.py": MAGNIFY,
    "tools/stamp.py": STAMP,
    "tools/loupe.py": MAGNIFY,
    "tools/grey.py": GREY,
    "tools/crop_image.py": MAGNIFY,
    "more/magnify.py": MAGNIFY,
    "tools/broken.py": "import nothing_of_this_name",
    "tools/empty.py": '"""No tool."""',
}
TOOL, STAMPING = "users_project.tools.magnify", "users_project.tools.stamp"
OFFER = ("crop_image", "apply_blur", TOOL, STAMPING)
PIXELS = np.random.default_rng(0).integers(0, 256, (224, 448, 3), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory):
    """A project of the user's, on the path and with an entry point; not under this repository."""
    root = tmp_path_factory.mktemp("user")
    for name, source in FILES.items():
        (path := root / "users_project" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (info := root / "users_project-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: users-project\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[thinkimg.tools]\nloupe = users_project.tools.loupe\n")
    sys.path.insert(0, str(root))
    vars(TOOLS).pop("_installed", None)  # looked up once
    yield root / "users_project"
    sys.path.remove(str(root))
    vars(TOOLS).pop("_installed")
    load_tools.cache_clear()


def configured(*tools: str):
    return load_config(
        "tiny", [f"conversation.tools=[{', '.join(tools)}]", "images.max_pixels=50176", "images.min_pixels=784"]
    )


def play(*calls: tuple[str, dict], tools=OFFER):
    """(sample, pictures, trajectory) of scripted calls and an answer."""
    config = configured(*tools)
    shown = make_picture(Image.fromarray(PIXELS), config.view())  # 448 x 224, seen at 308 x 140
    sample = Sample("s", "q?", "a", AnswerType.TEXT, (), (shown.sha256,), "test", "train")
    limits = {"max_tokens": 9000, "max_turn_tokens": 500, "max_turns": 8, "max_images": 8}
    talk = config.conversation.model_copy(update={"system": None} | limits)
    spec = ConversationSpec(talk, config.view(), tiny_codec())
    episode = Episode(sample, [shown], spec, policy="p", group_id="g", index=0)
    think = load_protocol("think")
    turns = [think.render_turn("t", ToolCall(*call)) for call in calls]
    row = play_script(episode, [*turns, think.render_turn("t", Answer("a"))])
    assert row.stop is StopReason.ANSWER, row.error
    return episode, row


QUARTER = ("magnify", {"corner": "last", "share": 0.5})


# named in a config ----------------------------------------------------------------------------------------------------


def test_a_config_takes_import_paths_and_entry_points_and_null_means_the_shipped_ones():
    offered = load_tools(configured(TOOL, "crop_image", "loupe").conversation.tools)
    assert list(offered) == ["magnify", "crop_image", "loupe"] and offered["magnify"].name == "magnify"
    assert list(load_tools(load_config("tiny").conversation.tools)) == list(TOOLS.shipped) and len(TOOLS.shipped) == 11
    assert "loupe" in TOOLS


@pytest.mark.parametrize(
    "tools, said",
    [
        (["flop_image"], "no 'flop_image' among the tools.*crop_image.*loupe"),
        (["users_project.tools.flop"], "no 'users_project.tools.flop' among the tools"),
        (["magnify"], "no 'magnify'"),
        ([TOOL, "users_project.more.magnify"], "'magnify' of the tool users_project.more.magnify is taken"),
        (["crop_image", "crop_image"], "'crop_image' of the tool crop_image is taken"),
        (["users_project.tools.crop_image"], "'crop_image' of the tool users_project.tools.crop_image is taken"),
        (["users_project.tools.broken"], "can't be imported: ModuleNotFoundError.*nothing_of_this_name"),
        (["users_project.tools.empty"], r"is no tool: it lacks Args \(a ToolArgs\) and apply.*crop_image.py"),
    ],
)
def test_a_config_with_a_wrong_name_is_refused(tools, said):
    with pytest.raises(UserError, match=said):
        configured(*tools)


def test_an_entry_point_with_a_shipped_name_is_refused(project, monkeypatch):
    points = project.parent / "users_project-1.0.dist-info" / "entry_points.txt"
    text = points.read_text()
    points.write_text("[thinkimg.tools]\nzoom_image = users_project.tools.loupe\n")
    vars(TOOLS).pop("_installed")
    try:
        with pytest.raises(UserError, match="entry point 'zoom_image'.*taken.*users_project.tools.loupe"):
            configured("loupe_of_mine")
    finally:
        points.write_text(text)


def test_the_fingerprint_of_a_users_tool_is_that_of_its_file(project):
    digest = hashlib.sha256((project / "tools/magnify.py").read_bytes()).hexdigest()
    assert user_sources(("crop_image", TOOL)) == {TOOL: digest}
    assert user_sources(None) == user_sources(("crop_image",)) == {}


# in a conversation ----------------------------------------------------------------------------------------------------


def test_it_is_played_like_any_other():
    wrong = ("magnify", {"corner": "left", "share": 2})
    episode, row = play(QUARTER, wrong, ("loupe", {}), ("users_project.tools.magnify", {"share": 1}))
    made, refused, unknown, path = row.turns[:4]
    assert (made.tool, made.status, made.source) == ("magnify", CallStatus.OK, 0)
    view = episode.pictures[0].view.size
    expected = Image.fromarray(PIXELS).crop((224, 112, 448, 224)).resize(view)
    assert episode.made_images[made.image].tobytes() == expected.tobytes()
    assert "magnify: \"corner\" must be 'first' or 'last'" in refused.error
    assert unknown.error == 'There is no tool "loupe"; on offer: apply_blur, crop_image, magnify, stamp.'
    assert "There is no tool" in path.error
    system = episode.codec.decode(episode.prompt_ids)
    assert 'magnify {"corner": "first" | "last" = "first", "share": number > 0 and <= 1}: Magnify a corner' in system


def test_one_that_breaks_its_promise_says_which_and_how():
    with pytest.raises(UserError, match="an RGB image or a text, and grey gave .*mode=L"):
        play(("grey", {}), tools=("users_project.tools.grey",))


# what its images show -------------------------------------------------------------------------------------------------


def test_its_region_goes_on_through_later_calls():
    view = play(QUARTER)[0].pictures[1].view.size
    half = {"x": 0, "y": 0, "width": view[0] // 2, "height": view[1]}
    episode, row = play(
        QUARTER, ("apply_blur", {"radius": 1}), ("crop_image", half), ("stamp", {}), ("crop_image", half)
    )
    regions = [image.region for image in tool_images(row, OFFER)]
    assert regions[0] == regions[1] == pytest.approx((0.5, 0.5, 1, 1))
    assert regions[2] == pytest.approx((0.5, 0.5, 0.75, 1))
    assert regions[3:] == [None, None], "a tool that states nothing, and what is cut from its image"
    pairs = pair_images(row, episode.sample, OFFER)
    assert [pair.region for pair in pairs] == regions and isinstance(pairs[0], Pair)
    assert [image.region for image in tool_images(row)] == [None] * 5, "to whom the tool is unknown"


def test_a_call_that_takes_the_whole_image_is_worth_nothing():
    episode, row = play(("magnify", {"share": 0.99}))
    assert pair_images(row, episode.sample, OFFER) == ["The magnify took the whole image."]


def test_it_counts_as_a_look_at_the_marked_region_and_traces_show_the_box():
    episode, row = play(QUARTER)
    size = Image.fromarray(PIXELS).size
    assert holds_region(row, (300, 150, 40, 40), size, OFFER) and not holds_region(row, (10, 10, 40, 40), size, OFFER)
    images = {shown.sha256: shown.image for shown in episode.pictures}
    parts = [
        part for message in chat_messages(row, episode.sample, images.get, None, OFFER) for part in message["content"]
    ]
    texts = [part["text"] for part in parts if isinstance(part, dict) and "text" in part]
    assert "Taken from image 0, 448x224 pixels, at (224, 112, 448, 224):" in texts


# replayed -------------------------------------------------------------------------------------------------------------


def stored(root, episode, row, tools=OFFER):
    """(store, rollouts) with one conversation."""
    store, config = Store(root), configured(*tools)

    def samples(work):
        image = {"sha256": row.images[0], "data": encode_png(Image.fromarray(PIXELS)), "width": 448, "height": 224}
        work.table("images.parquet", pa.Table.from_pylist([image], records.image_schema()))
        work.table("samples.parquet", pa.Table.from_pylist([records.to_row(episode.sample)], records.sample_schema()))

    def rows(work):
        work.table("trajectories.parquet", pa.Table.from_pylist([records.to_row(row)], records.trajectory_schema()))

    dataset, _ = store.build("dataset", Recipe("prepare", 1, records.SCHEMA_VERSION, {}), samples)
    settings = {
        "conversation": config.conversation.model_dump(mode="json"),
        "images": {"min_pixels": config.images.min_pixels, "max_pixels": config.images.max_pixels},
    }
    recipe = Recipe("rollout", 1, records.SCHEMA_VERSION, settings, {"dataset": dataset.reference})
    return store, store.build("rollouts", recipe, rows)[0]


def test_its_calls_are_replayed_from_what_the_artifact_says_was_on_offer(tmp_path):
    episode, row = play(QUARTER, ("stamp", {}), ("crop_image", {"x": 0, "y": 0, "width": 50, "height": 50}))
    found = replay(*reversed(stored(tmp_path / "true", episode, row)))
    assert (found.calls, found.problems, found.note) == (3, [], "")
    forged = replace(row.turns[0], args=row.turns[0].args.replace("0.5", "0.6"))
    lie = replace(row, turns=(forged, *row.turns[1:]))
    (problem,) = replay(*reversed(stored(tmp_path / "forged", episode, lie))).problems
    assert "magnify" in str(problem)


def test_without_the_users_module_nothing_is_replayed_and_that_is_said(tmp_path, project, monkeypatch):
    store, rollouts = stored(tmp_path, *play(QUARTER))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(project.parent)])
    for name in [name for name in sys.modules if name.startswith("users_project")]:
        monkeypatch.delitem(sys.modules, name)
    load_tools.cache_clear()
    found = replay(rollouts, store)
    assert found.calls == 0 and f"no '{TOOL}' among the tools" in found.note
