"""Presets, overrides, and the sentence that a wrong one gets."""

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.config.load import RENAMED, list_presets, load_config
from thinkimg.config.tree import Config
from thinkimg.errors import UserError
from thinkimg.pipeline import pipeline
from thinkimg.scheduler import Plan
from thinkimg.stages.evaluate import evaluate
from thinkimg.stages.stage import Stage


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_loads_and_survives_its_own_json(name):
    config = load_config(name)
    assert Config.model_validate(json.loads(config.model_dump_json())) == config
    assert config.preset == name


def test_presets_have_the_sizes_that_the_readme_states():
    sizes = {name: (load_config(name).data.train, load_config(name).conversation.max_turns) for name in list_presets()}
    assert sizes["development"] == (100, 3)
    assert sizes["balanced"] == (2000, 5)
    assert sizes["high-quality"] == (5000, 7)
    assert {name for name in list_presets() if "7B" not in load_config(name).model.path} == {"memory-efficient"}
    assert load_config("high-quality").model.lora_rank == 128
    assert {load_config(name).model.lora_rank for name in list_presets()} == {64, 128}
    assert [name for name in list_presets() if load_config(name).model.tiny] == ["tiny"]


@pytest.mark.parametrize("name", list_presets())
def test_no_preset_plays_more_conversations_to_evaluate_than_to_train(name):
    """Over the whole loop, both ends included."""
    config, samples = load_config(name), []

    class Record:
        def __call__(self, stage: Stage, **arguments) -> Stage:
            samples.extend([arguments["samples"]] if stage is evaluate else [])
            return stage

        def report(self, iteration: int, **handles) -> None:
            pass

    pipeline(Record(), config)
    evaluated = sum(min(count, config.data.held_out) for count in samples) * (1 + config.evaluate.k)
    assert evaluated <= config.iterations * config.rollout.samples * config.rollout.group_size


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (5, [0, 5]), (9, [0, 5])])
def test_every_so_many_iterations_and_both_ends_are_evaluated(every, expected):
    config = load_config("tiny", ["iterations=5", f"evaluate.every={every}"])
    plan = Plan(config)
    pipeline(plan, config)
    evaluated = [handle for handle in plan.handles if handle.stage is evaluate]
    assert [handle.iteration for handle in evaluated] == expected
    ends = {config.evaluate.samples_ends}
    assert {handle.parameters["samples"] for handle in evaluated if handle.iteration in (0, 5)} == ends


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
        (
            ["train.loss.vespo_k_pos=1"],
            "'train.loss.vespo_k_pos' belongs to loss_type vespo. Hint: Set train.loss.loss_type=vespo",
        ),
        (["train.loss.vespo_k_pos=1", "train.loss.loss_type=sapo"], "belongs to loss_type vespo"),
        (["data.hub_split=test"], "'data.hub_split' belongs to source hub"),
        (["data.boxes=xywh"], "belongs to source files, folder, hub, jsonl or parquet. Hint: Set data.source to"),
        (["data.source=parquet"], "The setting 'data.path' is missing. Hint: A Parquet file"),
        (["image.teacher.prefix=false"], "belongs to teacher, which is not among image.types"),
        (["image.types=[teecher]"], "There is no 'teecher' among the judges"),
        (["image.types=[self, self]"], "two judges of the same name"),
        (["image.weights={embedding: 1, magic: 1}"], "'magic', which is no judge"),
        (
            ["conversation.protocol=json"],
            "json is none of the protocols: it defines no PROTOCOL. Hint: There are qwen, qwen_xml, think",
        ),
        (["conversation.protocol=thinc"], "There is no 'thinc' among the protocols"),
        (["rewards.number_tolerance=0.1"], "now called 'rewards.answer.number_tolerance'"),
    ],
)
def test_a_wrong_override_gets_one_sentence_that_names_the_way_out(overrides, said):
    with pytest.raises(UserError) as error:
        load_config("development", overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="balanced"):
        load_config("balanced2")
    with pytest.raises(UserError, match="nothing.yaml"):
        load_config("nothing.yaml")


def test_a_preset_file_extends_another(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: balanced\nmodel: {lora_rank: 16}\nmix: {answer: 1.0}\n")
    mine, balanced = load_config(str(path)), load_config("balanced")
    assert mine.model.lora_rank == 16 and mine.model.path == balanced.model.path
    assert mine.mix == {"answer": 1.0}  # replaced whole: half of another mix is no mix
    assert mine.data == balanced.data


def test_a_preset_that_chooses_anew_leaves_the_settings_of_the_other_choice_behind(tmp_path):
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    mode = "vllm_importance_sampling_mode: token_mask"
    loss = f"{{loss_type: vespo, vespo_k_pos: 1, beta: 0.1, {mode}}}"
    base.write_text(f"extends: tiny\ntrain: {{loss: {loss}}}\ndata: {{puzzles: {{}}}}\n")
    top.write_text("extends: base.yaml\ntrain: {loss: {loss_type: dapo}}\nimage: {types: [self]}\n")
    assert load_config(str(base)).train.loss.vespo_k_pos == 1
    changed = load_config(str(top), ["data.source=jsonl", "data.path=x.jsonl"])
    loss = changed.train.loss.model_dump()
    assert loss["loss_type"] == "dapo" and loss["beta"] == 0.1 and "vespo_k_pos" not in loss
    assert changed.data.train == 1600 and "puzzles" not in changed.data.model_dump()
    assert "teacher" not in changed.image.model_dump() and changed.image.only_if_right
    top.write_text("extends: base.yaml\ntrain: {loss: {loss_type: dapo, vespo_k_pos: 1}}\n")
    with pytest.raises(UserError, match="belongs to loss_type vespo"):
        load_config(str(top))


def test_a_renamed_setting_is_there_under_its_new_name():
    for name in RENAMED.values():
        value = functools.reduce(getattr, name.split("."), load_config("tiny"))
        assert load_config("tiny", [f"{name}={json.dumps(value)}"]) == load_config("tiny")


def test_a_preset_with_an_unknown_key_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rolout: {samples: 3}\n")
    with pytest.raises(UserError, match="rollout"):
        load_config(str(path))


@given(st.text(max_size=40))
def test_no_override_can_do_anything_but_load_or_be_refused(text):
    try:
        load_config("tiny", [text])
    except UserError as error:
        assert str(error)


def test_overrides_do_not_change_what_they_do_not_name():
    changed = load_config("tiny", ["train.loss.beta=0.01", "iterations=3"])
    plain = load_config("tiny").model_dump()
    plain["train"]["loss"]["beta"], plain["iterations"] = 0.01, 3
    assert changed.model_dump() == plain
