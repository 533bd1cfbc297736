"""The family of models in manifests: recorded, in no fingerprint, and refused where an input is of another."""

import pytest
import yaml

from thinkimg.cli import artifacts as cli
from thinkimg.config.load import load_config
from thinkimg.dry_run import preview
from thinkimg.errors import UserError
from thinkimg.models.family import load_family
from thinkimg.puzzles.geometry import Geometry
from thinkimg.scheduler import Plan
from thinkimg.stages.build import complete_inputs
from thinkimg.stages.names import stage_names
from thinkimg.stages.stage import load_stage

WITHOUT_A_MODEL = {"known-pairs", "train-clip"}
ROLES = {
    "warmstart": ("demonstrations",), "rollout": ("policy",), "evaluate": ("policy",), "score": ("rollouts",),
    "train": ("policy", "rollouts", "scores"),
}  # fmt: skip
MAKERS = {"demonstrations": "demonstrate", "policy": "warmstart", "rollouts": "rollout", "scores": "score"}


@pytest.fixture
def other(stages):
    """The config of the stages with a model of another family."""
    tiny = stages.config.model.tiny.model_copy(update={"family": "qwen3_vl"})
    return stages.config.model_copy(update={"model": stages.config.model.model_copy(update={"tiny": tiny})})


def without_family(artifact):
    """The artifact as an earlier version wrote it."""
    manifest = {name: value for name, value in artifact.manifest.items() if name != "family"}
    return type(artifact)(artifact.directory, manifest)


def test_every_manifest_of_a_stage_with_a_model_names_its_family(stages):
    assert {name: made.manifest["family"] for name, made in stages.made.items()} == dict.fromkeys(
        stages.made, "qwen2_5_vl"
    )
    assert {made.family for made in stages.made.values()} == {"qwen2_5_vl"}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_every_stage_with_a_model_has_the_family_of_the_settings(family):
    """A stage that is added has to decide."""
    limits = Geometry(load_family(family).processor.token_side).limits
    config = load_config(
        "tiny",
        [
            f"model.tiny.family={family}",
            f"images.min_pixels={limits.min_pixels}",
            f"images.max_pixels={limits.max_pixels}",
        ],
    )
    families = {name: load_stage(name).settings(config).family for name in stage_names()}
    assert families == {name: None if name.replace("_", "-") in WITHOUT_A_MODEL else family for name in families}


def test_it_is_in_no_fingerprint(stages):
    for name, made in stages.made.items():
        stage = load_stage(name)
        settings = stage.settings(stages.config)
        inputs = complete_inputs(stage, stages.config, stages.made_by_role(), stages.store)
        renamed = settings.model_copy(update={"family": "another"})
        assert stage.recipe(settings, inputs).fingerprint == made.fingerprint, name
        assert stage.recipe(renamed, inputs).fingerprint == made.fingerprint, name


@pytest.mark.parametrize("name", ROLES)
def test_an_input_of_another_family_is_refused_before_anything_runs(stages, other, name):
    stage = load_stage(name)
    given = {role: stages.made[MAKERS[role]] for role in ROLES[name]} | {"dataset": stages.made["prepare"]}
    complete_inputs(stage, stages.config, given, stages.store)
    with pytest.raises(UserError) as error:
        complete_inputs(stage, other, given, stages.store)
    said = str(error.value)
    assert "family qwen2_5_vl" in said and "qwen3_vl" in said and "model.tiny.family" in said and "\n" not in said


def test_a_data_set_and_what_earlier_versions_made_fit_every_family(stages, other):
    complete_inputs(load_stage("demonstrate"), other, {"dataset": stages.made["prepare"]}, stages.store)
    given = {"policy": without_family(stages.made["warmstart"]), "dataset": stages.made["prepare"]}
    assert given["policy"].family is None
    complete_inputs(load_stage("rollout"), other, given, stages.store)


def test_a_dry_run_says_so(stages, other):
    plan = Plan(other)
    plan.add(load_stage("rollout"), policy=stages.made["train"], dataset=stages.made["prepare"])
    (line,) = preview(plan, stages.store)
    assert "can't run: policy/" in line and "family qwen2_5_vl" in line


def test_a_person_reads_it(stages, capsys, monkeypatch):
    cli.show(str(stages.made["rollout"].reference), store=stages.store.root)
    assert yaml.safe_load(capsys.readouterr().out)["family"] == "qwen2_5_vl"
    old = without_family(stages.made["rollout"])
    monkeypatch.setattr(type(stages.store), "resolve", lambda *_: old)
    cli.show(str(old.reference), store=stages.store.root)
    assert yaml.safe_load(capsys.readouterr().out)["family"] is None
