"""The score stage: one part per part, one column per component, the same bytes for the same inputs."""

import gc
import json
import pickle
import sys
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fingerprints import Stand
from recorded_stages import SETTINGS
from rewards_rows import call, failed, final, malformed, sample, trajectory
from single_stage import build_stage, recipe_of

from thinkimg import records
from thinkimg.config.load import load_config
from thinkimg.dry_run import preview
from thinkimg.errors import UserError
from thinkimg.records import AnswerType, Trajectory, to_row
from thinkimg.resources import Resources
from thinkimg.rewards.batch import Batch
from thinkimg.rewards.context import JudgeContext
from thinkimg.rewards.judge import load_judges
from thinkimg.rewards.judgement import Pair
from thinkimg.rewards.settings import RULES
from thinkimg.rewards.user_function import load_function as load_function
from thinkimg.scheduler import Builder, Plan
from thinkimg.stages import score as module
from thinkimg.stages import train_clip
from thinkimg.store.artifacts import Store
from thinkimg.store.kinds import IDENTITY
from thinkimg.store.manifest import Recipe

SHA = "ab" * 32


def config(**rewards):
    overrides = [f"rewards.{name}={json.dumps(value)}" for name, value in rewards.items()]
    return load_config("tiny", ["image.types=[]", *overrides])


def score(config, dataset, rollouts, store, **options):
    return build_stage(module.score, config, store, dataset=dataset, rollouts=rollouts, **options)


def table(rows, schema):
    return pa.Table.from_pylist(rows, schema)


def make_dataset(store, answer="red"):
    def produce(work):
        rows = [replace(sample(answer, AnswerType.CHOICE, ("red", "blue")), sample_id=f"s{i}") for i in range(4)]
        work.table("samples.parquet", table([to_row(row) for row in rows], records.sample_schema()))
        images = [{"sha256": SHA, "data": b"never decoded", "width": 8, "height": 8}]
        work.table("images.parquet", table(images, records.image_schema()))

    return store.build("dataset", Recipe("prepare", 1, 1, {"answer": answer}), produce)[0]


def make_rollouts(store, dataset, parts):
    def produce(work):
        for number, rows in enumerate(parts):
            work.table(
                f"trajectories-{number:05}.parquet", table([to_row(row) for row in rows], records.trajectory_schema())
            )
            work.table(f"images-{number:05}.parquet", table([], records.image_schema()))

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
ANSWERS = [1.0, 0.0, 0.0, np.nan] * 4


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


def test_progress_counts_trajectories_while_they_are_judged_and_never_falls():
    steps = []
    tally = module.Tally(lambda done, total: steps.append((done, total)), 30)
    tally.begin(20)
    tally.expect(8)
    tally.judge(2)
    tally.judge(6)
    tally.expect(8)  # a judge takes over for another
    tally.judge(4)
    tally.judge(4)
    tally.score(20)
    tally.score(10)
    assert steps == [(5, 30), (20, 30), (20, 30), (20, 30), (20, 30), (30, 30)]


def test_every_trajectory_has_a_row_and_every_component_a_column(made, own):
    store, dataset, rollouts = made
    steps = []
    settings = config(functions=["own_rewards:luck"])
    artifact, cached = score(
        settings, dataset, rollouts, store, progress=lambda done, total: steps.append((done, total))
    )
    assert not cached and artifact.kind == "scores" and steps == [(0, 16), (4, 16), (12, 16), (16, 16)]
    assert {name: entry["rows"] for name, entry in artifact.files.items()} == {
        "scores-00000.parquet": 4, "scores-00001.parquet": 8, "scores-00002.parquet": 4,
    }  # fmt: skip
    names = [*RULES.shipped, "luck"]
    rows = [row for part in artifact.table_files("scores") for row in pq.read_table(part).to_pylist()]
    assert pq.read_schema(artifact.path("scores-00000.parquet")) == records.score_schema(names)
    for row, played in zip(rows, [row for part in PARTS for row in part], strict=True):
        assert [row[name] for name in IDENTITY] == [getattr(played, name) for name in IDENTITY]
        for name in names:
            assert (row[name]["value"] is None) == (row[name]["status"] == "missing")
            assert row[name]["reason"] or row[name]["status"] == "ok"
            assert row[name]["evidence"] is None or json.loads(row[name]["evidence"])

    values, (ids, groups) = artifact.values(), artifact.identities()
    assert list(values) == names
    assert ids == [row["trajectory_id"] for row in rows] and groups == [row["group_id"] for row in rows]
    assert all(column.shape == (16,) and column.dtype == np.float64 for column in values.values())
    np.testing.assert_array_equal(values["answer"], ANSWERS)
    np.testing.assert_array_equal(values["luck"], [0.25, 0.25, np.nan, np.nan] * 4)

    expected = {
        "reward/answer": 1 / 3,
        "reward/format": 2 / 3,
        "reward/tool": 1 / 3,
        "reward/luck": 0.25,
    }
    missing = {f"missing/{name}": 8 if name == "luck" else 4 for name in names}
    assert {name: artifact.metrics[name] for name in expected | missing} == expected | missing
    assert store.verify(artifact) == []


