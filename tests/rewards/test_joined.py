"""Trajectories beside their scores, and which of them count."""

import numpy as np
import pytest
from ledger_store import COMPONENTS, GROUPS, group, make_dataset, make_rollouts, make_scores

from thinkimg.errors import UserError
from thinkimg.rewards.joined import is_counted, join
from thinkimg.store.artifacts import Store

FINE, WRONG = {"error": None}, {"error": "Begin with one <think>…</think>."}


@pytest.mark.parametrize(
    ("stop", "turns", "expected"),
    [
        ("answer", [FINE], True),
        ("answer", [WRONG, FINE], True),
        ("truncated", [WRONG], True),
        ("failed", [FINE], False),
        ("failed", [WRONG], False),
        ("max_turns", [FINE, FINE], False),
        ("max_tokens", [FINE], False),
        ("max_turns", [FINE, WRONG], True),
        ("max_tokens", [WRONG], True),
    ],
)
def test_a_row_counts_unless_it_failed_or_ran_out_of_turns_with_every_turn_in_order(stop, turns, expected):
    assert is_counted(stop, turns) == expected


def test_rows_stand_in_the_order_of_the_rollouts_whatever_the_parts(tmp_path):
    store = Store(tmp_path)
    dataset = make_dataset(store)
    rollouts = make_rollouts(store, dataset)
    joined = join(rollouts, make_scores(store, dataset, rollouts))
    played = [row for number in range(GROUPS) for row in group(number)]
    assert list(joined.ids) == [row.trajectory_id for row in played]
    assert joined.groups.tolist() == [row.group_id for row in played]
    assert joined.stops.tolist() == [str(row.stop) for row in played]
    assert joined.counted.tolist() == [True, True, True, False, False] * GROUPS  # out of turns in order; failed
    assert set(joined.components) == set(COMPONENTS)
    assert joined.components["answer"].tolist() == [float(row.answer == "red") for row in played]
    assert np.isnan(joined.components["self"]).any()


def test_scores_of_other_rollouts_are_refused(tmp_path):
    store = Store(tmp_path)
    dataset = make_dataset(store)
    whole = make_rollouts(store, dataset)
    scores = make_scores(store, dataset, whole)
    swapped = [group(i) for i in (1, 0, *range(2, GROUPS))]
    for number, groups in enumerate(([group(i) for i in range(GROUPS - 1)], swapped, [*swapped[::-1], group(9)]), 2):
        with pytest.raises(UserError, match="does not hold the trajectories"):
            join(make_rollouts(store, dataset, groups, number), scores)
