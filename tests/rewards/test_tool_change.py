"""The tool reward pays for pictures that show something else, and not for calls that do nothing."""

from functools import partial

import numpy as np
import pytest
from PIL import Image
from rewards_rows import batch, call, final, sample, trajectory

from thinkimg.conversation.picture import make_picture, model_view_size
from thinkimg.conversation.text_core import dump_args
from thinkimg.images.settings import ViewLimits
from thinkimg.images.toolbox import run_tool
from thinkimg.records import CallStatus, Turn, TurnKind
from thinkimg.rewards.rules.tool import score

VIEW = ViewLimits(min_pixels=28 * 28, max_pixels=1280 * 28 * 28)


def photograph(width=450, height=330):
    """Shapes with edges on a gradient, with some noise: neither smooth nor all edges."""
    ys, xs = np.mgrid[:height, :width]
    shapes = (((xs // 37 + ys // 53) % 3) * 60)[..., None] + np.stack([xs * 90 / width, ys * 90 / height, xs * 0], -1)
    noise = np.random.default_rng(3).normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(shapes + noise + 20, 0, 255).astype(np.uint8))


def noise(width=400, height=300):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Images:
    def __init__(self):
        self.known = {}

    def decoded(self, sha256):
        return self.known[sha256]


def conversation(image, *calls):
    """Return (value, evidence) of a conversation that makes these calls, (tool, args) each, on the current image."""
    images, pictures, turns = Images(), [make_picture(image, VIEW)], []
    for tool, args in calls:
        result = run_tool(tool, args, [shown.image for shown in pictures], partial(model_view_size, limits=VIEW))
        assert result.error is None, result.error
        made = make_picture(result.image, VIEW) if result.image else None
        twin = made and any(made.sha256 == shown.sha256 for shown in pictures)
        turns.append(
            Turn(
                "", TurnKind.TOOL, tool, dump_args(args), CallStatus.DUPLICATE if twin else CallStatus.OK,
                source=result.source, image=made and made.sha256, observation="",
            )
        )  # fmt: skip
        pictures += [made] if made else []
    images.known = {shown.sha256: shown.image for shown in pictures}
    row = trajectory(
        *turns, final(), answer="red", images=tuple(shown.sha256 for shown in pictures),
        grids=tuple(shown.grid for shown in pictures), sizes=tuple(shown.view.size for shown in pictures),
    )  # fmt: skip
    (one,) = score(batch([row], sample(images=(pictures[0].sha256,)), images))
    return one.value, one.evidence


NOTHING = [
    ("get_image_info", {}),
    *[("adjust_brightness", {"factor": factor}) for factor in (0.99, 1, 1.005, 1.01)],
    *[("adjust_contrast", {"factor": factor}) for factor in (0.99, 1, 1.01)],
    *[("apply_sharpen", {"factor": factor}) for factor in (0.99, 1, 1.01, 1.05)],
    *[("apply_blur", {"radius": radius}) for radius in (0, 0.01, 0.1)],
    *[("rotate_image", {"angle": angle}) for angle in (0, 0.01, -0.01, 0.1, 359.99, 360, 1e-6)],
    *[("rotate_image", {"angle": angle, "expand": False}) for angle in (0.01, 0.05)],
    ("zoom_image", {"factor": 1, "center_x": 50, "center_y": 50}),
    ("zoom_image", {"factor": 1.01, "center_x": 50, "center_y": 50}),
    ("resize_image", {"width": 450, "height": 330}),
    ("resize_image", {"width": 460, "height": 340}),
    ("crop_image", {"x": 0, "y": 0, "width": 440, "height": 330}),
]
SOMETHING = [
    *[("adjust_brightness", {"factor": factor}) for factor in (0.5, 1.3, 3)],
    *[("adjust_contrast", {"factor": factor}) for factor in (0.3, 2)],
    ("apply_sharpen", {"factor": 6}), ("apply_blur", {"radius": 4}), ("convert_grayscale", {}),
    *[("rotate_image", {"angle": angle}) for angle in (-90, 5, 90, 180)],
    ("flip_image", {"direction": "horizontal"}), ("flip_image", {"direction": "vertical"}),
    ("zoom_image", {"factor": 2, "center_x": 50, "center_y": 50}),
    ("resize_image", {"width": 900, "height": 660}),
    ("crop_image", {"x": 10, "y": 10, "width": 90, "height": 60}),
    ("crop_image", {"x": 0, "y": 0, "width": 200, "height": 300}),
]  # fmt: skip


@pytest.mark.parametrize("image", [photograph(), noise(), photograph(1100, 500), noise(60, 40)])
def test_a_call_that_changes_nothing_earns_nothing(image):
    in_pixels = ("crop_image", "resize_image", "zoom_image")
    calls = [one for one in NOTHING if image.width == 450 or one[0] not in in_pixels]
    calls = [one for one in calls if image.width < 1000 or one[1].get("angle") != 0.1]  # moves by 3 pixels there
    assert [one for one in calls if conversation(image, one)[0] != 0] == []


def test_a_call_that_shows_something_else_earns_all():
    assert [one for one in SOMETHING if conversation(photograph(), one)[0] != 1] == []


def test_there_and_back_again_is_nothing_new():
    back = [("adjust_brightness", {"factor": 0.5}), ("adjust_brightness", {"factor": 2})]
    value, evidence = conversation(photograph(), *back)
    assert value == 0.5 and evidence == {"calls": 2, "new": 1, "duplicates": 1, "errors": 0}
    assert conversation(photograph(), *[("rotate_image", {"angle": 90})] * 4)[0] == 0.75


def test_information_counts_neither_for_nor_against_the_other_calls():
    info, crop = ("get_image_info", {}), ("crop_image", {"x": 10, "y": 10, "width": 90, "height": 60})
    assert conversation(photograph(), info, crop)[0] == 1
    assert conversation(photograph(), crop, info, ("adjust_brightness", {"factor": 1.01}))[0] == 0.5
    assert conversation(photograph(), crop, info, info)[0] == 0.5  # asked twice about the same image


def test_without_the_stored_image_the_call_counts():
    row = trajectory(
        call("adjust_brightness", factor=1.01, source=0), final(), answer="red", images=("ab" * 32, "cd" * 32),
        grids=((1, 4, 4), (1, 4, 4)),
    )  # fmt: skip
    assert score(batch([row], images=Images()))[0].value == 1
