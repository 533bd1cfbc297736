"""The mix: what `image` stands for, and what a missing value or a wrong answer does to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.grpo.advantages import group_advantages, mix_rewards
from thinkimg.rewards.joined import Joined
from thinkimg.rewards.mix import Mix, read_mix
from thinkimg.stages.train import check_mix, compute_advantages
from thinkimg.store.manifest import canonical_json

GROUPS, SIZE = 4, 4
NAMES = ("answer", "self", "teacher", "embedding")
groups = np.repeat(np.arange(GROUPS), SIZE)
values = st.one_of(st.none(), st.floats(0, 1, width=16))
columns = st.fixed_dictionaries({name: st.lists(values, min_size=16, max_size=16) for name in NAMES})
rights = st.lists(st.sampled_from([0.0, 0.4, 0.5, 0.7, 1.0]), min_size=16, max_size=16)
valids = st.lists(st.booleans(), min_size=16, max_size=16).map(np.array)
shares = st.dictionaries(st.sampled_from(["self", "teacher", "embedding"]), st.floats(0.1, 5), min_size=1)


def arrays(found):
    return {name: np.array([np.nan if value is None else value for value in row]) for name, row in found.items()}


@given(columns, shares, valids)
@settings(deadline=None)
def test_image_is_the_weighted_mean_of_its_columns(found, types, valid):
    components = arrays(found)
    got = Mix({"image": 0.5}, types).totals(components, groups, valid)
    one_by_one = [share * mix_rewards(components, {name: 1.0}, groups, valid) for name, share in types.items()]
    np.testing.assert_allclose(got[valid], (0.5 * sum(one_by_one) / sum(types.values()))[valid], atol=1e-12)
    assert Mix({"image": 0.5, "self": 0.0}, types | {"attention": 0.0}).columns() == sorted(types)


@given(columns, valids, st.sampled_from(NAMES))
@settings(deadline=None)
def test_a_mix_of_one_component_gives_that_components_advantages(found, valid, name):
    components = arrays(found)
    alone = mix_rewards(components, {name: 1.0}, groups, valid)
    for mix in (
        Mix({name: 1.0}, {}),
        Mix({"image": 1.0}, {name: 0.3}),
        Mix({"image": 1.0, "answer": 0.0}, {name: 7.0}),
    ):
        for scale in ("group", "batch", "none"):
            totals = mix.totals(components, groups, valid)
            np.testing.assert_array_equal(totals, alone)
            one, other = (group_advantages(t, groups, valid, scale_rewards=scale) for t in (totals, alone))
            np.testing.assert_array_equal(one.advantages, other.advantages)


@given(columns, rights, shares, valids)
@settings(deadline=None)
def test_a_wrong_row_has_no_image_reward_and_scores_stay_as_they_are(found, right, types, valid):
    components = arrays(found) | {"answer": np.array(right)}
    before = {name: column.copy() for name, column in components.items()}
    got = Mix({"image": 1.0}, types, only_if_right=True).totals(components, groups, valid)
    assert (got[valid & (components["answer"] < 0.5)] == 0).all()
    full = Mix({"image": 1.0}, types).totals(components, groups, valid)
    judged = valid & (components["answer"] >= 0.5) & ~np.isnan(sum(components[name] for name in types))
    np.testing.assert_array_equal(got[judged], full[judged])
    for name, column in components.items():
        np.testing.assert_array_equal(column, before[name])


@given(columns, rights, valids, st.booleans())
@settings(deadline=None)
def test_a_missing_judgement_has_no_influence(found, right, valid, conditional):
    """Whatever stood in its place, the row is at its group's mean of that column, which is that of the other rows."""
    components = arrays(found) | {"answer": np.array(right)}
    mix = Mix({"image": 1.0}, {"self": 1.0}, conditional)
    got = mix.totals(components, groups, valid)
    column = mix.values(components)["image", "self"]
    for group in range(GROUPS):
        present = (groups == group) & valid & ~np.isnan(column)
        absent = (groups == group) & valid & np.isnan(column)
        expected = column[present].mean() if present.any() else 0.0
        np.testing.assert_allclose(got[absent], expected, atol=1e-12)
        if present.any():
            np.testing.assert_allclose(got[present | absent].mean(), column[present].mean(), atol=1e-12)


