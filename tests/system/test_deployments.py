"""A real Prefect server and a real process worker.

Deployed, scheduled, run from stored artifacts, cancelled, refused.
"""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from paths import REPOSITORY
from prefect_server import ENDED, PrefectServer, wait_for

from thinkimg.stages.names import stage_names
from thinkimg.store.artifacts import Store
from thinkimg.watchdog import descendants

PRESET = """
extends: tiny
iterations: 1
data: {train: 16, held_out: 8}
conversation: {max_turns: 3, max_turn_tokens: 24}
warmstart: {steps: 2, batch: 8, pairs: 0}
image: {types: []}
mix: {format: 0.2, tool: 0.3, answer: 0.5}
rollout: {samples: 4, group_size: 2}
train: {steps: 1}
evaluate: {samples: 4, samples_ends: 4, k: 0}
where: {engine: {cpu_kvcache_gib: 1, max_num_seqs: 16}, tracking: {traces: 1}, functions_allow: [allowed]}
"""
REWARD = """
from pathlib import Path
Path(__file__).with_suffix(".imported").touch()

def short(completions, **columns):
    return [1 / len(turns) for turns in completions]
"""
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def prefect(tmp_path_factory):
    place = tmp_path_factory.mktemp("deployed")
    for name in ("flows", "thinkimg"):
        (place / name).symlink_to(REPOSITORY / name)
    (place / "nano.yaml").write_text(PRESET)
    # The committed file, with a loop that is due every minute and a preset that takes no minutes.
    project = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
    for deployment in project["deployments"]:
        deployment["parameters"]["preset"] = "nano.yaml"
        if deployment["name"] == "loop":
            assert deployment["schedules"][0]["cron"] == "0 2 * * *"
            deployment["schedules"][0]["cron"] = "* * * * *"
    (place / "prefect.yaml").write_text(yaml.safe_dump(project, sort_keys=False))
    with PrefectServer(place) as prefect:
        for _ in range(2):  # twice: it is idempotent
            prefect.cli("work-pool", "create", "thinkimg", "--type", "process", "--overwrite")
            made = subprocess.run(
                [sys.executable, "-m", "flows._device"],
                cwd=place, env=prefect.environment, capture_output=True, text=True, timeout=120, check=True,
            )  # fmt: skip
            assert ": 1" in made.stdout
            prefect.cli("deploy", "--all")
        with prefect.start("worker", "start", "--pool", "thinkimg", "--type", "process") as prefect.worker:
            yield prefect


@pytest.fixture(scope="module")
def scheduled(prefect) -> dict:
    """The loop that the schedule has started, ended; the schedule is paused after it has begun."""
    (deployment,) = prefect.ask("/deployments/filter", {"deployments": {"name": {"any_": ["loop"]}}})
    run = wait_for(lambda: next((r for r in prefect.runs("loop") if r["state_type"] in ("RUNNING", *ENDED)), None), 300)
    prefect.cli("deployment", "schedule", "pause", "thinkimg/loop", deployment["schedules"][0]["id"])
    for other in prefect.runs("loop"):  # on a slow machine more have become due, and would keep the next tests waiting
        if other["id"] != run["id"]:
            httpx.delete(f"{prefect.url}/flow_runs/{other['id']}", timeout=120).raise_for_status()
    wait_for(lambda: prefect.limit()["active_slots"] == 1, 120)  # held from the first use to the end
    return prefect.wait(run["id"], 900)


def test_the_deployments_have_forms_with_descriptions_and_limits(prefect):
    found = {deployment["name"]: deployment for deployment in prefect.ask("/deployments/filter", {})}
    assert set(found) == {"loop", *stage_names()} and len(found) == 10
    for deployment in found.values():
        assert deployment["enforce_parameter_schema"] and deployment["work_pool_name"] == "thinkimg"
        assert "thinkimg" in deployment["tags"] and deployment["description"]
        for name, parameter in deployment["parameter_openapi_schema"]["properties"].items():
            assert parameter.get("description"), f"{deployment['name']} {name}"
    properties = found["loop"]["parameter_openapi_schema"]["properties"]
    assert properties["iterations"]["anyOf"][0]["minimum"] == 1
    assert found["loop"]["global_concurrency_limit"]["limit"] == 1
    assert len(found["loop"]["schedules"]) == 1 and prefect.limit()["limit"] == 1


@pytest.mark.parametrize(
    ("deployment", "parameters"),
    [
        ("thinkimg/loop", ["iterations=0"]),
        ("thinkimg/loop", ['mix={"answer": -1}']),
        ("thinkimg/loop", ["preset=tinny"]),
        ("thinkimg/loop", ['overrides=["no equals sign"]']),
        ("thinkimg/loop", ["itrations=3"]),
        ("score/score", ["rollouts=ab"]),
        ("score/score", []),
        ("rollout/rollout", ["policy=abcdef", "iteration=0"]),
    ],
)
def test_bad_input_is_refused_before_it_is_scheduled(prefect, deployment, parameters):
    def count():
        return prefect.ask("/flow_runs/count", {"deployments": {"name": {"any_": [deployment.split("/")[1]]}},
                                                "flow_runs": {"tags": {"all_": ["by-hand"]}}})  # fmt: skip

    options = [part for parameter in parameters for part in ("--param", parameter)]
    prefect.cli("deployment", "run", deployment, "--tag", "by-hand", *options, code=1)
    assert count() == 0


