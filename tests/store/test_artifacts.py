"""The store under crashes, power cuts, full disks, other processes and edited files."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from disk import Crash, Disk
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkimg import __version__
from thinkimg.errors import UserError
from thinkimg.store.artifacts import Problem, Store
from thinkimg.store.gc import find_garbage
from thinkimg.store.manifest import MANIFEST, Recipe, Reference, directory_digest
from thinkimg.store.tables import write_table

RECIPE = Recipe(
    "toy",
    1,
    1,
    {"learning_rate": 1e-6, "tools": ["crop_image"]},
    {"weights": Reference("weights", "ab" * 32)},
    {"my.reward": "cd" * 32},
    {"pyarrow": "25.0.1"},
)


def toy_stage(work, clock=0.0, made=None):
    """A stage of every kind of part; names in `made` are those that it closed in this run."""

    def table(name, values):
        if not work.has(name):
            work.table(name, pa.table({"value": values}))
            if made is not None:
                made.append(name)

    table("rows-00000.parquet", [1, 2])
    if not work.has("adapter"):
        with work.part("adapter") as directory:
            (directory / "nested").mkdir(parents=True)
            (directory / "nested/model.safetensors").write_bytes(bytes(range(256)))
            (directory / "config.json").write_text("{}")
    table("rows-00001.parquet", [3])
    table("timings.parquet", [clock])
    work.metrics["accuracy"] = 0.5


def build(root, **options):
    return Store(root).build("toy", RECIPE, toy_stage, **options)[0]


# fingerprints ---------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def reversed_keys(value):
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(), json_values, max_size=4), st.dictionaries(st.text(), json_values, max_size=4))
def test_fingerprint_depends_on_values_and_not_on_key_order(one, other):
    def of(config):
        return Recipe("s", 1, 1, config).fingerprint

    assert of(one) == of(reversed_keys(one)) == of(json.loads(json.dumps(one)))
    assert (of(one) == of(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


def test_fingerprint_is_golden_and_every_part_of_a_recipe_counts():
    by_hand = "e91cc14bc3f4270809d7bf55a201a6ed87cbbaa3367f5a41faeed3ffc80354e2"
    assert RECIPE.fingerprint == by_hand  # sha256sum over the JSON written out by hand
    base = dict(stage="s", stage_version=1, schema_version=1, config={"a": 1}, inputs={}, sources={}, packages={})
    changed = [
        dict(stage="t"),
        dict(stage_version=2),
        dict(schema_version=2),
        dict(config={"a": 2}),
        dict(inputs={"d": Reference("dataset", "0")}),
        dict(sources={"f": "0"}),
        dict(packages={"p": "1"}),
    ]
    assert len({Recipe(**{**base, **change}).fingerprint for change in [{}, *changed]}) == 8
    with pytest.raises(UserError, match="NaN"):
        _ = Recipe("s", 1, 1, {"a": float("nan")}).fingerprint


def test_the_version_is_in_the_manifest_and_in_no_fingerprint_or_digest(tmp_path, monkeypatch):
    first = build(tmp_path)
    assert first.manifest["host"]["thinkimg"] == __version__
    monkeypatch.setattr("thinkimg.store.manifest.__version__", "9.0.0")
    assert Store(tmp_path).build("toy", RECIPE, toy_stage) == (first, True)
    second = build(tmp_path, force=True)
    assert second.manifest["host"]["thinkimg"] == "9.0.0"
    assert (second.fingerprint, second.digest) == (first.fingerprint, first.digest)


# finding and making ---------------------------------------------------------------------------------------------------


def test_build_makes_once_then_finds_and_force_makes_another_attempt_of_equal_digest(tmp_path):
    store, calls = Store(tmp_path), []

    def produce(work):
        calls.append(work.attempt)
        work.seed, work.where = 7, {"url": Path("/x")}
        toy_stage(work, clock=float(len(calls)))

    first, cached = store.build("toy", RECIPE, produce)
    assert not cached and store.build("toy", RECIPE, produce) == (first, True) and calls == ["0001"]
    second, cached = store.build("toy", RECIPE, produce, force=True)
    assert not cached and second.attempt == "0002" and store.find("toy", RECIPE.fingerprint) == second
    assert store.verify(first) == store.verify(second) == []
    assert [*store.list()] == [*store.list("toy")] == [first, second]
    assert first.digest == second.digest
    assert first.files["timings.parquet"]["sha256"] != second.files["timings.parquet"]["sha256"]
    assert first.manifest["seed"] == 7 and first.manifest["where"] == {"url": "/x"}
    assert first.metrics == {"accuracy": 0.5}
    assert {name: entry["rows"] for name, entry in first.files.items()} == {
        "adapter/config.json": None,
        "adapter/nested/model.safetensors": None,
        "rows-00000.parquet": 2,
        "rows-00001.parquet": 1,
        "timings.parquet": 1,
    }
    assert sorted(path.name for path in first.directory.parent.iterdir()) == [".lock", "0001", "0002"]
    assert directory_digest(first.path("adapter")) == directory_digest(second.checked("adapter"))


@pytest.mark.parametrize("done", [False, True])
def test_force_takes_nothing_over_from_an_attempt_that_was_broken_off(tmp_path, done):
    store, made = Store(tmp_path), []
    if done:
        store.build("toy", RECIPE, toy_stage)

    def produce(work, fails):
        for name in ("a.txt", "b.txt"):
            if not work.has(name):
                made.append(name)
                work.text(name, str(len(made)))
            if fails:
                raise InterruptedError

    for force in (True, False) if not done else (True,):
        with pytest.raises(InterruptedError):
            store.build("toy", RECIPE, lambda work: produce(work, True), force=force)
    made.clear()
    artifact, _ = store.build("toy", RECIPE, lambda work: produce(work, False), force=True)
    assert made == ["a.txt", "b.txt"] and store.verify(artifact) == []
    assert artifact.attempt == ("0002" if done else "0001") and not list(tmp_path.rglob("*.work"))


def test_metrics_are_json_whatever_they_were(tmp_path):
    def produce(work):
        work.metrics.update(none=None, nan=float("nan"), count=3, numpy=np.float32(0.25))

    artifact = Store(tmp_path).build("toy", RECIPE, produce)[0]
    assert artifact.metrics == {"none": None, "nan": None, "count": 3, "numpy": 0.25}


def test_resolve_takes_a_path_a_reference_or_a_unique_prefix_and_names_candidates(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(UserError, match="none yet"):
        store.resolve("ab")
    made = [
        store.build(kind, Recipe("toy", version, 1, {}), lambda work: None)[0]
        for version in range(20)
        for kind in ("toy", "tin")
    ]
    one = made[-1]
    for reference in (one.directory, one.directory.parent, one.reference, str(one.reference), f"tin/{one.short}"):
        assert store.resolve(reference, "tin") == one
    assert store.resolve(one.short, "tin") == one
    with pytest.raises(UserError, match=f"Several.*tin/{one.short}, toy/{one.short}"):
        store.resolve(one.short)
    with pytest.raises(UserError, match="of kind tin, not toy"):
        store.resolve(one.directory, "toy")
    for nothing in ("", "xyz"):
        with pytest.raises(UserError, match=f"No toy under .*toy/{made[-2].short}, .* and 12 older ones"):
            store.resolve(nothing, "toy")


def test_resolve_takes_the_path_of_a_part(tmp_path, monkeypatch):
    """As of the final policy's weights, which a run prints at its end."""
    store = Store(tmp_path / "store")
    made = store.build("toy", RECIPE, lambda work: work.text("part", "text"))[0]
    monkeypatch.chdir(tmp_path)
    for path in (made.directory / "part", Path("store") / made.directory.relative_to(store.root) / "part"):
        assert store.resolve(path).reference == store.resolve(str(path), "toy").reference == made.reference
    for path in (made.directory / "other", tmp_path / "store" / "part"):
        with pytest.raises(UserError, match="begins with"):
            store.resolve(path)


