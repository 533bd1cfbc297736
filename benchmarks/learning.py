"""Learning to use tools: runs whole loops and draws their measurements.

    python benchmarks/learning.py run --store /tmp/learning --seed 0    a loop; seed of data, warm start and rollouts
    python benchmarks/learning.py run --store /tmp/learning --seed 0 --no-tools
    python benchmarks/learning.py report --store /tmp/learning          tables, and docs/learning.png

Everything is read back from the artifacts; a run that was stopped goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from thinkimg.config.load import load_config
from thinkimg.config.tree import Config
from thinkimg.pipeline import outside_inputs
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact
from thinkimg.tracking.records import LoopRecord, load_record, loop_id

FAMILIES = ("detail", "dark", "turned", "both")


def settings(store: str, seed: int, tools: bool) -> list[str]:
    found = [f"where.store={store}", f"seed={seed}", f"data.seed={seed}"]
    return found if tools else [*found, "conversation.tools=[]", "mix={format: 0.2, answer: 0.8}"]


def run(store: str, seed: int, tools: bool) -> None:
    """The loop, and for a policy with tools a last evaluation with grey images in place of those that tools make."""
    overrides = [part for override in settings(store, seed, tools) for part in ("--set", override)]
    subprocess.run([sys.executable, "-m", "thinkimg", "run", "--preset", "tiny", *overrides], check=True)
    if tools:
        config = load_config("tiny", settings(store, seed, tools))
        record = record_of(config)
        final = record.iteration(config.iterations).artifacts["train"].fingerprint
        count = str(config.evaluate.samples_ends)
        command = [sys.executable, "-m", "thinkimg", "evaluate", "--policy", final, "--samples", count, "--blind"]
        subprocess.run([*command, "--preset", "tiny", *overrides], check=True)


def record_of(config: Config) -> LoopRecord:
    record = load_record(Store(config.where.store), loop_id(config, outside_inputs(config)))
    assert record is not None, "this loop has not been run"
    return record


def evaluations(config: Config) -> list[Artifact]:
    """One per step, 0 first."""
    store = Store(config.where.store)
    return [store.resolve(iteration.artifacts["evaluate"]) for iteration in record_of(config).iterations]


def blind(config: Config, final: Artifact) -> Artifact | None:
    policy = final.manifest["recipe"]["inputs"]["policy"]["digest"]
    for artifact in Store(config.where.store).list("evaluation"):
        recipe = artifact.manifest["recipe"]
        if recipe["config"]["blind"] and recipe["inputs"]["policy"]["digest"] == policy:
            return artifact
    return None


def row(name: str, found: dict, prefix: str = "") -> str:
    def share(key: str) -> str:
        value = found.get(prefix + key)
        return "    –" if value is None else f"{100 * value:5.1f}"

    interval = f"[{share('accuracy_low').strip()}, {share('accuracy_high').strip()}]"
    parts = [
        share("accuracy"),
        f"{interval:<14}",
        share("avg_at_k"),
        share("tool_rate"),
        share("right_arguments"),
        share("right_reading"),
    ]
    return f"{name:<34}" + "  ".join(parts)


def report(store: str) -> None:
    print(f"{'':<34}greedy  95 %            avg@k   tool   args  reading")
    curves = {}
    for seed in range(10):
        config = load_config("tiny", settings(store, seed, tools=True))
        if load_record(Store(store), loop_id(config, outside_inputs(config))) is None:
            continue
        steps = evaluations(config)
        curves[seed] = steps
        print(row(f"seed {seed}: warm-started", steps[0].metrics))
        print(row(f"seed {seed}: after {len(steps) - 1} iterations", steps[-1].metrics))
        grey = blind(config, steps[-1])
        if grey is not None:
            print(row("  the same, tool images grey", grey.metrics))
        without = load_config("tiny", settings(store, seed, tools=False))
        other = load_record(Store(store), loop_id(without, outside_inputs(without))) and evaluations(without)[-1]
        for family in FAMILIES:
            print(row(f"  {family}: warm-started", steps[0].metrics, f"{family}/"))
            print(row(f"  {family}: final", steps[-1].metrics, f"{family}/"))
            if other:
                print(row(f"  {family}: trained without tools", other.metrics, f"{family}/"))
    print("chance is 25 in every family")
    draw(curves, Path(__file__).parents[1] / "docs" / "learning.png")


def draw(curves: dict[int, list[Artifact]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for seed, steps in curves.items():
        shares = [100 * step.metrics["accuracy"] for step in steps]
        low = [100 * step.metrics["accuracy_low"] for step in steps]
        high = [100 * step.metrics["accuracy_high"] for step in steps]
        (line,) = left.plot(range(len(steps)), shares, label=f"greedy, seed {seed}")
        left.fill_between(range(len(steps)), low, high, color=line.get_color(), alpha=0.12)
        sampled = [100 * step.metrics["avg_at_k"] for step in steps]
        left.plot(
            range(len(steps)),
            sampled,
            color=line.get_color(),
            linestyle=":",
            label=f"avg@k at temperature 1, seed {seed}",
        )
    first = next(iter(curves.values()))
    for family in FAMILIES:
        right.plot(range(len(first)), [100 * step.metrics[f"{family}/accuracy"] for step in first], label=family)
    for axes, title in (
        (left, "Held-out accuracy, 95 % intervals shaded"),
        (right, f"By family, seed {next(iter(curves))}"),
    ):
        axes.axhline(25, color="grey", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel="iteration", ylim=(0, 102))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7, loc="lower right")
    left.set_ylabel("%")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"drawn: {path.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--store", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tools", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.store, arguments.seed, not arguments.no_tools)
    else:
        report(arguments.store)
