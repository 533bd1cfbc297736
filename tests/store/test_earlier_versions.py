"""A store of version 1 of the tables: listed, proven, explained, and read as input of today's stages."""

import shutil

import numpy as np
import pytest
from paths import SUPPORT

from thinkimg.analysis.explain import explain_reward, find_trajectory
from thinkimg.analysis.joined import open_scores, weighings
from thinkimg.analysis.remix import compare_mixes
from thinkimg.analysis.verify_calls import replay
from thinkimg.config.load import load_config
from thinkimg.records import SCHEMA_VERSION
from thinkimg.resources import Resources
from thinkimg.scheduler import Builder
from thinkimg.stages.score import score
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import KINDS
from thinkimg.store.lineage import Graph, draw_tree

TRAJECTORY = "7e09b01c3e7e0812-1"  # a crop, then two malformed turns


@pytest.fixture
def store(tmp_path) -> Store:
    shutil.copytree(SUPPORT / "golden" / "store_v1", tmp_path / "artifacts")
    return Store(tmp_path / "artifacts")


def one(store: Store, kind: str):
    return max(store.list(kind), key=lambda artifact: artifact.manifest["finished"])


def test_all_of_it_is_listed_as_its_kind_proven_and_drawn(store):
    artifacts = list(store.list())
    assert len(artifacts) == 8 and all(type(artifact) is KINDS[artifact.kind] for artifact in artifacts)
    assert {artifact.manifest["recipe"]["schema_version"] for artifact in artifacts} == {1}
    assert not any("thinkimg" in artifact.manifest["host"] for artifact in artifacts), "version 0.1.0 did not say so"
    assert [store.verify(artifact) for artifact in artifacts] == [[]] * 8
    replayed = replay(one(store, "rollouts"), store)
    assert (replayed.calls, replayed.images, replayed.problems) == (2, 2, [])
    lines = list(draw_tree(Graph.of(store), str(one(store, "policy").reference)))
    assert [line.split()[1] for line in lines[:6]] == [
        "dataset", "demonstrations", "policy", "rollouts", "scores", "policy",
    ]  # fmt: skip


def test_what_version_1_does_not_have_is_filled_in(store):
    samples = {sample.sample_id: sample for sample in one(store, "dataset").samples()}
    assert all(
        sample.metadata == {} and sample.columns.keys() >= {"family", "difficulty"} for sample in samples.values()
    )
    assert all(sample.answers[0] == sample.answer for sample in samples.values())
    assert any(len(sample.answers) > 1 for sample in samples.values()), "further answers of the mapped column"
    assert any(sample.targets for sample in samples.values())
    assert all(edge > 0 for sample in samples.values() for box in sample.targets for edge in box[2:])
    for row in one(store, "rollouts").trajectories():
        assert row.sizes == tuple((14 * wide, 14 * high) for _, high, wide in row.grids)
        assert {turn.weights for turn in row.turns} == {None} and row.weights


def test_a_trajectory_is_explained_and_its_mix_changed(store):
    scores, name, _ = find_trajectory(store, TRAJECTORY)
    assert name == TRAJECTORY
    config = load_config("tiny", [f"where.store={store.root}"])
    told = explain_reward(store, scores, name, config)
    assert [turn["kind"] for turn in told["turns"]] == ["tool", "malformed", "malformed"]
    assert told["images"][1] | {"sha256": ""} == {
        "index": 1, "sha256": "", "width": 56, "height": 63, "seen_width": 56, "seen_height": 56, "made_by_turn": 0,
    }  # fmt: skip
    assert told["weighed"][0]["trained"] and told["components"]["self"]["judgements"][0]["judge"] == "self"
    scored = open_scores(scores, store)
    (entry,) = compare_mixes(scored, weighings(store, scores, config))
    assert entry["reproduced"] == 0


def test_its_rollouts_are_scored_anew_to_the_same_values(store):
    config = load_config("tiny", [f"where.store={store.root}", "image.types=[]", "mix={answer: 1.0}"])
    old = one(store, "scores")
    with Resources(config.where) as resources:
        new = Builder(config, store, resources).make(score, rollouts=one(store, "rollouts"))
    assert new.manifest["recipe"]["schema_version"] == SCHEMA_VERSION
    assert new.identities() == old.identities()
    for name, values in new.values().items():
        np.testing.assert_array_equal(values, old.values()[name])