# reading --------------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.none() | st.integers(0, 9), st.none() | st.text(max_size=3), st.lists(st.floats(), max_size=3)),
        max_size=30,
    ),
    st.lists(st.integers(0, 30), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_equal_tables_give_equal_bytes_however_chunked(tmp_path_factory, rows, cuts):
    schema = pa.schema({"i": pa.int64(), "s": pa.string(), "l": pa.list_(pa.float32())})
    table = pa.Table.from_pylist([dict(zip("isl", row, strict=True)) for row in rows], schema)
    bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    pieces = [table.slice(start, stop - start) for start, stop in zip(bounds, bounds[1:], strict=False)]
    home = tmp_path_factory.mktemp("bytes")
    write_table(home / "one", table)
    write_table(home / "two", pa.concat_tables(pieces))
    assert (home / "one").read_bytes() == (home / "two").read_bytes()


def test_equal_images_give_equal_bytes_however_chunked(tmp_path):
    noise = random.Random(1)  # large values: Arrow ends a page where a chunk ends
    table = pa.table(
        {
            "png": [noise.randbytes(noise.randint(1, 300_000)) for _ in range(40)],
            "kind": pa.array([str(row % 7) for row in range(40)]).dictionary_encode(),
        }
    )
    write_table(tmp_path / "one", table)
    write_table(tmp_path / "two", pa.concat_tables([table.slice(start, 7) for start in range(0, 40, 7)]))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_tables_are_read_over_their_parts_in_order_and_in_constant_memory(tmp_path):
    noise = random.Random(0)

    def produce(work):
        for part in range(2):
            images = [noise.randbytes(1 << 17) for _ in range(128)]
            ids = range(part * 128, part * 128 + 128)
            work.table(f"images-{part:05}.parquet", pa.table({"id": ids, "png": images}))
        work.table("images_of_others.parquet", pa.table({"id": [-1]}))

    artifact = Store(tmp_path).build("toy", RECIPE, produce)[0]
    assert artifact.table("images", ["id"])["id"].to_pylist() == list(range(256))
    before, peak, ids = pa.total_allocated_bytes(), 0, []
    for batch in artifact.batches("images"):
        ids += batch["id"].to_pylist()
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert ids == list(range(256))
    assert peak < 12 << 20, "32 MiB of images were held at once"
    with pytest.raises(UserError, match="no table 'samples'"):
        artifact.table("samples")


# damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return build(tmp_path_factory.mktemp("published"))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_verify_names_the_file_with_any_flipped_bit_or_lost_tail(published, data):
    name = data.draw(st.sampled_from(["manifest.json", *published.files]))
    path = published.directory / name
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    flipped = [good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :] for bit in range(8)]
    bad = data.draw(st.sampled_from([good[:at], *flipped]))
    try:
        path.write_bytes(bad)
        assert [problem.name for problem in Store(published.directory).verify(published.directory)] == [name]
    finally:
        path.write_bytes(good)
    assert Store(published.directory).verify(published) == []


