"""Names that a user chooses, columns and metrics of a loss, never meet ours: each arrives, and none of ours changes."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from single_stage import build_stage

from thinkimg.config.load import validate
from thinkimg.grpo.loss import Logps, compute_grpo_loss, compute_normaliser
from thinkimg.grpo.settings import LossConfig
from thinkimg.grpo.terms import Loss, token_mean
from thinkimg.records import Sample, StopReason, Trajectory, Turn, TurnKind
from thinkimg.rewards import functions
from thinkimg.rewards.batch import Batch
from thinkimg.rewards.registry import RESERVED
from thinkimg.rewards.settings import RewardsConfig
from thinkimg.rewards.user_function import UserFunction
from thinkimg.stages.evaluate import summarise_evaluation
from thinkimg.stages.prepare import prepare
from thinkimg.store.artifacts import Store

FIELDS = [field.name for kind in (Sample, Trajectory) for field in dataclasses.fields(kind)]
COLUMNS = sorted({
    *FIELDS, "solution", "family", "target", "id", "reward", "answer_type", "mlflow.runName", "a/b", "", " ", "\n", "ü",
    "u\u0308", "x" * 300, "__proto__", "__class__", "self", "completions", "prompts", "final_answer", "trainer_state",
    "log_extra", "0", "null", "A", "a", "日本", "🙂", "a.b", "'", '"', "split", "where", "kwargs",
})  # fmt: skip
VALUES = ["", "\n", "x" * 300, None, 0, -1.5, True, [], {}, {"solution": [1]}, ["a", None], "NaN", "🙂", "train"]
ROW = Trajectory(
    "t", "s", "g", 0, "p", (1, 2), (0, 1), (-0.5,), ("i",), ((1, 8, 8),), (Turn("b", TurnKind.ANSWER, tokens=1),), "b",
    StopReason.ANSWER, None, "w", ((112, 112),),
)  # fmt: skip


def test_every_column_goes_through_prepare_to_the_reward_function(tmp_path):
    mapped = {"image": "0.png", "question": "?", "answer": "yes"}
    own = [
        {name: VALUES[(number + shift) % len(VALUES)] for number, name in enumerate(COLUMNS)} | mapped
        for shift in range(4)
    ]
    for number, record in enumerate(own):
        Image.new("RGB", (60, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
        record["image"] = f"{number}.png"
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, own)))
    data = {"source": "jsonl", "path": str(tmp_path / "d.jsonl"), "held_out_share": 0.5}
    config = validate({"data": data, "where": {"workers": 1}})
    dataset, _ = build_stage(prepare, config, Store(tmp_path / "store"))
    samples = list(dataset.samples())
    assert len(samples) == 4
    expected = [{name: value for name, value in record.items() if name not in mapped} for record in own]
    assert sorted(map(json.dumps, (one.columns for one in samples))) == sorted(map(json.dumps, expected))
    assert not any(one.metadata.keys() & set(COLUMNS) for one in samples), "evaluations group by our own metadata"
    assert {one.split for one in samples} == {"train", "held_out"} and all(one.answers == ("yes",) for one in samples)

    def mine(completions, **given):
        assert given["columns"] == [one.columns for one in samples]
        assert given["answer"] == ["yes"] * 4 and callable(given["log_extra"])
        return [0.5] * len(completions)

    rows = [dataclasses.replace(ROW, trajectory_id=one.sample_id, sample_id=one.sample_id) for one in samples]
    batch = Batch(rows, {one.sample_id: one for one in samples}, config=RewardsConfig(), images=None)
    assert [score.value for score in functions.score_with(UserFunction("o:mine", "mine", mine, ""), batch)] == [0.5] * 4


@given(st.dictionaries(
    st.sampled_from(["loss", "kl", "entropy", "step", "seconds", "lr", "grad_norm", "off_policy_mask/dropped", "",
                     "sampling/importance_sampling_ratio/mean", "loss/loss", "parity/kl", "reward/total", "time/x"]),
    st.floats(-1, 1, width=32), min_size=1,
))  # fmt: skip
def test_the_metrics_of_a_users_loss_meet_none_of_ours(names):
    own, shipped = (outputs(names, path) for path in ("my_project.mine", "grpo"))
    assert {name for name in own if name not in shipped} == {f"loss/{name}" for name in names}
    for name, value in shipped.items():
        assert own[name] == value, "nothing of ours changes"
    for name, value in names.items():
        assert own[f"loss/{name}"] == pytest.approx(value, abs=1e-6)


def outputs(names: dict[str, float], path: str) -> dict[str, float]:
    """The metrics of a loss of this name, with further ones if it is a user's."""
    extra = names if path != "grpo" else {}

    def per_token(cfg, terms):
        return -terms.ratio * terms.advantages, {name: torch.full((2,), value) for name, value in extra.items()}

    cfg = LossConfig(beta=0.1).model_copy(update={"loss_type": path, "entropy_coef": 0.1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thinkimg.registry.Registry.member", lambda *_: Loss(per_token, token_mean))
        logps, mask = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.ones(2, 2, dtype=torch.bool)
        out = compute_grpo_loss(
            cfg,
            Logps(logps, logps, reference=logps - 0.1, engine=logps + 0.1),
            advantages=torch.tensor([1.0, -1.0]),
            mask=mask,
            entropies=torch.ones(2, 2),
            normaliser=compute_normaliser(cfg, [mask], max_completion_length=2),
        )
    return {name: float(value) for name, value in out.metrics.items()}


def test_no_function_is_called_as_one_of_our_figures():
    """`reward/teacher_fallback` is ours, and an alarm reads it."""
    assert {"total", "image", "teacher_fallback"} <= set(RESERVED)


def test_families_of_a_users_data_are_none_of_the_puzzles():
    one = Sample("s", "?", ("b",), "text", (), ("i",), "jsonl", "held_out", columns={"family": "accuracy"})
    metrics = summarise_evaluation([one], np.array([[ROW]], dtype=object), np.array([[1.0]]))
    assert metrics["accuracy"] == 1 and not any(name.startswith("accuracy/") for name in metrics)
