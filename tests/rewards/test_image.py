"""Image rewards as functions of judgements: the image that counts, images that are worth nothing, fallbacks."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rewards_rows import call, failed, final, malformed, sample, trajectory

from thinkimg.records import CallStatus
from thinkimg.rewards.batch import Batch, Status
from thinkimg.rewards.judge import Judge
from thinkimg.rewards.judgement import JudgeIdentity, Judgement, Pair
from thinkimg.rewards.judges import attention, self, teacher
from thinkimg.rewards.pairs import find_defect, pair_images
from thinkimg.rewards.registry import load_components
from thinkimg.rewards.settings import JUDGES, ImageConfig, RewardsConfig

SHA, ONE, TWO, THREE = ("ab" * 32, *(letter * 64 for letter in "123"))
WHO = JudgeIdentity("embedding", "m", "w", "p")


def shown(image: str, status: CallStatus = CallStatus.OK, source: int = 0, tool: str = "crop_image", **args):
    args = args or {"x": 0, "y": 0, "width": 14, "height": 14}
    return replace(call(tool, status, source, **args), image=image)


def row(*turns, **changes):
    images = (SHA, *(turn.image for turn in turns if turn.image))
    return trajectory(*turns, answer="red", images=images, grids=((1, 4, 4),) * len(images), **changes)


def judged(**values: float | None):
    """Judgements of every component for images by name."""
    names = {"one": ONE, "two": TWO, "three": THREE}
    return {
        (component, Pair("Which colour?", SHA, names[name])): Judgement(
            value, "It broke." if value is None else None, {}, WHO
        )
        for component in JUDGES
        for name, value in values.items()
    }


def batch(rows, judgements, **image) -> Batch:
    return Batch(rows, {"s0": sample()}, RewardsConfig(), None, ImageConfig(**image), judgements)


def test_only_the_named_judges_are_components():
    names = list(load_components(RewardsConfig(), ImageConfig(types=("self", "embedding"))))
    assert names == ["answer", "embedding", "format", "self", "tool"]
    assert not set(load_components(RewardsConfig(), ImageConfig(types=()))) & set(JUDGES)


@pytest.mark.parametrize("which, value", [("final", 0.25), ("best", 0.75), ("mean", 0.5)])
def test_which_of_several_images_counts(which, value):
    rows = [row(shown(ONE), shown(TWO), final())]
    (found,) = load_components(RewardsConfig(), ImageConfig())["embedding"](
        batch(rows, judged(one=0.75, two=0.25), which=which)
    )
    assert found.value == value and found.status is Status.OK
    assert len(found.evidence["judgements"]) == (1 if which == "final" else 2)


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([malformed()], "No image was processed."),
        ([call("get_image_info")], "No image was processed."),
        ([shown(SHA, CallStatus.DUPLICATE, tool="adjust_brightness", factor=1.0)], "same as one before"),
        ([shown(ONE, x=0, y=0, width=56, height=56)], "took the whole image"),
        ([shown(ONE, tool="zoom_image", factor=1.01, center_x=28, center_y=28)], "took the whole image"),
    ],
)
def test_what_shows_nothing_new_is_worth_nothing_with_the_reason(turns, reason):
    for name in JUDGES:
        (found,) = Judge(name, JUDGES[name]).score(batch([row(*turns, final())], {}, types=(name,)))
        assert found.value == 0 and found.status is Status.ZERO and reason in found.reason


def test_a_failed_judgement_and_a_failed_conversation_are_missing_with_their_reasons():
    found = Judge("embedding", JUDGES["embedding"]).score(batch([row(shown(ONE), final()), failed()], judged(one=None)))
    assert [one.status for one in found] == [Status.MISSING] * 2
    assert [one.reason for one in found] == ["It broke.", "The conversation failed."]


def test_images_in_which_nothing_can_be_seen():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert find_defect(noise) is None
    assert "one colour" in find_defect(Image.new("RGB", (64, 64), (3, 4, 5)))
    assert "sliver" in find_defect(noise.resize((64, 4))) and "sliver" in find_defect(noise.resize((400, 10)))


fractions = st.tuples(*[st.integers(0, 55)] * 2, *[st.integers(1, 56)] * 2).filter(
    lambda box: box[0] + box[2] <= 56 and box[1] + box[3] <= 56 and box[2] * box[3] < 0.9 * 56 * 56
)


@given(outer=fractions, inner=fractions)
def test_the_region_of_a_crop_of_a_crop_is_the_part_of_the_part(outer, inner):
    def crop(box, source, image):
        x, y, width, height = box
        return shown(image, source=source, x=x, y=y, width=width, height=height)

    first, second = pair_images(row(crop(outer, 0, ONE), crop(inner, 1, TWO), final()), sample())
    assert first.region == pytest.approx(
        (outer[0] / 56, outer[1] / 56, (outer[0] + outer[2]) / 56, (outer[1] + outer[3]) / 56)
    )
    assert second.original == SHA
    for axis in (0, 1):
        low, high = first.region[axis], first.region[axis + 2]
        expected = [low + inner[axis] / 56 * (high - low), low + (inner[axis] + inner[axis + 2]) / 56 * (high - low)]
        assert [second.region[axis], second.region[axis + 2]] == pytest.approx(expected)


def test_a_turned_image_has_no_region_and_what_is_cut_from_it_neither():
    turned = shown(ONE, tool="rotate_image", angle=90)
    assert [pair.region for pair in pair_images(row(turned, shown(TWO, source=1), final()), sample())] == [None, None]


logps = st.floats(-50, 0)


@given(a=logps, b=logps, c=logps, d=logps)
def test_swapping_the_two_images_turns_the_preference_around(a, b, c, d):
    value = self.judge_ratings([a, b], [c, d]).value
    assert 0 <= value <= 1
    # What was the processed image is now the original: the two orders change places.
    assert self.judge_ratings([c, d], [a, b]).value == pytest.approx(1 - value, abs=1e-12)
    assert self.judge_ratings([a, b], [a, b]).value == pytest.approx(0.5)  # a judge that looks at positions only


def test_a_judge_without_either_rating_has_no_value():
    assert self.judge_ratings([-math.inf, -math.inf], [0.0, -1.0]).value is None


def test_relative_attention_is_half_where_the_question_looks_no_more_than_any_text():
    assert attention.judge_masses({"question": 0.2, "generic": 0.2}, "0/text").value == 0.5
    assert attention.judge_masses({"question": 0.3, "generic": 0.1}, "0/text").value == 0.75
    assert attention.judge_masses({"question": 0.3, "generic": 0.0}, "0/text").value is None


def group(name: str, *images: str):
    return [row(shown(image), final(), group_id=name, trajectory_id=f"{name}{i}") for i, image in enumerate(images)]


@pytest.mark.parametrize("fallback", ["self", "skip"])
def test_a_teacher_that_was_lost_half_way_is_replaced_for_whole_groups(fallback):
    rows = group("a", ONE, TWO) + group("b", ONE, THREE)
    judgements = judged(one=0.9, two=0.8, three=0.1)
    lost = Pair("Which colour?", SHA, THREE)
    judgements["teacher", lost] = Judgement(None, "No answer.", {}, WHO, unreachable=True)
    for key in [key for key in judgements if key[0] == "self"]:
        judgements[key] = replace(judgements[key], value=0.4)
    found = teacher.score(batch(rows, judgements, types=("teacher",), teacher={"fallback": fallback}))
    assert [one.value for one in found[:2]] == [0.9, 0.8] and "fallback" not in json.dumps(found[0].evidence)
    if fallback == "self":
        assert [one.value for one in found[2:]] == [0.4, 0.4]
        assert all(one.evidence["fallback"] == "self" and "No answer" in one.evidence["because"] for one in found[2:])
    else:
        assert [one.status for one in found[2:]] == [Status.MISSING] * 2


def test_a_rating_outside_of_the_top_is_missing_for_its_row_only():
    rows = group("a", ONE, TWO)
    judgements = judged(one=0.9, two=None)
    found = teacher.score(batch(rows, judgements, types=("teacher",)))
    assert [one.value for one in found] == [0.9, None]
