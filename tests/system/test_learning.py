"""The demo's own loop, whole.

Does the policy come to use its tools, and does its accuracy come through their images?
"""

import os
import subprocess
import sys

import pytest

from thinkimg.config.load import load_config
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact
from thinkimg.tracking.records import load_record, loop_id

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory) -> dict[str, Artifact]:
    """Evaluations of the warm-started policy, the final one, and the final one with grey tool images."""
    place = tmp_path_factory.mktemp("learning")
    environment = os.environ | {"PREFECT_HOME": str(place / "prefect")}

    def thinkimg(*arguments: str) -> None:
        command = [sys.executable, "-m", "thinkimg", *arguments, "--preset", "tiny"]
        subprocess.run(command, cwd=place, env=environment, check=True, timeout=3000)

    thinkimg("run")
    config, store = load_config("tiny"), Store(place / "artifacts")
    record = load_record(store, loop_id(config))
    final = record.iteration(config.iterations).artifacts
    thinkimg("evaluate", "--policy", final["train"].fingerprint, "--samples", "100", "--blind")
    blind = [a for a in store.list("evaluation") if a.manifest["recipe"]["config"]["blind"]]
    return {
        "first": store.resolve(record.iteration(0).artifacts["evaluate"]),
        "final": store.resolve(final["evaluate"]),
        "grey": blind[0],
    }


def test_greedy_accuracy_rises_by_twenty_points_with_intervals_apart(evaluations):
    first, final = evaluations["first"].metrics, evaluations["final"].metrics
    assert final["trajectories"] >= 300
    assert final["accuracy"] >= first["accuracy"] + 0.2
    assert final["accuracy_low"] > first["accuracy_high"]
    assert final["avg_at_k"] > first["avg_at_k_high"]


def test_the_accuracy_comes_through_the_images_of_the_tools(evaluations):
    assert evaluations["grey"].metrics["accuracy_high"] < evaluations["final"].metrics["accuracy_low"]
