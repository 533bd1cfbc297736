"""Memory of what reads an iteration's rollouts, at 100,000 of them: each reader in a process of its own.

    python benchmarks/memory_of_rollouts.py [--rollouts 100000]

summary     stages.rollout.summarise_rows over all trajectories
score       stages.score without judges
advantages  stages.train up to the trainer: mix, advantages, included rows
tracking    what MLflow's traces of the iteration need

A reader's memory is its peak minus what its process has after its imports. It may be twice that of one part of the
rollouts, read as records, and 1 KiB per rollout; the exit code is 1 where one needs more.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cyclopts
import numpy as np

PARTS, GROUP, TOKENS = 8, 8, 300
READERS = ("part", "summary", "score", "advantages", "tracking")
PER_ROLLOUT = 1024


def generate(root: Path, rollouts: int) -> None:
    """Make a store with a data set and rollouts: GROUP trajectories of TOKENS tokens and two turns for each sample."""
    import pyarrow as pa
    from PIL import Image

    from thinkimg import records
    from thinkimg.images.decode import pixel_hash
    from thinkimg.records import AnswerType, CallStatus, Sample, StopReason, Trajectory, Turn, TurnKind, to_row
    from thinkimg.store.artifacts import Store
    from thinkimg.store.image_table import encode_lossless, image_writer
    from thinkimg.store.manifest import Recipe

    store, picture = Store(root), Image.new("RGB", (56, 56), (10, 20, 30))
    shown = pixel_hash(picture)
    rng = np.random.default_rng(0)

    def dataset(work) -> None:
        rows = [
            to_row(
                Sample(f"s{i}", "Which way?", ("left",), AnswerType.CHOICE, ("left", "right"), (shown,), "own", "train")
            )
            for i in range(rollouts // GROUP)
        ]
        work.table("samples-00000.parquet", pa.Table.from_pylist(rows, records.sample_schema()))
        with work.part("images-00000.parquet") as path, image_writer(path) as add:
            add(shown, encode_lossless(picture), *picture.size)

    def trajectory(number: int) -> dict:
        sample, index = divmod(number, GROUP)
        thought = "I crop the part of the picture where the stripes are too fine to be seen."
        call = Turn(
            thought,
            TurnKind.TOOL,
            "crop_image",
            '{"height":28,"width":28,"x":0,"y":0}',
            CallStatus.OK,
            None,
            0,
            shown,
            "Image 1",
            40,
            "v",
        )
        answer = Turn("<answer>left</answer>", TurnKind.ANSWER, tokens=12, weights="v")
        tokens = tuple(rng.integers(0, 2048, TOKENS).tolist())
        return to_row(
            Trajectory(
                f"g{sample}-{index}", f"s{sample}", f"g{sample}", index, "p", tokens, (0,) * (TOKENS - 52) + (1,) * 52,
                tuple(rng.random(52).tolist()), (shown, shown), ((1, 4, 4), (1, 4, 4)), (call, answer),
                "left" if rng.random() < 0.5 else "right", StopReason.ANSWER, None, "v", ((56, 56), (56, 56)),
            )
        )  # fmt: skip

    made, _ = store.build("dataset", Recipe("prepare", 1, 1, {}), dataset)

    def play(work) -> None:
        size = rollouts // PARTS
        for part in range(PARTS):
            table = pa.Table.from_pylist([], records.trajectory_schema())
            for start in range(part * size, (part + 1) * size, 2500):
                rows = [trajectory(number) for number in range(start, min(start + 2500, (part + 1) * size))]
                table = pa.concat_tables([table, pa.Table.from_pylist(rows, records.trajectory_schema())])
            work.table(f"trajectories-{part:05}.parquet", table)
        with work.part("images-00000.parquet") as path, image_writer(path) as add:
            add(shown, encode_lossless(picture), *picture.size)

    store.build("rollouts", Recipe("rollout", 1, 1, {}, {"dataset": made.reference}), play)


def read(name: str, root: Path) -> None:
    """Run one reader, and print its peak over the process after its imports, in bytes, and its seconds."""

    from thinkimg.config.load import load_config
    from thinkimg.resources import Resources
    from thinkimg.rewards.joined import join
    from thinkimg.rewards.mix import Mix
    from thinkimg.scheduler import Builder
    from thinkimg.stages.rollout import summarise_rows
    from thinkimg.stages.score import score
    from thinkimg.stages.train import advantages_table, compute_advantages
    from thinkimg.store.artifacts import Store
    from thinkimg.tracking.trace_data import trace_candidates
    from thinkimg.tracking.traces import select_trajectories

    config = load_config("tiny", ["image.types=[]", "mix={answer: 0.7, tool: 0.3}", f"where.store={root}"])
    store = Store(root)
    (rollouts,) = store.list("rollouts")
    scores = next(store.list("scores"), None)
    list(rollouts.trajectories(ids=["g0-0"]))  # what pyarrow loads with its first use
    before, began = peak(), time.perf_counter()
    match name:
        case "part":
            rows = list(rollouts.trajectories("trajectories-00000.parquet"))
            assert len(rows) == rollouts.parts()["trajectories-00000.parquet"]
        case "summary":
            summarise_rows(rollouts.trajectories())
        case "score":
            with Resources(config.where) as resources:
                Builder(config, store, resources).make(score, rollouts=rollouts)
        case "advantages":
            joined = join(rollouts, scores)
            advantages_table(
                joined, *compute_advantages(Mix.from_config(config.mix, config.image), config.train, joined)
            )
        case "tracking":
            joined = join(rollouts, scores)
            totals = Mix.from_config(config.mix, config.image).totals(joined.components, joined.groups)
            chosen = select_trajectories(trace_candidates(joined, totals), 8)
            assert len(list(rollouts.trajectories(ids=[name for name, _ in chosen]))) == 8
    print(json.dumps([peak() - before, time.perf_counter() - began]))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(*, rollouts: int = 100_000) -> None:
    """Measure all readers and compare each with what it may need."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--read"]
        subprocess.run([sys.executable, __file__, "--generate", folder, str(rollouts)], check=True)
        found = {}
        for name in READERS:
            done = subprocess.run([*command, name, folder], check=True, capture_output=True, text=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    allowed = 2 * found["part"][0] + PER_ROLLOUT * rollouts
    print(f"{rollouts} rollouts in {PARTS} parts; one part as records: {found['part'][0] / 2**20:.0f} MiB")
    print(f"{'reader':<12}{'MiB':>8}{'of allowed':>12}{'seconds':>9}")
    for name in READERS[1:]:
        size, seconds = found[name]
        print(f"{name:<12}{size / 2**20:>8.0f}{size / allowed:>11.0%} {seconds:>8.1f}")
    if any(found[name][0] > allowed for name in READERS):
        raise SystemExit(1)


if __name__ == "__main__":
    if "--generate" in sys.argv:
        generate(Path(sys.argv[2]), int(sys.argv[3]))
    elif "--read" in sys.argv:
        read(sys.argv[2], Path(sys.argv[3]))
    else:
        cyclopts.run(main)
