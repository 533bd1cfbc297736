"""Presets, overrides, and the sentence that a wrong one gets."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.config import Config, load, presets
from thinkimg.errors import UserError


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_survives_its_own_json(name):
    config = load(name)
    assert Config.model_validate(json.loads(config.model_dump_json())) == config
    assert config.preset == name


def test_presets_have_the_sizes_that_the_readme_states():
    sizes = {name: (load(name).data.train, load(name).conversation.max_turns) for name in presets()}
    assert sizes["development"] == (100, 3)
    assert sizes["balanced"] == (2000, 5)
    assert sizes["high-quality"] == (5000, 7)
    assert {name for name in presets() if "7B" not in load(name).model.path} == {"memory-efficient"}
    assert load("high-quality").model.lora_rank == 128
    assert {load(name).model.lora_rank for name in presets()} == {64, 128}
    assert [name for name in presets() if load(name).model.tiny] == ["tiny"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.learning_rat=1"], "train.learning_rate"),
        (["trian.learning_rate=1"], "Did you mean train?"),
        (["model.tiny.hiden_size=8"], "model.tiny.hidden_size"),
        (["rollout.group_size=1"], "rollout.group_size"),
        (["rollout.group_size=many"], "rollout.group_size"),
        (["iterations"], "a.b=value"),
        (["mix=[1"], "no YAML"),
        (["model.train_vision=true"], "adaptation"),
    ],
)
def test_a_wrong_override_gets_one_sentence_that_names_the_way_out(overrides, said):
    with pytest.raises(UserError) as error:
        load("development", overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="balanced"):
        load("balanced2")
    with pytest.raises(UserError, match="nothing.yaml"):
        load("nothing.yaml")


def test_a_preset_file_extends_another(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: balanced\nmodel: {lora_rank: 16}\nmix: {answer: 1.0}\n")
    mine, balanced = load(str(path)), load("balanced")
    assert mine.model.lora_rank == 16 and mine.model.path == balanced.model.path
    assert mine.mix == {"answer": 1.0}  # replaced whole: half of another mix is no mix
    assert mine.data == balanced.data


def test_a_preset_with_an_unknown_key_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rolout: {samples: 3}\n")
    with pytest.raises(UserError, match="rollout"):
        load(str(path))


@given(st.text(max_size=40))
def test_no_override_can_do_anything_but_load_or_be_refused(text):
    try:
        load("tiny", [text])
    except UserError as error:
        assert str(error)


def test_overrides_do_not_change_what_they_do_not_name():
    changed = load("tiny", ["train.loss.beta=0.01", "iterations=3"])
    plain = load("tiny").model_dump()
    plain["train"]["loss"]["beta"], plain["iterations"] = 0.01, 3
    assert changed.model_dump() == plain
