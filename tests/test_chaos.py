"""The loop under SIGKILL at random moments, a fifth of them while it recovers: at the end nothing tells that it happened.

THINKIMG_KILLS=300 THINKIMG_SEED=7 pytest tests/test_chaos.py -m long     more of them, or the same again
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from thinkimg.artifacts import Store
from thinkimg.engine.server import Server, ServerSettings
from thinkimg.watchdog import descendants

pytestmark = pytest.mark.long

SEED = int(os.environ.get("THINKIMG_SEED", "0"))
KILLS = {"outside": int(os.environ.get("THINKIMG_KILLS", "25")), "own": 5}
REPOSITORY = Path(__file__).parents[1]
PRESET = """
extends: tiny
iterations: 2
data: {train: 16, held_out: 8}
conversation: {max_turns: 3, max_turn_tokens: 24}
warmstart: {steps: 3, batch: 8, pairs: 0}
image: {types: []}
mix: {format: 0.2, tool: 0.3, answer: 0.5}
rollout: {samples: 4, group_size: 4}
train: {steps: 1}
evaluate: {samples: 8, samples_ends: 8, k: 1}
where: {engine: {cpu_kvcache_gib: 1, max_num_seqs: 32}, tracking: {traces: 0}}
"""
FOREVER_S = 900  # nothing here takes so long


class Loop:
    """The command in a directory of its own, with temporary files of its own."""

    def __init__(self, place: Path):
        self.place, self.store = place, Store(place / "artifacts")
        (place / "tmp").mkdir(parents=True)
        (place / "nano.yaml").write_text(PRESET)

    def start(self, *settings: str) -> subprocess.Popen:
        environment = os.environ | {
            "PREFECT_HOME": str(self.place / "prefect"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
            "TMPDIR": str(self.place / "tmp"),
        }
        options = [part for setting in settings for part in ("--set", setting)]
        log = (self.place / "loop.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", "thinkimg", "run", "--preset", "nano.yaml", *options],
            cwd=self.place, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def finish(self, *settings: str) -> None:
        process = self.start(*settings)
        assert process.wait(FOREVER_S) == 0, (self.place / "loop.log").read_text()[-4000:]

    def digests(self) -> dict[tuple[str, str, str], str]:
        return {(a.kind, a.fingerprint, a.attempt): a.digest for a in self.store.list()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Loop:
    """The loop that nobody disturbs; it is as long as the disturbed ones get."""
    loop = Loop(tmp_path_factory.mktemp("whole") / "place")
    loop.finish()
    return loop


@pytest.fixture(scope="module")
def outside(whole, tmp_path_factory):
    """A server that outlives the loops."""
    policy = next(whole.store.list("policy"))
    settings = ServerSettings(max_model_len=1024, cpu_kvcache_gib=1, max_num_seqs=32)
    log = tmp_path_factory.mktemp("outside") / "engine.log"
    with Server(policy.checked("policy/model"), log_path=log, version="other", settings=settings) as server:
        yield server


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("engine", ["outside", "own"])
def test_nothing_is_lost_and_nothing_done_twice(engine, whole, tmp_path, request):
    where = [f"where.engine.urls=[{request.getfixturevalue('outside').url}]"] if engine == "outside" else []
    rng, loop, kills, iterations = random.Random(f"{SEED} {engine}"), Loop(tmp_path / "place"), 0, 2
    families: set[int] = set()
    while kills < KILLS[engine]:
        # Starting takes some ten seconds, and reading what is there another few: that is the recovery.
        patience = rng.uniform(1, 15) if kills % 5 == 4 else rng.uniform(15, 60)
        process = loop.start(*where, f"iterations={iterations}")
        try:
            code = process.wait(patience)
            assert code == 0, (loop.place / "loop.log").read_text()[-4000:]
            iterations += 1  # it was quicker: there is more to do next time
        except subprocess.TimeoutExpired:
            families |= set(descendants(process.pid))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            found = [artifact for artifact in loop.store.list() if loop.store.verify(artifact)]
            assert found == [], f"seed {SEED}, kill {kills} after {patience:.1f} s"
    loop.finish(*where, f"iterations={iterations}")
    whole.finish(f"iterations={iterations}")
    # Rollouts, scores, policies, evaluations: the same bytes as if nothing had happened.
    mine, theirs = loop.digests(), whole.digests()
    assert mine == {key: theirs[key] for key in mine} and len(mine) == 4 + 4 * iterations
    assert all(loop.store.verify(artifact) == [] for artifact in loop.store.list())
    rows = [row for rollouts in loop.store.list("rollouts")
            for row in rollouts.table("trajectories", ["policy", "sample_id", "index"]).to_pylist()]  # fmt: skip
    assert len({tuple(row.values()) for row in rows}) == len(rows) == 16 * iterations
    # Nothing is left: no work, no lock, no process, no scratch.
    assert loop.store.sweep() == [] and loop.store.busy() == []
    deadline = time.monotonic() + 15
    while left := [pid for pid in families if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    run = loop.place / "tmp" / f"thinkimg-{os.getuid()}"
    assert [path.name for path in run.iterdir()] == []