def test_verify_names_what_is_missing_extra_or_no_file(tmp_path):
    artifact = build(tmp_path)
    (artifact.directory / "rows-00000.parquet").unlink()
    (artifact.directory / "adapter/more.txt").write_text("more")
    (artifact.directory / "adapter/config.json").unlink()
    (artifact.directory / "adapter/config.json").symlink_to("/dev/null")
    assert Store(tmp_path).verify(artifact) == [
        Problem("adapter/config.json", "not a regular file"),
        Problem("adapter/more.txt", "not in the manifest"),
        Problem("rows-00000.parquet", "missing"),
    ]


def test_verify_follows_the_inputs(tmp_path):
    store, source = Store(tmp_path), build(tmp_path)
    recipe = Recipe("next", 1, 1, {}, {"rows": source.reference})
    artifact = store.build("next", recipe, toy_stage)[0]
    assert store.verify(artifact) == []
    (source.directory).rename(tmp_path / "aside")
    other = store.build("toy", RECIPE, lambda work: work.text("note.txt", "other"))[0]
    assert other.reference.attempt == "0001"
    assert [problem.name for problem in store.verify(artifact)] == ["input rows"]


def test_an_edited_file_is_refused_where_it_is_read(tmp_path):
    artifact = build(tmp_path)
    assert artifact.checked("adapter/config.json").read_text() == "{}"
    (artifact.directory / "adapter/config.json").write_text("[]")
    for name in ("adapter/config.json", "adapter"):
        with pytest.raises(UserError, match="config.json is not what was published"):
            Store(tmp_path).find("toy", RECIPE.fingerprint).checked(name)
    (artifact.directory / "adapter/config.json").write_text("[ ]")
    with pytest.raises(UserError, match="config.json is not what was published"):
        Store(tmp_path).find("toy", RECIPE.fingerprint)
    assert build(tmp_path, force=True).attempt == "0002"


