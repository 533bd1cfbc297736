"""Mixing and advantages: TRL's numbers where TRL is defined, and no influence of what is missing or excluded."""

import subprocess
import sys

import numpy as np
import pytest
import trl_reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from thinkimg.errors import UserError
from thinkimg.grpo.advantages import Inclusion, group_advantages, mix_rewards, select_included_rows
from thinkimg.grpo.settings import LossConfig

SCALES = ["group", "batch", "none"]
unit = st.floats(0, 1, width=32)
scales = st.sampled_from(SCALES)
TRL_CLOSE = {"rtol": 1e-7, "atol": 1e-7}  # TRL counts the n of n - 1 in float32


def vectors(n: int, elements: st.SearchStrategy, dtype: type = float) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(dtype, n, elements=elements)


@st.composite
def rollouts(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """totals, group ids in any order, valid; small groups, repeated totals and invalid NaN rows are common."""
    n = draw(st.integers(1, 14))
    groups = draw(vectors(n, st.integers(0, 3), int))
    valid = draw(vectors(n, st.booleans(), bool))
    totals = draw(vectors(n, st.sampled_from([0.0, 0.01, 0.5, 1.0]) | unit))
    return np.where(valid, totals, np.nan), groups, valid


# --- against TRL


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_equal_to_trl(scale, group_size):
    totals = np.random.default_rng(group_size).random(4 * group_size)
    totals[:group_size] = 0.5  # a group without any spread
    groups = np.repeat([7, 3, 5, 1], group_size)
    _, output = trl_reference.score(LossConfig(scale_rewards=scale), rewards=totals, group_size=group_size)
    result = group_advantages(totals, groups, np.ones(len(totals), bool), scale_rewards=scale, min_std=0.0)
    np.testing.assert_allclose(result.advantages, output["advantages"].numpy(), **TRL_CLOSE)


@pytest.mark.parametrize("scale", SCALES)
def test_rows_that_remain_are_treated_as_trl_treats_a_batch_of_them(scale):
    rng = np.random.default_rng(0)
    totals, groups, valid = rng.random(20), np.repeat(np.arange(5), 4), np.ones(20, bool)
    valid[[0, 5, 10, 15]] = False  # three of four stay in groups 0 to 3
    totals[16:] = 0.25  # group 4 is silent
    rest = valid & (groups < 4)
    _, output = trl_reference.score(LossConfig(scale_rewards=scale), rewards=totals[rest], group_size=3)
    result = group_advantages(totals, groups, valid, scale_rewards=scale)
    assert (result.included == rest).all()
    np.testing.assert_allclose(result.advantages[rest], output["advantages"].numpy(), **TRL_CLOSE)


# --- properties of advantages


@given(rollouts(), scales, st.floats(0, 0.5))
def test_reasons_account_for_every_row(rollout, scale, min_std):
    totals, groups, valid = rollout
    result = group_advantages(totals, groups, valid, scale_rewards=scale, min_std=min_std)
    silent = []
    for group in np.unique(groups):
        members = groups == group
        values = totals[members & valid]
        if len(values) < 2:
            expected = Inclusion.ALONE
        elif np.std(values, ddof=1) < min_std - 1e-12:
            expected = Inclusion.SILENT
        elif np.std(values, ddof=1) > min_std + 1e-12:
            expected = Inclusion.INCLUDED
        else:  # within rounding of the limit: either
            expected = result.reasons[members & valid][0]
        if expected == Inclusion.SILENT:
            silent.append(group)
        assert set(result.reasons[members & valid]) <= {expected}
    assert (result.reasons[~valid] == Inclusion.INVALID).all()
    assert result.silent_groups.tolist() == silent
    assert (result.included == (result.reasons == "included")).all()
    assert not result.advantages[~result.included].any()
    assert np.isfinite(result.advantages).all()


@given(rollouts(), scales, st.data())
def test_excluded_rows_influence_nobody(rollout, scale, data):
    """Neither invalid rows, nor rows alone, nor silent groups; and not even the batch's standard deviation."""
    totals, groups, valid = rollout
    result = group_advantages(totals, groups, valid, scale_rewards=scale)
    keep = result.included
    alone = group_advantages(totals[keep], groups[keep], valid[keep], scale_rewards=scale)
    np.testing.assert_allclose(alone.advantages, result.advantages[keep], rtol=1e-9, atol=1e-9)
    assert alone.included.all()

    noise = data.draw(vectors(len(totals), st.floats(-1e6, 1e6) | st.just(np.nan)))
    noisy = group_advantages(np.where(valid, totals, noise), groups, valid, scale_rewards=scale)
    np.testing.assert_array_equal(noisy.advantages, result.advantages)


@given(rollouts(), scales, st.randoms(use_true_random=False))
def test_group_sums_are_zero_and_order_is_kept(rollout, scale, random):
    totals, groups, valid = rollout
    result = group_advantages(totals, groups, valid, scale_rewards=scale)
    for group in np.unique(groups):
        members = result.included & (groups == group)
        assert abs(result.advantages[members].sum()) < 1e-9
        assert (np.diff(result.advantages[members][np.argsort(totals[members])]) >= 0).all()
    order = np.array(random.sample(range(len(totals)), len(totals)))
    shuffled = group_advantages(totals[order], groups[order], valid[order], scale_rewards=scale)
    np.testing.assert_allclose(shuffled.advantages, result.advantages[order], rtol=1e-9, atol=1e-9)
    assert (shuffled.reasons == result.reasons[order]).all()


def test_group_ids_may_be_strings_and_a_batch_may_be_empty():
    result = group_advantages(
        np.array([0.0, 1.0, 0.5, 0.5]), np.array(["b", "b", "a", "a"]), np.ones(4, bool), scale_rewards="none"
    )
    assert result.advantages.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert result.silent_groups.tolist() == ["a"]
    empty = group_advantages(np.zeros(0), np.zeros(0, int), np.zeros(0, bool), scale_rewards="batch")
    assert empty.advantages.shape == empty.included.shape == empty.reasons.shape == (0,)


def test_a_valid_row_without_a_total_is_our_mistake():
    with pytest.raises(AssertionError):
        group_advantages(np.array([np.nan, 1.0]), np.zeros(2, int), np.ones(2, bool), scale_rewards="none")


# --- properties of the mix


@st.composite
def scored(draw) -> tuple[dict[str, np.ndarray], dict[str, float], np.ndarray, np.ndarray]:
    n = draw(st.integers(1, 12))
    components = {name: draw(vectors(n, unit | st.just(np.nan))) for name in ("format", "answer", "image")}
    weights = draw(st.dictionaries(st.sampled_from(list(components)), st.floats(0, 3, width=32)))
    return components, weights, draw(vectors(n, st.integers(0, 3), int)), draw(vectors(n, st.booleans(), bool))


@given(scored())
def test_a_missing_value_moves_neither_its_group_nor_its_row(case):
    """Per group and component: the mean is that of the values that are there, and the row lies on it."""
    components, weights, groups, valid = case
    totals = mix_rewards(components, weights, groups, valid)
    assert np.isfinite(totals).all()
    for group in np.unique(groups):
        members = groups == group
        expected = np.zeros(members.sum())
        for name, weight in weights.items():
            values = components[name][members]
            seen = values[valid[members] & ~np.isnan(values)]
            expected += weight * np.where(np.isnan(values), seen.mean() if len(seen) else 0.0, values)
            if len(seen):
                filled = mix_rewards({name: components[name]}, {name: 1.0}, groups, valid)[members & valid]
                assert filled.mean() == pytest.approx(seen.mean(), abs=1e-9)
        np.testing.assert_allclose(totals[members], expected, rtol=1e-9, atol=1e-9)


@given(scored(), scales)
def test_a_component_that_nobody_has_leaves_the_advantages_to_the_rest(case, scale):
    components, weights, groups, valid = case
    nobody = components | {"image": np.full(len(groups), np.nan)}
    rest = {name: weight for name, weight in weights.items() if name != "image"}
    np.testing.assert_array_equal(
        mix_rewards(nobody, weights | {"image": 2.0}, groups, valid), mix_rewards(nobody, rest, groups, valid)
    )


@given(scored())
def test_values_of_invalid_rows_reach_no_valid_row(case):
    components, weights, groups, valid = case
    changed = {name: np.where(valid, values, 1.0 - np.nan_to_num(values)) for name, values in components.items()}
    before, after = (mix_rewards(c, weights, groups, valid) for c in (components, changed))
    np.testing.assert_array_equal(before[valid], after[valid])


def test_without_missing_values_the_mix_is_the_weighted_sum():
    components = {"answer": np.array([0.0, 1.0]), "format": np.array([1.0, 0.5]), "unused": np.array([np.nan, 9.0])}
    assert mix_rewards(components, {"answer": 0.75, "format": 0.5}, np.zeros(2)).tolist() == [0.5, 1.0]


def test_a_mix_of_unscored_components_is_refused():
    with pytest.raises(UserError, match="imagee") as caught:
        mix_rewards({"image": np.zeros(1)}, {"imagee": 1.0}, np.zeros(1))
    assert "image" in caught.value.hint


# --- rows for the loss


@given(vectors(8, st.booleans(), bool), vectors(8, st.booleans(), bool), st.booleans())
def test_included_rows(included, truncated, drop):
    rows = select_included_rows(included, truncated, mask_truncated_completions=drop)
    assert rows.tolist() == [i for i in range(8) if included[i] and not (drop and truncated[i])]


def test_advantages_do_not_import_torch():
    code = "import sys, thinkimg.grpo.advantages; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "False"