def test_a_scheduled_loop_fires_and_shows_what_it_made(prefect, scheduled):
    assert scheduled["state_type"] == "COMPLETED", scheduled["state"]["message"]
    assert scheduled["auto_scheduled"] and scheduled["name"] == "nano answer=0.5 format=0.2 tool=0.3 seed=0"
    assert {"score 1", "train 1", "evaluate 0"} <= set(prefect.children(scheduled["id"]))
    store = Store(prefect.place / "artifacts")
    assert len([*store.list("policy")]) == 2 and len([*store.list("evaluation")]) == 2
    shown = prefect.artifacts(scheduled["id"])
    rows = json.loads(shown["thinkimg-loop"]["data"])
    assert [row["iteration"] for row in rows] == [0, 1] and rows[1]["eval/accuracy"] is not None
    assert float(shown["thinkimg-progress"]["data"]) == 100
    assert prefect.limit()["active_slots"] == 0
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{store.root / 'mlflow.db'}")
    experiments = {e.name: e.experiment_id for e in client.search_experiments()}
    (run,) = client.search_runs([experiments["thinkimg"]])
    assert run.info.status == "FINISHED"
    assert f"/experiments/{experiments['thinkimg']}/runs/{run.info.run_id}" in shown["thinkimg-mlflow"]["data"]


def test_one_stage_runs_from_stored_artifacts(prefect, scheduled):
    store = Store(prefect.place / "artifacts")
    (rollouts,) = store.list("rollouts")
    before = {str(artifact.reference) for artifact in store.list()}
    arguments = ["--param", f"rollouts={rollouts.fingerprint[:8]}"]
    changed = ["--param", 'overrides=["rewards.answer.number_tolerance=0.5"]']
    for options, state in ((changed, "Completed"), (changed, "Cached"), ([], "Cached")):
        prefect.cli("deployment", "run", "score/score", *arguments, *options, "--watch")
        run = prefect.runs("score")[-1]
        assert (run["state_type"], run["state_name"]) == ("COMPLETED", state)
        assert run["name"] == f"score {rollouts.fingerprint[:8]}"
        shown = prefect.artifacts(run["id"])
        assert "reward/answer" in shown["thinkimg-score"]["data"] and "/runs/" in shown["thinkimg-mlflow"]["data"]
    (made,) = {str(artifact.reference) for artifact in store.list()} - before
    assert made.startswith("scores/") and store.verify(store.resolve(made)) == []


def test_user_code_runs_where_the_preset_allows_its_module(prefect, scheduled):
    (rollouts,) = Store(prefect.place / "artifacts").list("rollouts")
    for module, state in (("spy", "FAILED"), ("allowed", "COMPLETED")):
        path = prefect.place / f"{module}.py"
        path.write_text(REWARD)
        own = "overrides=" + json.dumps([f"rewards.functions=['{module}:short']"])
        options = ["--param", f"rollouts={rollouts.fingerprint[:8]}", "--param", own, "--watch"]
        prefect.cli("deployment", "run", "score/score", *options, code=int(state == "FAILED"))
        run = prefect.runs("score")[-1]
        assert run["state_type"] == state, run["state"]["message"]
        assert path.with_suffix(".imported").exists() == (state == "COMPLETED")
        if state == "FAILED":
            assert "can't name spy:short in rewards.functions" in run["state"]["message"]


def test_a_stage_that_fails_says_so_in_a_sentence(prefect, scheduled):
    prefect.cli("deployment", "run", "score/score", "--param", "rollouts=0123456789", "--watch", code=1)
    run = prefect.runs("score")[-1]
    assert (
        run["state_type"] == "FAILED"
        and "No rollouts under artifacts begins with '0123456789'" in run["state"]["message"]
    )


def test_cancelling_leaves_no_process_and_no_slot_behind(prefect, scheduled):
    prefect.cli("deployment", "run", "thinkimg/loop", "--param", "seed=7")
    run = wait_for(lambda: next((r for r in prefect.runs("loop") if r["parameters"].get("seed") == 7), None), 60)
    names = wait_for(
        lambda: (n := family(prefect.worker.pid)) and any("EngineCore" in t for t in n.values()) and n, 400
    )
    assert len(names) > 4, names  # the flow's process, its watchdogs, the server, and what that has started
    prefect.cli("flow-run", "cancel", run["id"])
    assert prefect.wait(run["id"], 120)["state_type"] == "CANCELLED"
    wait_for(lambda: not [pid for pid, title in names.items() if title_of(pid) == title], 60)
    assert prefect.worker.alive
    wait_for(lambda: prefect.limit()["active_slots"] == 0, 120)


def family(root: int) -> dict[int, str]:
    """What the worker under a watchdog has started, by process id, without itself."""
    found = {pid: title for pid in descendants(root) if (title := title_of(pid))}
    return {pid: title for pid, title in found.items() if "worker start" not in title}


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
