"""The layer of the judge `attention`: the settings' own, or that of the policy's family."""

from types import SimpleNamespace

import pytest

from thinkimg.config.load import load_config
from thinkimg.rewards.context import JudgeSettings
from thinkimg.rewards.judgement import Pair
from thinkimg.rewards.judges import attention
from thinkimg.stages.score import judge_settings, settings_of


def settings(*overrides: str) -> JudgeSettings:
    return judge_settings(load_config("tiny", ["image.types=[attention]", *overrides]))


def test_of_a_qwen2_5_vl_it_is_layer_22_and_scores_made_with_it_are_still_found():
    default, explicit = settings("image.attention.layer=null"), settings("image.attention.layer=22")
    assert default.image.attention.layer == 22 and default == explicit
    assert (
        attention.prompt(default)
        == attention.prompt(explicit)
        != attention.prompt(settings("image.attention.layer=21"))
    )
    trees = [
        settings_of(load_config("tiny", ["image.types=[attention]", f"image.attention.layer={layer}"])).fingerprinted()
        for layer in ("null", 22)
    ]
    assert trees[0] == trees[1]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
@pytest.mark.parametrize("layer", ["null", "3"])
def test_of_another_family_the_trainer_picks_it_by_the_depth(family, layer, monkeypatch):
    own = settings(f"model.tiny.family={family}", f"image.attention.layer={layer}", "image.attention.rows=last")
    assert own.image.attention.layer == (None if layer == "null" else 3)
    jobs = []

    def measure(pairs, context, layers):
        jobs.append(layers)
        masses = {"question": 0.3, "generic": 0.1}
        return [{"3/text": {"question": 0.0, "generic": 0.1}, "3/last": masses} for _ in pairs]

    monkeypatch.setattr(attention, "measure_attention", measure)
    (judgement,) = attention.judge([Pair("Which way?", "a", "b")], SimpleNamespace(settings=own))
    assert jobs == [None if layer == "null" else [3]]
    assert judgement.value == 0.75 and judgement.evidence["at"] == "3/last"
