"""The puzzles of every family of models: pictures fit its tokens, and conversations are in its unit of positions."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from chat_codecs import tiny_codec
from single_stage import build_stage
from users_photographs import photographs

from thinkimg.cli.data import summarise_dataset
from thinkimg.config.load import load_config
from thinkimg.conversation.episode import ConversationSpec, Episode, play_script
from thinkimg.conversation.picture import make_picture
from thinkimg.images.decode import pixel_hash
from thinkimg.puzzles.demonstrations import has_right_calls, make_wrong_calls, read_solution, shows_target, write_script
from thinkimg.puzzles.geometry import CELLS, SCALE, Geometry
from thinkimg.puzzles.known_pairs import apply_calls, draw_other_crop, make_known_pairs
from thinkimg.puzzles.scenes import Family
from thinkimg.puzzles.settings import Flaws
from thinkimg.records import CallStatus, Coordinates, StopReason
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.prepare import prepare, puzzles
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable

# Nobody's: patches of 10 pixels, three of them in a row of a token, and positions in thousandths.
MADE_UP = """
from dataclasses import replace

from thinkimg.families.qwen2_5_vl import Qwen2_5_VL
from thinkimg.records import Coordinates


class MadeUp(Qwen2_5_VL):
    processor = replace(Qwen2_5_VL.processor, patch=10, merge=3)
    coordinates = Coordinates.THOUSANDTHS


FAMILY = MadeUp()
"""
PIXELS, THOUSANDTHS = Coordinates
FAMILIES = {  # side of a token in pixels, and unit of positions
    "qwen2_5_vl": (28, PIXELS),
    "qwen3_vl": (32, THOUSANDTHS),
    "qwen3_5": (32, THOUSANDTHS),
    "family_of_nobody": (30, THOUSANDTHS),
}
COUNT = 24  # puzzles, each kind six times
RIGHT, WRONG = Flaws(guess=0, wrong_call=0), Flaws(guess=0, wrong_call=1)


class Puzzles:
    """Puzzles of a family under the preset `tiny`, and conversations about them."""

    def __init__(self, family, root):
        self.side, self.unit = FAMILIES[family]
        self.config = load_config("tiny", [f"model.tiny.family={family}", f"data.train={COUNT}", "data.held_out=4"])
        self.store = Store(root)
        self.dataset, _ = build_stage(prepare, self.config, self.store)
        self.samples = self.dataset.split("train")
        self.images, self.view = ImageTable([self.dataset]), self.config.view()
        # Room for a tokenizer that was not made for these texts.
        self.talk = self.config.talk().model_copy(update={"max_turn_tokens": 1000, "max_tokens": 4000})

    def picture(self, sample):
        return self.images.decoded(sample.images[0])

    def play(self, sample, flaws):
        """The demonstration's row, and the episode."""
        picture = make_picture(self.picture(sample), self.view)
        spec = ConversationSpec(self.talk, self.view, tiny_codec())
        episode = Episode(sample, [picture], spec, policy="p", group_id="g", index=0)
        return play_script(episode, write_script(sample, self.talk, flaws, np.random.default_rng(0))), episode


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Family -> its puzzles, made when they are asked for."""
    code = tmp_path_factory.mktemp("code")
    (code / "family_of_nobody.py").write_text(MADE_UP)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(code)
        yield cache(lambda family: Puzzles(family, tmp_path_factory.mktemp(family)))


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_with_the_preset_a_picture_is_seen_as_four_by_four_tokens(made, family):
    world = made(family)
    assert {s.metadata["family"] for s in world.samples} == set(Family) and world.view.token_side == world.side
    for sample in world.samples:
        picture = make_picture(world.picture(sample), world.view)
        assert picture.image.size == (16 * world.side,) * 2 and picture.view.size == (4 * world.side,) * 2
        assert picture.tokens == 16
        for x, y, width, height in sample.targets:
            assert width == height == SCALE * world.side and x % width == y % height == 0


@every_family
def test_a_right_demonstration_shows_the_answer_in_the_familys_unit(made, family):
    world, cells = made(family), 0
    for sample in world.samples:
        row, episode = world.play(sample, RIGHT)
        assert row.stop is StopReason.ANSWER and row.answer == sample.answer and row.coordinates is world.unit
        assert len(row.turns) == len(sample.metadata["solution"]) + 1
        assert all(turn.status is CallStatus.OK for turn in row.turns[:-1])
        assert has_right_calls(sample, row, world.talk.tools)
        assert [picture.tokens for picture in episode.pictures] == [16] * len(row.images)
        assert row.images[-1] == pixel_hash(apply_calls(world.picture(sample), read_solution(sample)))
        for x, y, width, height in sample.targets:
            shown = world.picture(sample).crop((x, y, x + width, y + height))
            assert row.images[1] == pixel_hash(shown)
            args, step = json.loads(row.turns[0].args), world.side if world.unit is PIXELS else 250
            assert args == {"x": x / width * step, "y": y / height * step, "width": step, "height": step}
            assert row.extents[0] == (4 * step, 4 * step)
            cells += 1
    assert cells == COUNT / 2


@every_family
def test_a_wrong_demonstration_does_not_show_it(made, family):
    world = made(family)
    for sample in world.samples:
        row, _ = world.play(sample, WRONG)
        kind = Family(sample.metadata["family"])
        assert row.stop is StopReason.ANSWER and not has_right_calls(sample, row, world.talk.tools)
        assert row.turns[0].status is not CallStatus.ERROR and row.turns[0].image is not None
        mistake = apply_calls(world.picture(sample), make_wrong_calls(kind, read_solution(sample)))
        assert row.images[1:] == (pixel_hash(mistake),)
        if kind is Family.DETAIL:
            x, y, side, _ = sample.targets[0]
            x = (x + side) % (CELLS * side)
            assert mistake.tobytes() == world.picture(sample).crop((x, y, x + side, y + side)).tobytes()


@every_family
def test_a_row_that_is_read_in_another_unit_is_not_the_same_calls(made, family):
    """Positions of one unit lie elsewhere in the other: a check that ignores the row's would take them for right."""
    world = made(family)
    other = THOUSANDTHS if world.unit is PIXELS else PIXELS
    for sample in world.samples:
        row, _ = world.play(sample, RIGHT)
        assert has_right_calls(sample, replace(row, coordinates=other)) is not bool(sample.targets)


