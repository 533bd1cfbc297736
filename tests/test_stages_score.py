"""The score stage: one part per part, one column per component, the same bytes for the same inputs."""

import json
import sys
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rewards_rows import call, failed, final, malformed, sample, trajectory

from thinkimg import records
from thinkimg.config import load
from thinkimg.errors import UserError
from thinkimg.records import AnswerType, to_row
from thinkimg.rewards.functions import load as load_function
from thinkimg.rewards.registry import COMPONENTS, JUDGES
from thinkimg.stages import score as stage
from thinkimg.stages.score import read_scores, score
from thinkimg.store.artifacts import Recipe, Store

SHA = "ab" * 32


def config(**rewards):
    overrides = [f"rewards.{name}={json.dumps(value)}" for name, value in rewards.items()]
    return load("tiny", ["image.types=[]", *overrides])


def table(rows, schema):
    return pa.Table.from_pylist(rows, schema)


def make_dataset(store, answer="red"):
    def produce(work):
        rows = [replace(sample(answer, AnswerType.CHOICE, ("red", "blue")), sample_id=f"s{i}") for i in range(4)]
        work.table("samples.parquet", table([to_row(row) for row in rows], records.samples()))
        images = [{"sha256": SHA, "data": b"never decoded", "width": 8, "height": 8}]
        work.table("images.parquet", table(images, records.images()))

    return store.build("dataset", Recipe("prepare", 1, 1, {"answer": answer}), produce)[0]


def make_rollouts(store, dataset, parts):
    def produce(work):
        for number, rows in enumerate(parts):
            work.table(
                f"trajectories-{number:05}.parquet", table([to_row(row) for row in rows], records.trajectories())
            )
            work.table(f"images-{number:05}.parquet", table([], records.images()))

    sizes = [[row.trajectory_id for row in part] for part in parts]
    return store.build("rollouts", Recipe("rollout", 1, 1, {"parts": sizes}, {"dataset": dataset.reference}), produce)[
        0
    ]


def group(number):
    """Four trajectories: right with a tool, wrong, no answer, failed."""
    rows = [
        trajectory(call(x=1), final("red"), answer="red"),
        trajectory(answer="blue"),
        trajectory(malformed()),
        failed(),
    ]
    names = {"sample_id": f"s{number}", "group_id": f"g{number}"}
    return [replace(row, trajectory_id=f"t{number}-{i}", index=i, **names) for i, row in enumerate(rows)]


PARTS = [group(0), group(1) + group(2), group(3)]
ANSWERS = [1.0, 0.0, 0.0, 0.0] * 4


@pytest.fixture
def made(tmp_path):
    store = Store(tmp_path / "store")
    dataset = make_dataset(store)
    return store, dataset, make_rollouts(store, dataset, PARTS)


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    load_function.cache_clear()
    (tmp_path / "own_rewards.py").write_text(
        "def luck(completions, final_answer, **columns):\n"
        "    return [None if answer is None else 0.25 for answer in final_answer]\n"
        "def broken(completions, **columns):\n    raise RuntimeError('no luck')\n"
    )


def test_every_trajectory_has_a_row_and_every_component_a_column(made, own):
    store, dataset, rollouts = made
    steps = []
    settings = config(functions=["own_rewards:luck"])
    artifact, cached = score(
        settings, dataset, rollouts, store, progress=lambda done, total: steps.append((done, total))
    )
    assert not cached and artifact.kind == "scores" and steps == [(4, 16), (12, 16), (16, 16)]
    assert {name: entry["rows"] for name, entry in artifact.files.items()} == {
        "scores-00000.parquet": 4, "scores-00001.parquet": 8, "scores-00002.parquet": 4,
    }  # fmt: skip
    names = [*(name for name in COMPONENTS if name not in JUDGES), "luck"]
    rows = [row for part in artifact.table_files("scores") for row in pq.read_table(part).to_pylist()]
    assert pq.read_schema(artifact.path("scores-00000.parquet")) == records.scores(names)
    for row, played in zip(rows, [row for part in PARTS for row in part], strict=True):
        assert [row[name] for name in stage.IDENTITY] == [getattr(played, name) for name in stage.IDENTITY]
        for name in names:
            assert (row[name]["value"] is None) == (row[name]["status"] == "missing")
            assert row[name]["reason"] or row[name]["status"] == "ok"
            assert row[name]["evidence"] is None or json.loads(row[name]["evidence"])

    values, ids, groups = read_scores(artifact)
    assert list(values) == names
    assert ids == [row["trajectory_id"] for row in rows] and groups == [row["group_id"] for row in rows]
    assert all(column.shape == (16,) and column.dtype == np.float64 for column in values.values())
    assert values["answer"].tolist() == ANSWERS
    np.testing.assert_array_equal(values["luck"], [0.25, 0.25, np.nan, np.nan] * 4)

    expected = {
        "reward/answer": 0.25,
        "reward/format": 0.5,
        "reward/tool": 0.25,
        "reward/luck": 0.25,
    }
    missing = {f"missing/{name}": 8 if name == "luck" else 0 for name in names}
    assert {name: artifact.metrics[name] for name in expected | missing} == expected | missing
    assert store.verify(artifact) == []