def test_a_mix_read_back_from_a_manifest_gives_the_same_bits():
    import json

    config = load_config(
        "tiny", ["mix={tool: 0.3, answer: 0.1, image: 0.7, format: 0.2}", "image.types=[self, embedding]"]
    )
    rng = np.random.default_rng(0)
    components = {name: rng.uniform(size=400) for name in ("tool", "format", *NAMES)}
    stored = json.loads(canonical_json(Mix.from_config(config.mix, config.image).fingerprinted()))
    assert list(stored["mix"]) != list(config.mix)
    ids = np.repeat(np.arange(50), 8)
    joined = Joined([""] * 400, ids, np.array([""] * 400), np.ones(400, dtype=bool), components)
    one, _ = compute_advantages(Mix.from_config(config.mix, config.image), config.train, joined)
    np.testing.assert_array_equal(one, Mix.from_tree(stored).totals(components, ids))


def test_settings_of_image_count_only_where_the_mix_names_it():
    def slices(*overrides):
        config = load_config("tiny", list(overrides))
        return Mix.from_config(config.mix, config.image).fingerprinted()

    plain = "mix={answer: 1.0}"
    assert slices(plain) == slices(plain, "image.only_if_right=true", "image.types=[self]") == {"mix": {"answer": 1.0}}
    named = "mix={image: 1.0}"
    assert slices(named, "image.types=[self]") != slices(named, "image.types=[embedding]")
    assert slices(named, "image.types=[self]", "image.weights.teacher=9") == slices(named, "image.types=[self]")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["mix={imge: 1.0}"], "'imge'"),
        (["mix={image: 1.0}", "image.types=[]"], "no image reward has a weight"),
        (["mix={image: 1.0}", "image.types=[self]", "image.weights.self=0"], "no image reward has a weight"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_at_once(overrides, said):
    with pytest.raises(UserError, match=said):
        check_mix(load_config("tiny", overrides))


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (None, "'mix'"),
        ({"mix": [1]}, "'mix'"),
        ({"mix": {"answer": "much"}}, "'mix.answer'"),
        ({"mix": {"answer": True}}, "'mix'"),
        ({"mix": {"answer": -1}}, "'mix.answer'"),
        ({"mix": {"answer": float("nan")}}, "'mix.answer'"),
        ({"mix": {"answr": 1}}, "'answr'"),
        ({"mix": {"answer": 1}, "imagee": {}}, "'imagee'"),
        ({"mix": {"image": 1}, "image": {"layers": 3}}, "'image.layers'"),
        ({"mix": {"image": 1}, "image": 3}, "'image'"),
        ({"mix": {"image": 1}, "image": {"types": "self"}}, "'image.types'"),
        ({"mix": {"image": 1}, "image": {"weights": {"attention": 1}}}, "'attention'"),
    ],
)
def test_a_mix_file_that_cannot_be_is_one_sentence_with_its_name(tree, said):
    with pytest.raises(UserError, match=f"^some.yaml.*{said}"):
        read_mix(tree, "some.yaml", Mix({}, {"self": 1.0}), NAMES)


def test_a_mix_file_takes_from_the_run_what_it_leaves_out():
    default = Mix({"answer": 1.0}, {"self": 0.7, "embedding": 0.3}, only_if_right=True)
    assert read_mix({"mix": {"image": 1}}, "a", default, NAMES) == Mix({"image": 1.0}, default.types, True)
    changed = read_mix({"mix": {"image": 1}, "image": {"types": ["self"], "only_if_right": False}}, "a", default, NAMES)
    assert changed == Mix({"image": 1.0}, {"self": 0.7}, False)