@every_family
def test_the_right_image_of_a_known_pair_is_that_of_the_demonstration(made, family):
    world = made(family)
    pairs = list(make_known_pairs(world.samples, world.images.decoded, seed=3))
    for pair in pairs:
        row, _ = world.play(pair.sample, RIGHT)
        assert row.images[-1] == pixel_hash(pair.right) and row.images[0] == pixel_hash(pair.original)
        assert len({pixel_hash(image) for image in (pair.original, pair.right, pair.wrong)}) == 3
        assert all(make_picture(image, world.view).tokens == 16 for image in (pair.right, pair.wrong))
    cell = 4 * world.side
    assert {pair.right.size for pair in pairs if pair.sample.targets} == {(cell, cell)}


@every_family
def test_another_part_of_the_picture_is_one_cell_large_inside_of_it_and_not_the_marked_one(made, family):
    world, rng = made(family), np.random.default_rng(0)
    for sample in world.samples:
        for target in sample.targets:
            for _ in range(20):
                args = draw_other_crop(sample, rng).args
                x, y, width, height = (SCALE * args[name] for name in ("x", "y", "width", "height"))
                assert width == height == target[2] and max(x, y) + width <= 16 * world.side
                assert not shows_target((x, y, x + width, y + height), target)


def test_families_with_equal_tokens_share_their_puzzles_and_others_do_not(made):
    keys = {family: made(family).dataset.fingerprint for family in FAMILIES}
    assert len(set(keys.values())) == 3 and keys["qwen3_vl"] == keys["qwen3_5"]
    texts = {family: [(s.sample_id, s.question, s.answers) for s in made(family).samples] for family in FAMILIES}
    assert all(rows == texts["qwen2_5_vl"] for rows in texts.values())


@every_family
def test_judges_of_a_users_data_learn_from_puzzles_of_the_models_size(made, family, tmp_path):
    world = made(family)
    limits = ["images.min_pixels=3136", "images.max_pixels=1003520"]  # far from the puzzles'
    settings = [f"model.tiny.family={family}", "image.embedding={model: warmstart, pretrained: null}"]
    config = load_config("tiny", [*photographs(tmp_path), *settings, *limits])
    settings = puzzles.settings(config)
    small = settings.model_copy(update={"data": settings.data.model_copy(update={"train": 4, "held_out": 1})})
    dataset, _ = build_stage(replace(puzzles, settings=lambda config: small), config, Store(tmp_path / "store"))
    pairs, _ = build_stage(known_pairs, config, Store(tmp_path / "store"), dataset=dataset, count=4)
    assert set(dataset.image_sizes(dataset.split("train")[0].images).values()) == {(16 * world.side,) * 2}
    assert len(pairs.rows()) == 4


@every_family
def test_a_prepared_data_set_is_shown_at_the_size_at_which_the_model_sees_it(made, family):
    world = made(family)
    (example,) = summarise_dataset(world.dataset, count=1, pictures=False).examples
    assert f"{4 * world.side}x{4 * world.side}" in example.text


def test_a_data_set_of_an_earlier_version_is_shown_as_the_only_family_saw_it(made, monkeypatch):
    world = made("qwen2_5_vl")
    monkeypatch.delitem(world.dataset.manifest["recipe"]["config"], "token_side")
    (example,) = summarise_dataset(world.dataset, count=1, pictures=False).examples
    assert "112x112" in example.text


def test_the_geometry_of_a_picture_is_that_which_it_was_made_with():
    for side in range(20, 80):
        geometry = Geometry(side)
        assert Geometry.of_picture((geometry.size, geometry.size)) == geometry
        assert geometry.cell * CELLS == geometry.size == SCALE * geometry.view
