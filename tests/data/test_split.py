"""The split: nothing on both sides, near the share, and little moved by more data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.data.split import choose_held_out, group_by_images, rank
from thinkimg.errors import UserError

NAMES = st.sets(st.text(st.characters(codec="utf-8"), max_size=5), min_size=2, max_size=40)


@given(NAMES, st.floats(0, 1), st.integers())
def test_some_but_not_all_groups_are_held_out_whatever_their_order(groups, share, seed):
    out = choose_held_out(sorted(groups), share, seed)
    assert out == choose_held_out(sorted(groups, reverse=True) * 2, share, seed)
    assert out < groups and out
    assert abs(len(out) - share * len(groups)) <= 1


@given(NAMES, st.integers())
def test_a_group_that_is_added_moves_no_other(groups, seed):
    order = rank(groups, seed, "test")
    assert [name for name in rank(groups | {"a newcomer"}, seed, "test") if name != "a newcomer"] == order


def test_the_seed_and_the_purpose_change_the_order():
    names = [str(i) for i in range(50)]
    assert len({tuple(rank(names, seed, purpose)) for seed in (0, 1) for purpose in ("a", "b")}) == 4


@pytest.mark.parametrize("groups", [[], ["one", "one"]])
def test_a_single_group_cannot_be_split(groups):
    with pytest.raises(UserError, match="one group"):
        choose_held_out(groups, 0.5, 0)


@given(st.lists(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=3), min_size=1, max_size=12))
def test_samples_are_of_one_group_exactly_if_images_connect_them(images):
    groups = group_by_images(images)
    reached = [set(hashes) for hashes in images]
    for _ in images:  # the plain way: join what overlaps until nothing changes
        reached = [set().union(*(other for other in reached if other & one)) for one in reached]
    for i, one in enumerate(reached):
        assert groups[i] == min(one)
        assert all((groups[i] == groups[j]) == (one == other) for j, other in enumerate(reached))