# crashes --------------------------------------------------------------------------------------------------------------


def events_of_a_run(root, monkeypatch):
    disk = Disk(monkeypatch)
    build(root)
    return disk.events


@pytest.mark.parametrize("losses", [(None, None, 1.0), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)], ids=["kill", "some", "all"])
def test_whatever_the_crash_there_is_a_right_artifact_or_none_and_a_run_gets_through(tmp_path, monkeypatch, losses):
    whole = build(tmp_path / "whole").digest
    events = events_of_a_run(tmp_path / "counted", monkeypatch)
    assert events > 100
    for stop_at in range(1, events + 1):
        rng, closed, disk = random.Random(stop_at), [], Disk(monkeypatch)
        store = Store(tmp_path / str(stop_at))
        store.root.mkdir()
        stops = (stop_at, rng.randint(1, events), None)  # a run, a recovery that may crash too, a last one
        for stop, loss in zip(stops, losses, strict=True):
            disk.events, disk.stop_at = 0, stop
            try:
                store.build("toy", RECIPE, partial(toy_stage, made=closed))
                finished = True
            except Crash:
                finished = False
            if loss is not None:
                disk.cut_power(rng, loss)
            found = store.find("toy", RECIPE.fingerprint)
            assert found or not finished, "what build returned must outlive a power cut"
            assert not found or (store.verify(found) == [] and found.digest == whole)
        assert finished and len(closed) == len(set(closed)), "a closed part is never made again"


def test_a_closed_part_that_was_damaged_before_the_next_run_is_made_again(tmp_path):
    def fail(work):
        toy_stage(work)
        (work.path("adapter") / "config.json").write_text("[]")
        raise RuntimeError("the stage failed")

    with pytest.raises(RuntimeError):
        Store(tmp_path).build("toy", RECIPE, fail)
    made = []
    artifact = Store(tmp_path).build("toy", RECIPE, partial(toy_stage, made=made))[0]
    assert made == [] and artifact.checked("adapter/config.json").read_text() == "{}"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_full_or_unwritable_disk_is_one_clear_sentence_and_the_next_run_gets_through(tmp_path, monkeypatch, code):
    events = events_of_a_run(tmp_path / "counted", monkeypatch)
    for stop_at in range(1, events + 1, 5):
        root = tmp_path / str(stop_at)
        Disk(monkeypatch, stop_at, OSError(code, os.strerror(code)))
        with pytest.raises(UserError, match=f"^Cannot [a-z]+ {root}.*: {os.strerror(code)}"):
            build(root)
        Disk(monkeypatch)
        assert Store(root).verify(build(root)) == []


