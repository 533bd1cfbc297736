"""The flows on Prefect's embedded server, as a command line has it: runners of scoring, kills, several at once."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import SHELL
from paths import REPOSITORY
from single_stage import build_stage

from flows._run import name_stage_run
from thinkimg.config.load import load_config
from thinkimg.stages.demonstrate import demonstrate
from thinkimg.stages.prepare import prepare
from thinkimg.stages.score import score
from thinkimg.stages.stage import load_stage
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe
from thinkimg.watchdog import descendants

SETTINGS = [
    "data.train=12", "data.held_out=4", "where.workers=2", "where.tracking.enabled=false", "image.types=[]",
]  # fmt: skip
SCORE = """
import sys
from flows.score import score
reference, *runners = sys.argv[1:]
for runner in runners:
    print(score(reference, preset="tiny", overrides=[*{settings}, "where.runner=" + runner], force=True), flush=True)
"""
WAIT = """
import time
from flows._flow import flow

@flow("waiting")
def waiting():
    print("working", flush=True)
    time.sleep(600)

waiting()
"""

LOSE = """
from prefect.exceptions import MissingResult
from flows._flow import flow

runs = []

@flow("losing")
def losing():
    runs.append("run")
    if len(runs) == 1:
        raise MissingResult("State data is missing.")
    return len(runs)

print(losing(), flush=True)
"""

LOOP = """
import sys
import flows.loop as loops

loops.pipeline = lambda run, config: sys.exit("the pipeline began")
loops.loop(preset="tiny", overrides=sys.argv[1:], seed=3, mix={"answer": 0.5, "format": 0.5})
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("flows")


@pytest.fixture(scope="module")
def rollouts(place):
    """Scripted conversations in the form of rollouts, in two parts."""
    config, store = load_config("tiny", [*SETTINGS, "warmstart.pairs=0"]), Store(place / "artifacts")
    dataset, _ = build_stage(prepare, config, store)
    demonstrated, _ = build_stage(demonstrate, config, store, dataset=dataset)
    recipe = Recipe("rollout", 1, 1, {}, {"dataset": dataset.reference})
    table = demonstrated.table("trajectories")

    def produce(work):
        for number in range(2):
            work.table(f"trajectories-{number:05}.parquet", table.slice(number * 6, 6))
        work.table("images.parquet", demonstrated.table("images"))

    return store.build("rollouts", recipe, produce)[0]


def start(place: Path, code: str, *arguments: str) -> subprocess.Popen:
    """Start a script in a hostile shell: with a proxy that is dead, keys of another Prefect, ranks of a launcher."""
    environment = (
        os.environ
        | SHELL
        | {
            "PREFECT_HOME": str(place / "prefect"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        }
    )
    environment.pop("PREFECT_API_URL", None)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run_names(place: Path) -> list[str]:
    """The names of all flow runs that Prefect has there, as its database holds them."""
    with contextlib.closing(sqlite3.connect(place / "prefect" / "prefect.db")) as database:
        return [name for (name,) in database.execute("SELECT name FROM flow_run ORDER BY name")]


def titles(root: int) -> dict[int, str]:
    found = {}
    for pid in descendants(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.long
def test_scores_are_bit_equal_on_threads_and_on_dask(place, rollouts):
    config = load_config("tiny", SETTINGS)
    store = Store(place / "artifacts")
    dataset = next(store.list("dataset"))
    plain, _ = build_stage(score, config, store, dataset=dataset, rollouts=rollouts, force=True)
    process = start(place, SCORE.format(settings=SETTINGS), rollouts.fingerprint[:12], "threads", "dask")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    made = [store.resolve(line) for line in output.splitlines() if line.startswith("scores/")]
    assert [artifact.attempt for artifact in made] == ["0002", "0003"]
    assert {artifact.digest for artifact in made} == {plain.digest}
    assert [artifact.manifest["where"]["runner"] for artifact in made] == ["threads", "dask"]


def test_a_flow_runs_again_where_prefect_has_lost_its_result(place):
    process = start(place, LOSE)
    output, errors = process.communicate(timeout=120)
    assert output.splitlines()[-1:] == ["2"], errors[-3000:]


def test_a_kill_leaves_no_server_behind(place):
    process = start(place, WAIT)
    lines = iter(process.stdout.readline, "")  # before it, perhaps that the server is being waited for
    assert "working\n" in lines, process.communicate(timeout=10)[1]
    family = titles(process.pid)
    assert any("prefect.server.api.server" in title for title in family.values()), family
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 10
    while left := [title for pid, title in family.items() if alive(pid)]:
        assert time.monotonic() < deadline, f"these outlived their parent: {left}"
        time.sleep(0.1)


def test_two_runs_at_once_share_a_new_prefect_home_and_do_the_work_once(place, rollouts, tmp_path):
    """Servers that create one database at once crash: these start one after the other."""
    code = SCORE.replace(", force=True", "").format(settings=[*SETTINGS, "rewards.answer.number_tolerance=0.3"])
    (tmp_path / "artifacts").symlink_to(place / "artifacts")
    running = [start(tmp_path, code, rollouts.fingerprint[:12], "threads") for _ in range(2)]
    ended = [(*process.communicate(timeout=300), process.returncode) for process in running]
    assert [code for _, _, code in ended] == [0, 0], ended
    made = [line for output, _, _ in ended for line in output.splitlines() if line.startswith("scores/")]
    assert len(made) == 2 and len(set(made)) == 1 and made[0].endswith("/0001")
    assert run_names(tmp_path) == [f"score {rollouts.short}"] * 2, "a run is named after what it scores"


@pytest.mark.parametrize(
    ("setting", "name"),
    [("seed=7", "tiny answer=0.5 format=0.5 seed=3"), pytest.param("nonsense=1", "loop", marks=pytest.mark.long)],
)
def test_a_loops_run_is_named_after_preset_mix_and_seed(tmp_path, setting, name):
    process = start(tmp_path, LOOP, "where.tracking.enabled=false", setting)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and ("nonsense" if name == "loop" else "the pipeline began") in errors
    assert run_names(tmp_path) == [name]


@pytest.mark.parametrize(
    ("stage", "form", "name"),
    [
        ("score", {"rollouts": "rollouts/0123456789abcdef/0001"}, "score 0123456789ab"),
        ("score", {"rollouts": "artifacts/rollouts/0123456789abcdef/0001/"}, "score 0123456789ab"),
        ("rollout", {"policy": "3f2a", "dataset": None, "iteration": 18}, "rollout 18 3f2a"),
        ("prepare", {"preset": "presets/mine.yaml"}, "prepare mine"),
    ],
)
def test_a_stages_run_is_named_after_what_it_works_on(stage, form, name):
    assert name_stage_run(load_stage(stage), form) == name
