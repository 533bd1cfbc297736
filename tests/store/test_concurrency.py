"""Several processes on one store: each piece of work is done once, nobody waits for ever, nothing is torn."""

import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe
from thinkimg.tracking.records import load_records

WORKERS, FINGERPRINTS = 4, 8

BUILD = textwrap.dedent("""
    import os, random, sys, time
    from thinkimg.store.artifacts import Store
    from thinkimg.store.manifest import Recipe

    store, noise = Store(sys.argv[1]), random.Random(int(sys.argv[2]))
    numbers = list(range(int(sys.argv[3])))
    noise.shuffle(numbers)

    def produce(work):
        for part in range(3):
            time.sleep(noise.uniform(0, 0.02))
            work.text(f"part-{part}.txt", str(part))

    for number in numbers:
        artifact, cached = store.build("toy", Recipe("toy", number, 1, {}), produce)
        print(number, cached, artifact.digest, flush=True)
""")

RECORD = textwrap.dedent("""
    import sys
    from thinkimg.store.artifacts import Store
    from thinkimg.tracking.records import LoopRecord, load_record, save_record

    store = Store(sys.argv[1])
    for step in range(60):
        record = LoopRecord("ab" * 8, {"who": sys.argv[2]}, "x" * 20_000)
        record.add(step, {}, {"eval/accuracy": 0.5})
        save_record(store, record)
        assert load_record(store, "ab" * 8).name == "x" * 20_000
""")


def run_all(code: str, *argument_lists) -> list[str]:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in argument_lists
    ]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in running]
    assert [status for *_, status in ended] == [0] * len(running), [errors for _, errors, _ in ended]
    return [output for output, *_ in ended]


def test_every_fingerprint_is_made_once_whoever_asks_in_whatever_order(tmp_path):
    outputs = run_all(BUILD, *((tmp_path, seed, FINGERPRINTS) for seed in range(WORKERS)))
    lines = [line.split() for output in outputs for line in output.splitlines()]
    assert len(lines) == WORKERS * FINGERPRINTS
    for number in range(FINGERPRINTS):
        mine = [(cached, digest) for n, cached, digest in lines if n == str(number)]
        assert sorted(cached for cached, _ in mine) == ["False"] + ["True"] * (WORKERS - 1)
        assert len({digest for _, digest in mine}) == 1
    store = Store(tmp_path)
    assert len([*store.list()]) == FINGERPRINTS and store.sweep() == [] and store.busy() == []
    assert all(store.verify(artifact) == [] for artifact in store.list())


def test_two_loops_of_one_config_do_not_tear_each_others_record(tmp_path):
    run_all(RECORD, (tmp_path, "one"), (tmp_path, "other"))
    (record,) = load_records(Store(tmp_path))
    assert record.config["who"] in ("one", "other") and record.iteration(59).metrics == {"eval/accuracy": 0.5}
    left = sorted(path.name for path in Path(tmp_path, "loops").iterdir())
    assert left == [".lock", "abababababababab.json"]
    assert json.loads((tmp_path / "loops" / left[1]).read_bytes())["format"] == 1


def test_who_waits_for_another_process_can_be_ended(tmp_path):
    """As a loop that is interrupted: its stage would wait for hours in a thread."""
    store, recipe = Store(tmp_path), Recipe("stage", 1, 1, {})
    calls = []

    class Ended(Exception):
        pass

    def check():
        calls.append(len(calls))
        if len(calls) == 3:
            raise Ended

    def wait():
        with store.create("dataset", recipe, waiting=check):
            raise AssertionError("it does not have the lock")

    with store.create("dataset", recipe) as work, ThreadPoolExecutor(1) as pool:
        with pytest.raises(Ended):
            pool.submit(wait).result(timeout=20)
        work.text("file", "made meanwhile")
        work.publish()
    assert calls == [0, 1, 2]
