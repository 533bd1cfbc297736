"""One step off-policy on two cores: engine on one, trainer on the other, lag 0 beside lag 1.

    python benchmarks/lag.py run --store /tmp/lag --seed 0      both loops from one warm start, which is made once
    python benchmarks/lag.py report --store /tmp/lag            a table, from what the loops have stored

Rewards are rules alone, so that the engine plays and the trainer trains and nobody judges, and there are so many epochs
that the two take about as long. Seconds are those of the stages as the manifests state them; without a lag each runs
alone, but where a policy is evaluated. An iteration lasts from one policy to the next.
"""

import argparse
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from statistics import mean, median

from thinkimg.config.load import load_config
from thinkimg.config.tree import Config
from thinkimg.pipeline import outside_inputs
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact
from thinkimg.tracking.records import load_record, loop_id

COMMON = [
    "image.types=[]", "mix={format: 0.2, tool: 0.3, answer: 0.5}", "where.engine.cpu_threads_bind=0",
    "where.trainer.cpu_threads_bind=1", "train.epochs=3", "evaluate.every=3",
]  # fmt: skip
SEEDS = range(3)


def thinkimg(*arguments: str) -> str:
    """Run a command, and return what it printed on stdout."""
    command = [sys.executable, "-m", "thinkimg", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def overrides(store: str, seed: int, lag: int, iterations: int, checkpoint: Path) -> list[str]:
    """Return the settings of a loop."""
    own = [f"where.store={store}", f"seed={seed}", f"loop.lag={lag}", f"iterations={iterations}"]
    return [*COMMON, *own, f"warmstart.checkpoint={checkpoint}"]


def run(store: str, seed: int, iterations: int) -> None:
    """Make the warm start unless it is there, and run both loops."""
    checkpoint = find_checkpoint(store)
    for lag in (0, 1):
        options = [part for text in overrides(store, seed, lag, iterations, checkpoint) for part in ("--set", text)]
        thinkimg("run", "--preset", "tiny", *options)


def find_checkpoint(store: str) -> Path:
    """Return the directory of the warm start's model, which is made where the store has none."""
    options = [part for text in [*COMMON, f"where.store={store}"] for part in ("--set", text)]
    dataset = thinkimg("prepare", "--preset", "tiny", *options).split()[-1]
    reference = thinkimg("warmstart", "--dataset", dataset, "--preset", "tiny", *options).split()[-1]
    return Store(store).resolve(reference).path("policy") / "model"


def report(store: str, iterations: int) -> None:
    """Print a row per loop, and the ratios of both lags."""
    checkpoint, walls = find_checkpoint(store), {}
    print("seed lag | iteration s | rollout s | trainer s | the longer | accuracy %, 95 % | effective sample")
    for seed in SEEDS:
        for lag in (0, 1):
            config = load_config("tiny", overrides(store, seed, lag, iterations, checkpoint))
            if (stages := read_stages(config)) is None:
                continue
            walls[seed, lag] = describe(seed, lag, stages)
    for seed in SEEDS:
        if (seed, 0) in walls and (seed, 1) in walls:
            print(f"seed {seed}: an iteration with lag takes {walls[seed, 1] / walls[seed, 0]:.2f} of one without")


def read_stages(config: Config) -> list[dict[str, Artifact]] | None:
    """Return the artifacts of each iteration by stage, from 0 on; None where the loop was not run."""
    store = Store(config.where.store)
    record = load_record(store, loop_id(config, outside_inputs(config)))
    if record is None:
        return None
    return [
        {name: store.resolve(reference) for name, reference in iteration.artifacts.items()}
        for iteration in record.iterations
    ]


def describe(seed: int, lag: int, stages: list[dict[str, Artifact]]) -> float:
    """Print the row of a loop; return the median seconds of its iterations but the first, in which servers start."""
    ends = [finished(iteration["train"]) for iteration in stages[1:]]
    walls = [(end - before).total_seconds() for before, end in zip(ends, ends[1:], strict=False)]
    engine = [seconds(iteration["rollout"]) for iteration in stages[2:]]
    trainer = [seconds(iteration["train"]) for iteration in stages[2:]]
    longer = [max(pair) for pair in zip(engine, trainer, strict=True)]
    last = stages[-1]["evaluate"].metrics
    effective = mean(i["train"].metrics["sampling/effective_sample"] for i in stages[1:])
    curve = " ".join(f"{100 * i['evaluate'].metrics['accuracy']:.0f}" for i in stages if "evaluate" in i)
    print(
        f"   {seed}   {lag} | {median(walls):11.1f} | {median(engine):9.1f} | {median(trainer):9.1f} | "
        f"{median(longer):10.1f} | {curve} [{100 * last['accuracy_low']:.0f}–{100 * last['accuracy_high']:.0f}] | "
        f"{effective:.3f}"
    )
    return median(walls)


def finished(artifact: Artifact) -> datetime:
    """Return the time at which an artifact was complete."""
    return datetime.fromisoformat(artifact.manifest["finished"])


def seconds(artifact: Artifact) -> float:
    """Return how long the making of an artifact took."""
    return (finished(artifact) - datetime.fromisoformat(artifact.manifest["started"])).total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--store", required=True)
    parser.add_argument("--seed", type=int, default=0, choices=SEEDS)
    parser.add_argument("--iterations", type=int, default=6)
    given = parser.parse_args()
    if given.command == "run":
        run(given.store, given.seed, given.iterations)
    else:
        report(given.store, given.iterations)


if __name__ == "__main__":
    main()
