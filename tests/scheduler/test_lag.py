"""loop.lag in the pipeline: who plays, who is trained, and what is refused."""

import pytest
from single_stage import recipe_of

from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.pipeline import pipeline
from thinkimg.scheduler import Plan
from thinkimg.stages.build import complete_inputs
from thinkimg.stages.train import train
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import KINDS
from thinkimg.store.manifest import Artifact, Recipe


def plan(*overrides: str) -> Plan:
    plan = Plan(load_config("tiny", overrides))
    pipeline(plan, plan.config)
    return plan


@pytest.mark.parametrize("lag", [0, 1])
def test_rollouts_are_played_by_the_policy_so_many_steps_before_that_which_is_trained(lag):
    stages = plan("iterations=4", f"loop.lag={lag}").handles
    policies = [handle for handle in stages if handle.stage.makes.KIND == "policy"]
    trained = [handle for handle in policies if handle.stage is train]
    for i, handle in enumerate(trained, start=1):
        player = policies[max(0, i - 1 - lag)]
        assert handle.given["policy"] is policies[i - 1] and handle.given["player"] is player
        rollouts, scores = handle.given["rollouts"], handle.given["scores"]
        assert rollouts.given["policy"] is player and rollouts.parameters == {"iteration": i}
        assert scores.given["player"] is player and scores.given["rollouts"] is rollouts
    evaluated = [handle.given["policy"] for handle in stages if handle.stage.makes.KIND == "evaluation"]
    assert evaluated == policies, "each policy is measured, whoever plays"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.loss.vllm_importance_sampling_correction=false",
            "needs train.loss.vllm_importance_sampling_correction",
        ),
        ("where.trainer.keep=false", "take turns in the memory"),
        ("loop.lag=2", "0 or 1"),
    ],
)
def test_settings_that_make_no_sense_with_a_lag_are_refused(override, message):
    load_config("tiny", [override.replace("lag=2", "lag=0")])
    with pytest.raises(UserError, match=message):
        load_config("tiny", ["loop.lag=1", override])


def test_on_devices_of_their_own_they_take_no_turns():
    apart = ["where.engine.devices=[0]", "where.trainer.devices=[1]", "where.trainer.keep=false"]
    assert load_config("tiny", ["loop.lag=1", *apart]).loop.lag == 1


def made(store: Store, kind: str, stage: str, inputs: dict[str, Artifact], **config) -> Artifact:
    references = {role: artifact.reference for role, artifact in inputs.items()}
    recipe = Recipe(stage, 1, 1, config, references)
    return store.build(kind, recipe, lambda work: work.json("content.json", [stage, config]))[0]


@pytest.fixture
def lineage(tmp_path) -> tuple[Store, dict[str, Artifact]]:
    """Two iterations with a lag: the second rollouts were played by the first policy, too, and are not trained on."""
    store = Store(tmp_path)
    dataset = made(store, "dataset", "prepare", {})
    first = made(store, "policy", "warmstart", {"dataset": dataset})
    rows = [
        made(store, "rollouts", "rollout", {"dataset": dataset, "policy": first}, iteration=number) for number in (1, 2)
    ]
    scores = [made(store, "scores", "score", {"dataset": dataset, "rollouts": rollouts}) for rollouts in rows]
    inputs = {"dataset": dataset, "policy": first, "rollouts": rows[0], "scores": scores[0]}
    policy = made(store, "policy", "train", inputs)
    assert set(KINDS) >= {"policy", "rollouts", "scores"}
    return store, {"first": first, "policy": policy, "rollouts": rows[1], "scores": scores[1], "dataset": dataset}


def test_alone_it_asks_for_the_policy_where_the_rollouts_do_not_tell(lineage):
    """Without a lag it is the one that played, and the fingerprint is that of a loop without a lag."""
    store, known = lineage
    for lag, handed in ((0, {}), (1, {"policy": known["policy"]})):
        config = load_config("tiny", [f"loop.lag={lag}"])
        inputs = complete_inputs(train, config, {"scores": known["scores"]} | handed, store)
        expected = handed.get("policy", known["first"])
        assert inputs["policy"].reference == expected.reference
        assert inputs["player"].reference == known["first"].reference
        names = recipe_of(train, config, **inputs).inputs
        assert "player" not in names and names["policy"] == expected.reference
    with pytest.raises(UserError, match=r"train needs --policy: with loop.lag=1 .* later one"):
        complete_inputs(train, load_config("tiny", ["loop.lag=1"]), {"scores": known["scores"]}, store)


def test_rollouts_of_the_next_iteration_are_kept_whoever_played_them(lineage):
    from thinkimg.store import gc

    store, known = lineage
    assert gc.find_garbage(store).remove == []
    assert gc.find_garbage(store, [known["policy"]], keep_last=1).remove == []
    other = made(
        store, "rollouts", "rollout", {"dataset": known["dataset"], "policy": known["first"]}, iteration=1, seed=7
    )
    assert [artifact.reference for artifact in gc.find_garbage(store).remove] == [other.reference], (
        "of an old iteration"
    )
