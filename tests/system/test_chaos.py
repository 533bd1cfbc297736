"""The loop under SIGKILL at random moments, a fifth of them while it recovers: at the end nothing tells that it
happened.

THINKIMG_KILLS=300 THINKIMG_SEED=7 pytest tests/system/test_chaos.py -m long -s     more of them, or the same again
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlflow
import pytest
from paths import REPOSITORY

from thinkimg.engine.server import Server, ServerSettings
from thinkimg.engine.settings import EngineConfig, EngineSettings
from thinkimg.stages.build import EARLY
from thinkimg.store.artifacts import Store

pytestmark = pytest.mark.long

SEED = int(os.environ.get("THINKIMG_SEED", "0"))
OUTSIDE = int(os.environ.get("THINKIMG_KILLS", "25"))
KILLS = {"outside": OUTSIDE, "own": min(5, OUTSIDE), "lag": OUTSIDE}
PRESET = """
extends: tiny
iterations: 2
data: {train: 16, held_out: 8}
conversation: {max_turns: 3, max_turn_tokens: 96}
warmstart: {steps: 3, batch: 8, pairs: 0}
image: {types: []}
rewards: {functions: ['chaos_reward:parity']}
mix: {format: 0.2, tool: 0.2, answer: 0.2, parity: 0.4}
rollout: {samples: 4, group_size: 4}
train: {steps: 1}
evaluate: {samples: 8, samples_ends: 8, k: 1}
where: {engine: {cpu_kvcache_gib: 1, max_num_seqs: 32}, tracking: {traces: 0}}
"""
# A policy that has learnt nothing gets the same from every other component; so there are steps to take.
REWARD = "def parity(completions, completion_ids, **columns): return [sum(ids) % 2 for ids in completion_ids]"
FOREVER_S = 900  # nothing here takes so long
CHANGES = {"outside": 14, "own": 40, "lag": 14}  # at most, in the store between two kills: an iteration has some sixty
TAIL_S = 2.0  # on average so long after a change: what comes next may be the start of a trainer, or of an engine


class Loop:
    """The command in a directory of its own, with temporary files of its own."""

    def __init__(self, place: Path, *settings: str):
        self.place, self.store, self.settings = place, Store(place / "artifacts"), settings
        self.tmp = tempfile.TemporaryDirectory(prefix="chaos-")  # pytest's are too deep for sockets
        place.mkdir()
        (place / "nano.yaml").write_text(PRESET)
        (place / "chaos_reward.py").write_text(REWARD)

    def start(self, iterations: int) -> subprocess.Popen:
        environment = os.environ | {
            "PREFECT_HOME": str(self.place / "prefect"),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(FOREVER_S),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
            "TMPDIR": self.tmp.name,
        }
        options = [part for setting in (*self.settings, f"iterations={iterations}") for part in ("--set", setting)]
        with (self.place / "loop.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "thinkimg", "run", "--preset", "nano.yaml", *options],
                cwd=self.place, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def finish(self, iterations: int) -> None:
        assert self.start(iterations).wait(FOREVER_S) == 0, self.told()

    def told(self) -> str:
        return (self.place / "loop.log").read_text()[-4000:]

    def names(self) -> set[Path]:
        """What there is in the store: attempts, locks, journals, parts, half-written ones too."""
        return {*self.store.root.glob("*/*/*"), *self.store.root.glob("*/*/*.work/*")}

    def digests(self) -> dict[tuple[str, str, str], str]:
        return {(a.kind, a.fingerprint, a.attempt): a.digest for a in self.store.list()}

    def closed(self) -> dict[str, tuple[int, int]]:
        """Files of closed parts, published or not, by the name that they end with -> (inode, time of change).

        Policies aside: one that was not published is trained again, as its figures are lost, and an old one loses its
        optimizer. So is the early work on scores, which goes with their end.
        """
        names = [f"{a.reference}/{name}" for a in self.store.list() if a.kind != "policy" for name in a.files]
        found = {name: self.store.root / name for name in names}
        for journal in self.store.root.glob("[!p]*/*/*.jsonl"):
            work = journal.with_suffix(".work")
            if journal.is_relative_to(self.store.root / EARLY):
                continue
            for line in journal.read_text().splitlines() if work.exists() else ():
                for entry in json.loads(line)["files"] if line.endswith("}") else ():
                    final = work.with_suffix("").relative_to(self.store.root) / entry["name"]
                    found[str(final)] = work / entry["name"]
        return {name: ((stat := path.stat()).st_ino, stat.st_mtime_ns) for name, path in found.items()}

    def processes(self) -> set[int]:
        """Whatever descends from a start of ours, daemons too: it has our environment."""
        found = set()
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and self.tmp.name.encode() in Path(f"/proc/{entry}/environ").read_bytes():
                    found.add(int(entry))
            except (OSError, ProcessLookupError):
                continue  # ended, or another user's
        return found

    def shared_memory(self) -> set[Path]:
        found = set()
        for pid in self.processes():
            try:
                found |= set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))
            except (OSError, ProcessLookupError):
                continue
        return {Path(name) for name in found}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> dict[int, Loop]:
    """The loops that nobody disturbs, by their lag; they are as long as the disturbed ones get."""
    return {lag: Loop(tmp_path_factory.mktemp("whole") / "place", f"loop.lag={lag}") for lag in (0, 1)}


@pytest.fixture(scope="module")
def outside(wholes, tmp_path_factory):
    """A server that outlives the loops."""
    wholes[0].finish(2)
    policy = next(wholes[0].store.list("policy"))
    limits = EngineSettings(dtype="float32", max_tokens=1024, max_images=16, max_pixels=10**6)
    settings = ServerSettings(limits, EngineConfig(cpu_kvcache_gib=1, max_num_seqs=32))
    log = tmp_path_factory.mktemp("outside") / "engine.log"
    with Server(policy.checked("policy/model"), log_path=log, version="other", settings=settings) as server:
        yield server


def wait_for_changes(loop: Loop, process: subprocess.Popen, count: int) -> float:
    """Until the store has changed so often, or the loop has ended; seconds until the first of them."""
    started, first, last = time.monotonic(), None, loop.names()
    while count and process.poll() is None:
        time.sleep(0.03)
        if (now := loop.names()) != last:
            last, count = now, count - 1
            first = first or time.monotonic() - started
    return first or time.monotonic() - started


@pytest.mark.parametrize("engine", ["outside", "own", "lag"])
def test_nothing_is_lost_and_nothing_done_twice(engine, wholes, tmp_path, request):
    lag = int(engine == "lag")
    where = [f"loop.lag={lag}"]
    if engine != "own":
        where.append(f"where.engine.urls=[{request.getfixturevalue('outside').url}]")
    whole = wholes[lag]
    rng, loop, iterations = random.Random(f"{SEED} {engine}"), Loop(tmp_path / "place", *where), 2
    kills, recovery_s, closed, shared_memory = 0, 20.0, {}, set()
    while kills < KILLS[engine]:
        # Moments are counted in what the loop does, so that they are all over its life on slow and fast machines, and
        # in the short stages as often as in the long ones.
        recovering = kills % 5 == 4
        changes = 0 if recovering else rng.randint(1, CHANGES[engine])
        delay = rng.random() * recovery_s if recovering else rng.expovariate(1 / TAIL_S)
        process = loop.start(iterations)
        first = wait_for_changes(loop, process, changes)
        try:
            assert process.wait(delay) == 0, loop.told()
            iterations += 1  # it was quicker: there is more to do next time
            continue
        except subprocess.TimeoutExpired:
            shared_memory |= loop.shared_memory()
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        kills += 1
        moment = f"seed {SEED}, kill {kills} after {changes} changes and {delay:.1f} s"
        print(f"{time.strftime('%X')} {engine} {moment}; the first change took {first:.1f} s", flush=True)
        recovery_s = recovery_s if recovering else first
        assert [artifact for artifact in loop.store.list() if loop.store.verify(artifact)] == [], moment
        # What was in a closed part has not been done again.
        now = loop.closed()
        assert {name: now.get(name) for name in closed} == closed, moment
        closed = now
    loop.finish(iterations)
    now = loop.closed()
    assert {name: now.get(name) for name in closed} == closed
    whole.finish(iterations)
    policies = [policy.digest for policy in loop.store.list("policy")]
    assert len(set(policies)) == len(policies) == 1 + iterations  # they did learn
    # Rollouts, scores, policies, evaluations: the same bytes as if nothing had happened.
    mine, theirs = loop.digests(), whole.digests()
    assert mine == {key: theirs.get(key) for key in mine} and len(mine) == 4 + 4 * iterations
    assert all(loop.store.verify(artifact) == [] for artifact in loop.store.list())
    rows = [row for rollouts in loop.store.list("rollouts")
            for row in rollouts.table("trajectories", ["policy", "sample_id", "index"]).to_pylist()]  # fmt: skip
    assert len({tuple(row.values()) for row in rows}) == len(rows) == 16 * iterations
    # Once in MLflow as well.
    client = mlflow.MlflowClient(f"sqlite:///{loop.store.root / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("thinkimg").experiment_id])
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "eval/accuracy")] == [
        *range(iterations + 1)
    ]
    # Nothing is left: no work, no lock, no process, no temporary file but torch's compile cache, no shared memory.
    assert loop.store.sweep() == [] and loop.store.busy() == []
    deadline = time.monotonic() + 15
    while left := loop.processes():
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.2)
    tmp = Path(loop.tmp.name)
    ours = tmp / f"thinkimg-{os.getuid()}"
    assert [path for path in tmp.iterdir() if not path.name.startswith("torchinductor_")] == [ours]
    assert [*ours.iterdir()] == []
    assert [path for path in shared_memory if path.exists()] == []
