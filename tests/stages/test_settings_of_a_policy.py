"""Settings under which a policy has learned and is asked; and the results of an evaluation for a person."""

import logging

import pytest

from thinkimg.errors import UserError
from thinkimg.stages import evaluate as module
from thinkimg.stages.evaluate import evaluate
from thinkimg.stages.rollout import rollout
from thinkimg.store.artifacts import Store
from thinkimg.store.lineage import describe


def changed(config, **conversation):
    return config.model_copy(update={"conversation": config.conversation.model_copy(update=conversation)})


@pytest.mark.parametrize("name", ["rollout", "evaluate"])
def test_other_settings_than_the_policys_are_named_in_one_line(stages, tmp_path, caplog, name):
    with caplog.at_level(logging.WARNING):
        stages.run(name, stages.store)
        assert not caplog.records, "the same settings"
        other = changed(stages.config, max_turns=3, tools=("crop_image",))
        for stage in (rollout, evaluate):
            for made in ("warmstart", "train"):
                inputs = {"policy": stages.made[made], "dataset": stages.made["prepare"]}
                sentence = stage.warn(stage.settings(other), inputs, stages.store)
                assert sentence == (
                    f"The policy {stages.made[made].short} has learned under other settings than these: "
                    'conversation.tools is ["crop_image"], not null; conversation.max_turns is 3, not 4.'
                )
    inputs = {"policy": stages.made["train"], "dataset": stages.made["prepare"]}
    assert evaluate.warn(evaluate.settings(other), inputs, Store(tmp_path)) == "", "its rollouts are elsewhere"


def test_a_warning_comes_with_what_is_in_the_store_already_too(stages, caplog):
    for _ in range(2):
        caplog.clear()
        stages.run("evaluate", stages.store, config=changed(stages.config, max_turns=3))
        assert "has learned under other settings than these: conversation.max_turns is 3, not 4" in caplog.text


def test_an_evaluation_is_read_by_a_person(stages):
    made = stages.made["evaluate"]
    line = evaluate.report(made)
    assert line.startswith("held-out accuracy ") and "(95 %: " in line and "chance 25 %" in line
    assert describe(made).startswith(f"of policy {made.inputs['policy'].fingerprint[:12]}, accuracy ")
    assert "chance 0.25" in describe(made) and rollout.report(stages.made["rollout"]) == ""


def test_an_evaluation_of_which_most_answers_fail_is_none(stages, tmp_path, monkeypatch):
    """The conversations themselves went well, and are kept."""
    monkeypatch.setattr(module, "judge_answers", lambda rows, *_: module.np.full(len(rows), module.np.nan))
    with pytest.raises(UserError, match=r"2 of 2 answers failed, the first with: The answer can't be judged.* Hint: "):
        stages.run("evaluate", Store(tmp_path))
    assert not list(Store(tmp_path).list()) and list(tmp_path.rglob("trajectories-*"))
