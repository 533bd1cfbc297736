"""The whole loop on real parts (Prefect's server, vLLM, the trainer, MLflow): killed, started again, and looked at."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import SUPPORT

from thinkimg.config.load import load_config
from thinkimg.records import Trajectory, from_row
from thinkimg.store.artifacts import Store

PRESET = """
extends: tiny
iterations: 2
data: {train: 16, held_out: 8}
conversation: {max_turns: 3, max_turn_tokens: 24}
warmstart: {steps: 3, batch: 8, pairs: 8}
image: {types: [self, teacher, attention, embedding]}
rollout: {samples: 4, group_size: 4}
rewards: {functions: ["my_rewards:brevity"]}
mix: {format: 0.2, tool: 0.3, answer: 0.5, brevity: 1.0, image: 0.2}
train: {steps: 1}
evaluate: {samples: 4, samples_ends: 8, k: 1}
where: {engine: {cpu_kvcache_gib: 1, max_num_seqs: 32}, tracking: {traces: 2}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("loop")
    (place / "nano.yaml").write_text(PRESET)
    return place


def start(place: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {
        "PREFECT_HOME": str(place / "prefect"),
        "PYTHONPATH": str(SUPPORT / "user"),
        "COLUMNS": "200",
    }
    environment.pop("PREFECT_LOGGING_LEVEL", None)  # as flows._environment has set it in another test for this process
    command = [sys.executable, "-m", "thinkimg", *arguments, "--preset", "nano.yaml"]
    return subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(place: Path, *arguments: str) -> str:
    process = start(place, *arguments)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def output(place) -> str:
    """What the loop printed that was started after another had been killed in its first iteration."""
    first, store = start(place, "run"), Store(place / "artifacts")
    deadline = time.monotonic() + 900
    while not list(store.list("scores")):
        assert first.poll() is None, first.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "no scores after 900 s"
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    return run(place, "run")


def artifacts(place: Path, kind: str) -> list:
    return sorted(Store(place / "artifacts").list(kind), key=lambda artifact: artifact.manifest["finished"])


def test_a_killed_loop_goes_on_and_makes_everything_once(place, output):
    counts = {
        kind: len(artifacts(place, kind))
        for kind in ("dataset", "pairs", "clip", "demonstrations", "policy", "rollouts", "scores", "evaluation")
    }
    once = dict.fromkeys(("dataset", "pairs", "clip", "demonstrations"), 1)
    assert counts == once | {"policy": 3, "rollouts": 2, "scores": 2, "evaluation": 3}
    store = Store(place / "artifacts")
    for artifact in store.list():
        assert store.verify(artifact) == []
    assert store.sweep() == []
    identities = []
    for rollouts in artifacts(place, "rollouts"):
        rows = [from_row(Trajectory, row) for row in rollouts.table("trajectories").to_pylist()]
        assert len(rows) == 16
        identities += [(row.policy, row.sample_id, row.index) for row in rows]
    assert len(set(identities)) == len(identities)


def test_policies_change_and_name_each_other(place, output):
    digests = [policy.digest for policy in artifacts(place, "policy")]
    assert len(set(digests)) == 3
    first, second = artifacts(place, "rollouts")
    assert [rollouts.manifest["recipe"]["inputs"]["policy"]["digest"] for rollouts in (first, second)] == digests[:2]
    for rollouts, digest in zip((first, second), digests, strict=False):
        rows = rollouts.table("trajectories", ["weights", "policy"]).to_pylist()
        assert {(row["weights"], row["policy"]) for row in rows} == {(digest, digest)}  # as the engine reported it
    for policy in artifacts(place, "policy")[1:]:
        assert 8 <= policy.metrics["train/rows"] <= 16  # rows that ran out of turns are excluded
        assert policy.metrics["parity/mean_abs"] < 0.01


def test_the_loop_ends_with_a_table_and_says_where_things_are(place, output):
    for word in (
        "brevity",
        "format",
        "tool rate",
        "accuracy",
        "rollout",
        "evaluate",
        "mlflow server",
        "Final policy: ",
    ):
        assert word in output
    final = output.split("Final policy: ")[1].splitlines()[0]
    assert (place / final / "model" / "model.safetensors").is_file()
    assert (place / final / "model" / "chat_template.jinja").is_file() or (
        place / final / "model" / "chat_template.json"
    ).is_file()


def test_mlflow_has_the_loop_and_every_executed_stage(place, output):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{place / 'artifacts' / 'mlflow.db'}")
    experiments = {e.name: e.experiment_id for e in client.search_experiments()}
    (loop,) = client.search_runs([experiments["thinkimg"]])
    history = client.get_metric_history(loop.info.run_id, "eval/accuracy")
    assert [metric.step for metric in history] == [0, 1, 2]
    logged = ["self", "teacher", "attention", "embedding", "brevity", "total"]
    keys = [f"reward/{name}" for name in logged] + ["tool/rate", "parity/mean_abs", "time/train_s", "watch/no_step"]
    for key in keys:
        assert [metric.step for metric in client.get_metric_history(loop.info.run_id, key)] == [1, 2], key
    stages = client.search_runs([experiments["thinkimg-stages"]], max_results=100)
    logged = sorted(run.data.tags["thinkimg.artifact"] for run in stages)
    assert logged == sorted(str(artifact.reference) for artifact in Store(place / "artifacts").list())


def test_a_second_run_finds_everything_cached(place, output):
    before = {path: path.stat().st_mtime_ns for path in (place / "artifacts").rglob("manifest.json")}
    started = time.monotonic()
    run(place, "run")
    assert {path: path.stat().st_mtime_ns for path in (place / "artifacts").rglob("manifest.json")} == before
    assert time.monotonic() - started < 120
    plan = run(place, "run", "--dry-run")
    assert "missing" not in plan and plan.count("Cached") == 5 + 2 * 3 + 3


def test_one_stage_runs_again_from_its_artifacts_with_another_mix(place, output):
    scores = artifacts(place, "scores")[0]
    made = run(place, "train", "--scores", scores.fingerprint[:10], "--set", "mix={brevity: 0.5}").splitlines()[-1]
    policy = Store(place / "artifacts").resolve(made)
    assert policy.manifest["recipe"]["inputs"]["scores"]["digest"] == scores.digest
    assert policy.manifest["recipe"]["config"]["mix"] == {"brevity": 0.5}
    assert policy.digest not in [other.digest for other in artifacts(place, "policy") if other != policy]


def test_with_nothing_to_learn_no_step_is_taken(place, output):
    scores = artifacts(place, "scores")[0]
    start_policy = artifacts(place, "policy")[0]
    made = run(place, "train", "--scores", scores.fingerprint[:10], "--set", "train.min_std=100").splitlines()[-1]
    policy = Store(place / "artifacts").resolve(made)
    assert policy.metrics["train/rows"] == 0
    weights = "policy/model/model.safetensors"
    assert policy.files[weights]["sha256"] == start_policy.files[weights]["sha256"]


@pytest.mark.long
def test_an_alarm_ends_a_loop_that_asks_for_it_when_everything_is_published(place, output):
    process = start(place, "run", "--set", "mix={brevity: 0.0}", "--set", "on_alarm=stop")
    printed, _ = process.communicate(timeout=1200)
    assert process.returncode == 1, printed[-4000:]
    (said,) = [line for line in printed.splitlines() if line.startswith("thinkimg: ")]
    assert "Stopped after iteration 1" in said and "no_step" in said and "Traceback" not in printed
    assert "Alarms of iteration 1" in printed and "Final policy: " in printed
    records = [json.loads(path.read_bytes()) for path in (place / "artifacts" / "loops").glob("*.json")]
    (record,) = [record for record in records if record["config"]["mix"] == {"brevity": 0.0}]
    assert [iteration["step"] for iteration in record["iterations"]] == [0, 1] and record["status"] == "FAILED"
    assert set(record["iterations"][1]["artifacts"]) == {"rollout", "score", "train", "evaluate"}
    assert record["iterations"][1]["metrics"]["watch/no_step"] == 1
    assert {row["alarm"] for row in record["tables"]["alarms"] if row["fired"]} == {"no_step"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score", "--rollouts", "0123456789"], "0123456789"),
        (["rollout", "--policy", "0123456789"], "0123456789"),
        (["run", "--set", "modle.path=x"], "model"),
        (["run", "--set", "model.tiny=null", "--set", "model.path=nowhere"], "nowhere"),
        (["prepare", "--set", "data.source=jsonl", "--set", "data.path=nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(place, output, arguments, said):
    process = start(place, *arguments)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 2, printed
    lines = [line for line in printed.splitlines() if line.startswith("thinkimg: ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in printed


def test_an_artifact_that_was_edited_is_refused(place, output):
    scores = artifacts(place, "scores")[0]
    name = next(name for name in scores.files if name.startswith("scores"))
    path, data = scores.directory / name, (scores.directory / name).read_bytes()
    try:
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
        process = start(place, "train", "--scores", scores.fingerprint[:10], "--set", "mix={answer: 1.0}")
        printed, _ = process.communicate(timeout=200)
    finally:
        path.write_bytes(data)
    assert process.returncode == 2 and name in printed


def test_the_schema_of_presets_is_json(place):
    process = subprocess.run([sys.executable, "-m", "thinkimg", "schema"], capture_output=True, text=True, check=True)
    schema = json.loads(process.stdout)
    assert schema["properties"]["iterations"]["minimum"] == 1
    assert load_config("tiny").preset == "tiny"


@pytest.fixture(scope="module")
def lagging(place, output) -> tuple[str, dict[str, list]]:
    """What the same loop printed with a lag, and the artifacts that it made."""
    known = {kind: len(artifacts(place, kind)) for kind in ("policy", "rollouts", "scores", "evaluation")}
    printed = run(place, "run", "--set", "loop.lag=1")
    return printed, {kind: artifacts(place, kind)[count:] for kind, count in known.items()}


@pytest.mark.long
def test_with_a_lag_the_same_policy_plays_on(place, lagging):
    """The first step is that without a lag, of its own; then the first policy plays, and its successor is trained."""
    _, made = lagging
    assert {kind: len(new) for kind, new in made.items()} == dict.fromkeys(made, 1) | {"policy": 2}
    (again, policy), (rollouts,) = made["policy"], made["rollouts"]
    first, second = artifacts(place, "policy")[:2]
    assert again.digest == second.digest and again.fingerprint != second.fingerprint
    assert rollouts.inputs["policy"].digest == first.digest and policy.inputs["policy"].digest == second.digest
    assert {row["weights"] for row in rollouts.table("trajectories", ["weights"]).to_pylist()} == {first.digest}
    assert policy.metrics["parity/mean_abs"] < 0.01, "against the policy that played"
    assert not list((place / "artifacts" / "early").glob("*/[!.]*")), "what was judged early is in the scores"


@pytest.mark.long
def test_with_a_lag_the_loop_says_how_to_train_again(place, lagging):
    printed, made = lagging
    command = printed[printed.rindex("thinkimg train --scores") :].splitlines()[0]
    expected = [made["scores"][0].short, "--policy", made["policy"][0].short]
    assert command.split()[3:6] == expected and "--set loop.lag=1" in command
    words = command.split()[1 : command.split().index("--preset")]
    assert str(made["policy"][1].reference) in run(place, *words, "--set", "loop.lag=1")
    refused = start(place, *words[:3], "--set", "loop.lag=1")
    answer, _ = refused.communicate(timeout=300)
    assert refused.returncode == 2 and "train needs --policy" in answer
