"""What the mix makes of rows, and which mixes are refused."""

import numpy as np
import pytest

from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.grpo.advantages import Inclusion
from thinkimg.rewards.joined import Joined
from thinkimg.rewards.mix import Mix
from thinkimg.stages.train import check_mix, compute_advantages


def test_rows_that_do_not_count_move_no_other_row():
    mix, settings = Mix({"answer": 1.0}, {}), load_config("tiny").train
    rng = np.random.default_rng(0)
    groups, valid = np.repeat([0, 1, 2], 4), np.ones(12, dtype=bool)
    valid[[1, 6]] = False
    values = rng.uniform(size=12)

    def weighed(answers):
        return compute_advantages(
            mix, settings, Joined([""] * 12, groups, np.array([""] * 12), valid, {"answer": answers})
        )

    totals, result = weighed(values)
    other = np.where(valid, values, rng.uniform(size=12))
    _, again = weighed(other)
    np.testing.assert_array_equal(result.advantages, again.advantages)
    assert [result.reasons[i] for i in (1, 6)] == [Inclusion.INVALID] * 2


def test_a_mix_of_something_that_is_never_scored_is_refused_at_once():
    with pytest.raises(UserError, match="answr"):
        check_mix(load_config("tiny", ["mix={answr: 1.0}"]))
    check_mix(load_config("tiny"))


def test_one_weight_is_changed_without_losing_the_others():
    assert load_config("tiny", ["mix.answer=0.9"]).mix == {"format": 0.2, "tool": 0.3, "answer": 0.9, "image": 0.2}
