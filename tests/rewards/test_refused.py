"""Judgements that were refused: a few are missing values, most of them mean that the judge has failed."""

from types import SimpleNamespace

import pytest

from thinkimg.errors import UserError
from thinkimg.rewards import judging
from thinkimg.rewards.judgement import JudgeIdentity, Judgement, Pair

PAIRS = {Pair("?", "original", f"{number}") for number in range(9)}


def judge(refused: int):
    def judge_all(pairs, context):
        return [
            Judgement(None, "it answered 400: no images here", {}, refused=True)
            if i < refused
            else Judgement(0.5, None, {})
            for i in range(len(pairs))
        ]

    return SimpleNamespace(identity=lambda context: JudgeIdentity("own", "", "", ""), judge=judge_all)


@pytest.fixture
def run(monkeypatch):
    def run(refused: int) -> dict:
        monkeypatch.setattr(judging, "load_judges", lambda image: {"own": judge(refused)})
        monkeypatch.setattr(judging, "reject_unfit", lambda pair, context: None)
        context = SimpleNamespace(
            map=lambda function, items: list(map(function, items)), expect=int, judged=int,
            settings=SimpleNamespace(image=None), resources=SimpleNamespace(where=SimpleNamespace(takes_turns=False)),
        )  # fmt: skip
        closed = {}
        judging.run_judges(["own"], PAIRS, context, lambda component, keys: {}, closed.__setitem__)
        return closed

    return run


def test_a_judge_that_refuses_most_has_failed(run):
    with pytest.raises(UserError, match="6 of 9 judgements of own failed, the first with: it answered 400"):
        run(6)


def test_of_a_few_pairs_a_refusal_is_their_own_fault(run, monkeypatch):
    monkeypatch.setitem(globals(), "PAIRS", set(list(PAIRS)[:1]))
    assert [judged.value for judged in run(1)["own"].values()] == [None]


def test_a_few_are_missing_values_with_their_reason(run):
    values = [judged.value for judged in run(2)["own"].values()]
    assert values.count(None) == 2 and values.count(0.5) == 7