def test_the_same_is_not_scored_twice_and_gives_the_same_bytes(made, tmp_path):
    store, dataset, rollouts = made
    first, _ = score(config(), dataset, rollouts, store)
    again, cached = score(config(), dataset, rollouts, store)
    assert cached and again == first
    forced, cached = score(config(), dataset, rollouts, store, force=True)
    elsewhere = Store(tmp_path / "elsewhere")
    copy = make_dataset(elsewhere)
    other, _ = score(config(), copy, make_rollouts(elsewhere, copy, PARTS), elsewhere)
    assert not cached and forced.directory != first.directory
    assert first.digest == forced.digest == other.digest and first.fingerprint == other.fingerprint


def test_what_defines_the_scores_is_in_the_fingerprint(made, own, tmp_path):
    _, dataset, rollouts = made

    def of(settings):
        return recipe_of(module.score, settings, dataset=dataset, rollouts=rollouts).fingerprint

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
        fingerprint(answer={"number_tolerance": 0.1}),
    }
    assert len(different) == 4
    elsewhere = ["where.workers=1", "mix={answer: 1}", "image.types=[]", "image.only_if_right=true"]
    assert fingerprint() == of(load_config("tiny", elsewhere))


POLICY = Stand("policy", "d")
ADAPTER = ["model.tiny=null", "model.adaptation=lora"]


@pytest.mark.parametrize(
    ("types", "dtype", "four_bits"),
    [
        (["self"], True, False),
        (["attention"], True, True),
        (["self", "attention"], True, True),
        (["teacher"], True, False),  # the frozen first policy
        (["embedding"], False, False),
        ([], False, False),
    ],
)
def test_the_precision_of_the_model_that_judges_is_in_fingerprint_and_in_the_keys_of_judgements(
    made, types, dtype, four_bits
):
    _, dataset, rollouts = made
    inputs = {"rollouts": rollouts, "dataset": dataset, "player": POLICY, "first": POLICY, "clip": Stand("clip", "e")}

    def names(*overrides):
        """(the scores' fingerprint, judge -> key of its judgement of a pair)"""
        config = load_config("tiny", [f"image.types={types}", *ADAPTER, *overrides])
        recipe, settings = recipe_of(module.score, config, **inputs), module.judge_settings(config)
        context = JudgeContext(settings, None, inputs["player"], inputs["first"], inputs["clip"], (), None)
        judges, pair = load_judges(config.image), Pair("Which colour?", SHA, "cd" * 32)
        return recipe.fingerprint, {name: judges[name].identity(context).key(pair) for name in types}

    fingerprint, keys = names("model.dtype=bfloat16")
    for differs, judges, override in (
        (dtype, {"self", "attention", "teacher"}, ["model.dtype=float32"]),
        (four_bits, {"attention"}, ["model.dtype=bfloat16", "model.load_in_4bit=true"]),
    ):
        other, others = names(*override)
        assert (other != fingerprint) == differs
        assert {name for name in types if others[name] != keys[name]} == judges & set(types)
    assert (fingerprint, keys) == names("model.dtype=bfloat16", "model.revision=main")


def test_a_resumed_run_scores_only_what_is_missing(made):
    store, dataset, rollouts = made
    asked = []

    def dying(run, jobs):
        for job in jobs:
            if "00002" in job.part:
                raise KeyboardInterrupt
            yield run(job)

    def counting(run, jobs):
        asked.extend(job.part for job in jobs)
        return map(run, jobs)

    with pytest.raises(KeyboardInterrupt):
        score(config(), dataset, rollouts, store, map=dying)
    artifact, cached = score(config(), dataset, rollouts, store, map=counting)
    assert not cached and set(asked) == {"trajectories-00002.parquet"}
    np.testing.assert_array_equal(artifact.values()["answer"], ANSWERS)
    assert artifact.metrics["reward/answer"] == 1 / 3