def test_the_same_is_not_scored_twice_and_gives_the_same_bytes(made, tmp_path):
    store, dataset, rollouts = made
    first, _ = score(config(), dataset, rollouts, store)
    again, cached = score(config(), dataset, rollouts, store)
    assert cached and again == first
    forced, cached = score(config(), dataset, rollouts, store, force=True, mapper=map)
    elsewhere = Store(tmp_path / "elsewhere")
    copy = make_dataset(elsewhere)
    other, _ = score(config(), copy, make_rollouts(elsewhere, copy, PARTS), elsewhere)
    assert not cached and forced.directory != first.directory
    assert first.digest == forced.digest == other.digest and first.fingerprint == other.fingerprint


def test_what_defines_the_scores_is_in_the_fingerprint(made, own, tmp_path):
    _, dataset, rollouts = made

    def of(settings):
        bench = stage.bench_of(settings, dataset, rollouts, None, None, None)
        return stage.recipe(settings, dataset, rollouts, bench).fingerprint

    def fingerprint(**rewards):
        return of(config(**rewards))

    with_function = fingerprint(functions=["own_rewards:luck"])
    with open(tmp_path / "own_rewards.py", "a") as file:
        file.write("LUCK = 1\n")
    load_function.cache_clear()
    different = {
        fingerprint(),
        with_function,
        fingerprint(functions=["own_rewards:luck"]),
        fingerprint(number_tolerance=0.1),
    }
    assert len(different) == 4
    elsewhere = ["where.workers=1", "mix={answer: 1}", "image.types=[]", "image.only_if_right=true"]
    assert fingerprint() == of(load("tiny", elsewhere))


def test_a_resumed_run_scores_only_what_is_missing(made):
    store, dataset, rollouts = made
    asked = []

    def dying(run, jobs):
        if "00002" in jobs[0].part:
            raise KeyboardInterrupt
        return map(run, jobs)

    def counting(run, jobs):
        asked.extend(job.part for job in jobs)
        return map(run, jobs)

    with pytest.raises(KeyboardInterrupt):
        score(config(), dataset, rollouts, store, mapper=dying)
    artifact, cached = score(config(), dataset, rollouts, store, mapper=counting)
    assert not cached and set(asked) == {"trajectories-00002.parquet"}
    assert read_scores(artifact)[0]["answer"].tolist() == ANSWERS
    assert artifact.metrics["reward/answer"] == 0.25


def test_a_mapper_gets_whole_jobs_that_run_anywhere(made):
    store, dataset, rollouts = made
    seen = []

    def elsewhere(run, jobs):
        """As a task runner on another machine: a fresh start for every job, in another order."""
        found = {}
        for job in reversed(jobs):
            stage.forget()
            thread = threading.Thread(target=lambda job=job: found.__setitem__(job.component, run(job)))
            thread.start()
            thread.join()
        seen.extend(job.component for job in jobs)
        return [found[job.component] for job in jobs]

    artifact, _ = score(config(), dataset, rollouts, store, mapper=elsewhere)
    assert seen == [name for name in COMPONENTS if name not in JUDGES] * 3
    assert artifact.digest == score(config(), dataset, rollouts, store, force=True)[0].digest


def test_rollouts_without_a_processed_image_need_no_judge_and_an_empty_part_no_row(tmp_path):
    """No CLIP is loaded: there is none here by that name."""
    store = Store(tmp_path / "store")
    dataset = make_dataset(store)
    settings = load("tiny", ["image.types=[embedding]", "image.embedding={model: nobodys-clip, pretrained: null}"])
    artifact, _ = score(settings, dataset, make_rollouts(store, dataset, [group(0), []]), store)
    column = [row["embedding"] for row in artifact.table("scores").to_pylist()]
    assert [(one["value"], one["status"]) for one in column] == [(0.0, "zero")] * 3 + [(None, "missing")]
    assert column[0]["reason"] == "No image was processed."
    assert (
        artifact.table("judgements").num_rows == 0 and artifact.files["judgements-embedding-00000.parquet"]["rows"] == 0
    )
    assert artifact.metrics["reward/embedding"] == 0.0 and artifact.metrics["missing/embedding"] == 1


def test_no_part_is_kept_in_memory(made):
    score(config(), made[1], made[2], made[0])
    assert stage._batch.cache_info().currsize == stage._inputs.cache_info().currsize == 0


def test_empty_rollouts_give_empty_scores(made):
    store, dataset, _ = made
    artifact, _ = score(config(), dataset, make_rollouts(store, dataset, [[], []]), store)
    values, ids, groups = read_scores(artifact)
    assert ids == groups == [] and all(
        column.shape == (0,) and column.dtype == np.float64 for column in values.values()
    )
    assert artifact.metrics["reward/answer"] is None


def test_rollouts_of_another_data_set_are_refused(made):
    store, _, rollouts = made
    with pytest.raises(UserError, match="was not made from"):
        score(config(), make_dataset(store, "blue"), rollouts, store)


def test_a_broken_function_fails_the_stage_by_name_and_leaves_no_artifact(made, own):
    store, dataset, rollouts = made
    with pytest.raises(UserError, match="own_rewards:broken failed: RuntimeError: no luck"):
        score(config(functions=["own_rewards:broken"]), dataset, rollouts, store)
    assert list(store.list("scores")) == []
    with pytest.raises(UserError, match="cannot be imported"):
        score(config(functions=["no_such_module:f"]), dataset, rollouts, store)
