"""A stage whose output changes must raise its VERSION: else a store would hold two meanings under one fingerprint.

When a test here fails after a deliberate change, raise the version of the stage (or SCHEMA_VERSION, where a table has
changed: these digests are of version 3) and write the new digest beside it. A digest belongs to the pinned packages as
well: with others it may differ without any change of ours, and so does the fingerprint.
"""

import hashlib

import numpy as np
import pytest

from thinkimg.config.load import load_config
from thinkimg.resources import Resources
from thinkimg.rewards.joined import Joined, is_counted
from thinkimg.rewards.mix import Mix
from thinkimg.scheduler import Builder
from thinkimg.stages.demonstrate import demonstrate
from thinkimg.stages.known_pairs import known_pairs
from thinkimg.stages.prepare import prepare
from thinkimg.stages.score import score
from thinkimg.stages.train import compute_advantages, train
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact, canonical_json

GOLDEN = {
    "prepare": (6, "158e72d8371085c5922621b18494dd011bf27ceecd91caa13a4733cf65d77863"),
    "demonstrate": (4, "62328ce49efae05b85780ebeb2792dc2b95d74b252d20684f4de26014fda2e4b"),
    "pairs": (2, "d0fe6a6a0a5d02ed6292e32a5adf8c74dd71590a026318e5cad681dfbe95db36"),
    "compare": (4, "81f96eb7989bebccee513815096548e95a50a79eb639f3ebf8ddc5c68a78430e"),
    "score": (7, "77a9c4c4f35520deeba460aae2f17eafa1ecac8ed38bda15ff1c1ab5fdb427a1"),
    "advantages": (4, "ede1dc795e27b5c0c68011ade8e4e4a29c3d0f89ef2f7ac6040384d568746b7a"),
}
OVERRIDES = ["data.train=12", "data.held_out=8", "data.seed=4", "seed=4", "warmstart.pairs=8", "image.types=[]"]
MIX = "mix={format: 0.2, tool: 0.3, answer: 0.5}"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Stage -> (version, digest of what it makes of a small data set)."""
    config, store = load_config("tiny", OVERRIDES), Store(tmp_path_factory.mktemp("golden"))
    with Resources(config.where) as resources:
        builder = Builder(config, store, resources)
        dataset = builder.make(prepare)
        pairs = builder.make(known_pairs, dataset=dataset, count=8)
        scripted = builder.make(demonstrate, dataset=dataset, pairs=pairs)
        scores = builder.make(score, rollouts=scripted)
    return {
        "prepare": (prepare.version, digest(dataset, "samples")),
        "pairs": (known_pairs.version, digest(pairs, "pairs")),
        "demonstrate": (demonstrate.version, digest(scripted, "trajectories")),
        "compare": (demonstrate.version, digest(scripted, "comparisons")),
        "score": (score.version, digest(scores, "scores")),
        "advantages": (train.version, weighed(scores)),
    }


def digest(artifact: Artifact, table: str) -> str:
    """Of the rows: images stand in them by the hash of their pixels, which no encoder's version changes."""
    return hashlib.sha256(canonical_json(artifact.table(table).to_pylist()).encode()).hexdigest()


def weighed(scores: Artifact) -> str:
    config = load_config("tiny", [*OVERRIDES, MIX])
    groups, stops = np.repeat(["a", "b", "c"], 4), np.array(["answer"] * 11 + ["max_turns"])
    counted = np.array([is_counted(stop, []) for stop in stops])
    joined = Joined(scores.identities()[0], groups, stops, counted, scores.values())
    totals, result = compute_advantages(Mix.from_config(config.mix, config.image), config.train, joined)
    shown = [np.round(totals, 9).tolist(), np.round(result.advantages, 9).tolist(), [str(r) for r in result.reasons]]
    return hashlib.sha256(canonical_json(shown).encode()).hexdigest()


@pytest.mark.parametrize("stage", sorted(GOLDEN))
def test_the_output_is_that_of_this_version(stage, outputs):
    assert outputs[stage] == GOLDEN[stage]
