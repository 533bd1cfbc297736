"""Which rows count when a policy is trained, and what the mix makes of them."""

import numpy as np
import pytest

from thinkimg.config import load
from thinkimg.errors import UserError
from thinkimg.grpo.advantages import Inclusion
from thinkimg.stages.train import check_mix, counted, weigh

FINE, WRONG = {"error": None}, {"error": "Begin with one <think>…</think>."}


@pytest.mark.parametrize(
    ("stop", "turns", "counts"),
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
def test_a_row_counts_unless_it_failed_or_ran_out_of_turns_with_every_turn_in_order(stop, turns, counts):
    assert counted([stop], [turns]).tolist() == [counts]


def test_rows_that_do_not_count_move_no_other_row():
    config = load("tiny", ["mix={answer: 1.0}"])
    rng = np.random.default_rng(0)
    groups, valid = np.repeat([0, 1, 2], 4), np.ones(12, dtype=bool)
    valid[[1, 6]] = False
    values = rng.uniform(size=12)
    totals, result = weigh(config, {"answer": values}, groups, valid)
    other = np.where(valid, values, rng.uniform(size=12))
    _, again = weigh(config, {"answer": other}, groups, valid)
    np.testing.assert_array_equal(result.advantages, again.advantages)
    assert [result.reasons[i] for i in (1, 6)] == [Inclusion.INVALID] * 2


def test_a_mix_of_something_that_is_never_scored_is_refused_at_once():
    with pytest.raises(UserError, match="answr"):
        check_mix(load("tiny", ["mix={answr: 1.0}"]))
    check_mix(load("tiny"))


def test_one_weight_is_changed_without_losing_the_others():
    assert load("tiny", ["mix.answer=0.9"]).mix == {"format": 0.2, "tool": 0.3, "answer": 0.9, "image": 0.2}
