"""The rewards for format and tool use, and the registry."""

from hypothesis import given
from hypothesis import strategies as st
from rewards_rows import batch, call, failed, final, malformed, trajectory

from thinkimg.records import CallStatus, StopReason, Turn
from thinkimg.rewards.batch import Score, Status
from thinkimg.rewards.settings import RULES

PLAIN = call(x=1)
middles = st.lists(st.sampled_from([call(x=1), call(x=2), call(status=CallStatus.ERROR), malformed()]), max_size=6)


def value(component: str, *turns: Turn, **ends) -> Score:
    return RULES[component].score(batch([trajectory(*turns, **ends)]))[0]


def test_every_component_scores_every_trajectory_in_order():
    rows = [failed(), trajectory(PLAIN, final(), answer="red"), trajectory(malformed())]
    for name, rule in RULES.items():
        score = rule.score
        assert score(batch([])) == []
        scores = score(batch(rows))
        assert scores == [one for row in rows for one in score(batch([row]))]
        assert [one.value for one in scores] == [0, 1, 0], name
        assert scores[0].status is Status.ZERO and scores[0].reason and scores[2].reason, name


@given(middles)
def test_format_is_the_share_of_turns_that_parse(turns):
    found = value("format", *turns, final(), answer="red")
    assert found.value == 1 - turns.count(malformed()) / (len(turns) + 1)


@given(middles, st.integers(0, 6))
def test_one_more_malformed_turn_lowers_format(turns, place):
    more = [*turns[:place], malformed(), *turns[place:]]
    assert value("format", *more, final(), answer="red").value < value("format", *turns, final(), answer="red").value


@given(middles)
def test_format_is_zero_unless_one_answer_ends_the_trajectory(turns):
    assert value("format", *turns, stop=StopReason.MAX_TURNS).status is Status.ZERO
    assert value("format", final(), *turns, final(), answer="red").value == 0
    assert value("format", *turns, final(), stop=StopReason.FAILED).value == 0


@given(middles)
def test_tool_is_in_range_and_perfect_only_if_every_call_brought_something_new(turns):
    found = value("tool", *turns, final(), answer="red")
    calls = [turn for turn in turns if turn != malformed()]
    assert 0 <= found.value <= 1
    assert (found.value == 1) == (
        len(calls) > 0 and len(set(calls)) == len(calls) and call(status=CallStatus.ERROR) not in calls
    )


@given(middles)
def test_repeating_a_call_never_raises_tool(turns):
    once = value("tool", PLAIN, *turns).value
    assert value("tool", PLAIN, *turns, PLAIN).value < once


def test_tool_counts_errors_and_duplicates_against_the_calls():
    turns = [PLAIN, call(x=2, status=CallStatus.DUPLICATE), call(x=3, status=CallStatus.ERROR), call(x=4)]
    found = value("tool", *turns)
    assert found == Score(0.5, Status.OK, None, {"calls": 4, "new": 2, "duplicates": 1, "errors": 1})


def test_the_same_image_under_another_name_is_the_same_call():
    crops = [call(x=1, image=name, source=0) for name in ("current", "original", 0)]
    assert value("tool", *crops).value == 1 / 3
    assert value("tool", call(x=1, source=0), call(x=1, source=1)).value == 1


def test_tool_without_a_call_has_a_reason():
    assert value("tool", final(), answer="red") == Score(0.0, Status.ZERO, "No tool was called.")
    # A repetition of a call that failed before is no duplicate.
    assert value("tool", call(status=CallStatus.ERROR), call()).value == 0.5