def test_a_real_file_in_the_way_and_a_real_full_device(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot make .*file: File exists"):
        build(tmp_path / "file")

    def fill(work):
        with work.part("log.txt"), open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(UserError, match=r"Cannot write .*log\.txt: No space left"):
        Store(tmp_path).build("toy", RECIPE, fill)

    def read_elsewhere(work):
        with work.part("log.txt"):
            raise PermissionError(errno.EACCES, "Permission denied", "/data/samples.jsonl")

    with pytest.raises(PermissionError, match=r"samples\.jsonl"):
        Store(tmp_path).build("toy", RECIPE, read_elsewhere)


def test_what_else_lies_beside_attempts_is_left_alone(tmp_path):
    """macOS's `._0001.work` ended each build, and a sweep would have removed `old.work`."""
    store, first = Store(tmp_path), build(tmp_path)
    odd = ["._0001.work", "old.work", "0002.work.bak", "._0001", "1", "notes.jsonl", "\u0661\u0661\u0661\u0661"]
    for name in odd:
        (first.directory.parent / name).mkdir()
        (first.directory.parent / name / MANIFEST).write_text("odd")
    second, _ = store.build("toy", RECIPE, toy_stage, force=True)
    assert second.attempt == "0002" and store.sweep(remove=True) == []
    assert [artifact.attempt for artifact in store.list()] == ["0001", "0002"]
    assert list(store.directories()) == [first.directory, second.directory]
    assert all((first.directory.parent / name).is_dir() for name in odd)
    find_garbage(store)


def test_sweep_lists_what_a_failed_run_left_and_leaves_work_in_progress_alone(tmp_path):
    store = Store(tmp_path)

    def fail(work):
        work.text("note.txt", "kept")
        assert store.sweep(remove=True) == []
        raise RuntimeError("the stage failed")

    with pytest.raises(RuntimeError):
        store.build("toy", RECIPE, fail)
    left = store.sweep()
    assert [path.name for path in left] == ["0001.jsonl", "0001.work"]
    assert store.sweep(remove=True) == left and store.sweep() == []


# other processes ------------------------------------------------------------------------------------------------------

STAGE = textwrap.dedent("""
    import sys, time
    from thinkimg.store.artifacts import Store
    from thinkimg.store.manifest import Recipe

    def produce(work):
        work.text("first.txt", "closed")
        print("working", flush=True)
        time.sleep(float(sys.argv[2]))
        work.text("second.txt", "closed")

    artifact, cached = Store(sys.argv[1]).build("slow", Recipe("slow", 1, 1, {}), produce)
    print(cached, artifact.digest, flush=True)
""")


def start(root, seconds):
    return subprocess.Popen([sys.executable, "-c", STAGE, root, str(seconds)], stdout=subprocess.PIPE, text=True)


def test_two_processes_do_the_work_once(tmp_path):
    outputs = [process.communicate(timeout=30)[0].split() for process in [start(tmp_path, 1), start(tmp_path, 1)]]
    (found, digest), (worked, made, same) = sorted(outputs, key=len)
    assert (found, worked, made) == ("True", "working", "False") and digest == same


def test_a_killed_process_frees_its_lock_and_its_closed_parts_are_reused(tmp_path):
    process = start(tmp_path, 600)
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    reused = []

    def produce(work):
        reused.append(work.path("first.txt").read_text())
        work.text("second.txt", "closed")

    artifact, cached = Store(tmp_path).build("slow", Recipe("slow", 1, 1, {}), produce)
    assert (reused, cached, sorted(artifact.files)) == (["closed"], False, ["first.txt", "second.txt"])


def test_two_threads_do_the_work_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        built = [*pool.map(lambda _: Store(tmp_path).build("toy", RECIPE, toy_stage), range(4))]
    assert sorted(cached for _, cached in built) == [False, True, True, True]