def test_a_mapper_gets_whole_jobs_that_run_anywhere(made):
    store, dataset, rollouts = made
    seen = []

    def elsewhere(run, jobs):
        """As a task runner on another machine: jobs and scores travel, in another order, to a thread of their own."""
        found = {}

        def work(job):
            found[job.part] = pickle.dumps(run(pickle.loads(pickle.dumps(job))))

        for job in reversed(jobs):
            thread = threading.Thread(target=work, args=(job,))
            thread.start()
            thread.join()
        seen.extend(job.part for job in jobs)
        return [pickle.loads(found[job.part]) for job in jobs]

    artifact, _ = score(config(), dataset, rollouts, store, map=elsewhere)
    assert seen == [f"trajectories-{number:05}.parquet" for number in range(3)]
    assert artifact.digest == score(config(), dataset, rollouts, store, force=True)[0].digest


def test_rollouts_without_a_processed_image_need_no_judge_and_an_empty_part_no_row(tmp_path):
    """No CLIP is loaded: there is none here by that name."""
    store = Store(tmp_path / "store")
    dataset = make_dataset(store)
    settings = load_config(
        "tiny", ["image.types=[embedding]", "image.embedding={model: nobodys-clip, pretrained: null}"]
    )
    artifact, _ = score(settings, dataset, make_rollouts(store, dataset, [group(0), []]), store)
    column = [row["embedding"] for row in artifact.table("scores").to_pylist()]
    assert [(one["value"], one["status"]) for one in column] == [(0.0, "zero")] * 3 + [(None, "missing")]
    assert column[0]["reason"] == "No image was processed."
    assert (
        artifact.table("judgements").num_rows == 0 and artifact.files["judgements-embedding-00000.parquet"]["rows"] == 0
    )
    assert artifact.metrics["reward/embedding"] == 0.0 and artifact.metrics["missing/embedding"] == 1


def test_no_part_is_kept_in_memory(made):
    store, dataset, rollouts = made
    alive = []

    def count():
        gc.collect()
        return sum(isinstance(one, Batch | Trajectory) for one in gc.get_objects())

    def one_by_one(run, jobs):
        for job in jobs:
            yield run(job)
            alive.append(count())

    before = count()  # the tests' own
    score(config(), dataset, rollouts, store, map=one_by_one)
    assert alive == [before] * 3


def test_empty_rollouts_give_empty_scores(made):
    store, dataset, _ = made
    artifact, _ = score(config(), dataset, make_rollouts(store, dataset, [[], []]), store)
    values, (ids, groups) = artifact.values(), artifact.identities()
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


def test_a_clip_that_is_not_there_is_trained_first_and_a_dry_run_names_what_is_missing(stages, monkeypatch):
    monkeypatch.setattr(train_clip, "STEPS", 2)
    overrides = ["image.types=[embedding]", "image.embedding={model: warmstart, pretrained: null}"]
    config, store = load_config("tiny", [*SETTINGS, *overrides]), stages.store
    dataset, rollouts = stages.made["prepare"], stages.made["rollout"]

    def shown():
        plan = Plan(config)
        plan.require(module.score, rollouts=rollouts)
        return [line.split() for line in preview(plan, store)]

    (puzzles, pairs, clip, scores), before = shown(), sorted(store.root.rglob("*"))
    assert puzzles == ["puzzles", "Cached", f"dataset/{dataset.short}"]
    assert pairs[:2] == ["known_pairs", "missing"] and pairs[2].startswith("pairs/")
    assert clip == ["train_clip", "waits", "for", "known_pairs"] and scores == ["score", "waits", "for", "train_clip"]
    assert sorted(store.root.rglob("*")) == before
    with Resources(config.where) as resources:
        artifact = Builder(config, store, resources).make(module.score, rollouts=rollouts)
    made = {"pairs": store.origin(store.origin(artifact, "clip"), "pairs"), "clip": store.origin(artifact, "clip")}
    assert [line[1:] for line in shown()] == [
        ["Cached", f"{one.kind}/{one.short}"] for one in (dataset, made["pairs"], made["clip"], artifact)
    ]
    assert f"pairs/{made['pairs'].short}" == pairs[2]
    judged = artifact.table("judgements").to_pylist()
    assert judged and {row["weights"] for row in judged} == {made["clip"].digest}
    assert np.isfinite(artifact.values()["embedding"]).any()
