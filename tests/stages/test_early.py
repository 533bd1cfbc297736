"""Early part of a stage: it follows an input in the making, survives a kill, keeps nobody waiting, changes nothing."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from early_world import ENDS_S, Growing, config, grow, make_dataset, make_rollouts, parts_of
from hypothesis import given
from hypothesis import strategies as st
from single_stage import build_stage

from thinkimg.config.load import load_config
from thinkimg.errors import UserError
from thinkimg.resources import Resources
from thinkimg.rewards import judging
from thinkimg.rewards.judgement import JudgeIdentity, Judgement
from thinkimg.rewards.judgement import Pair as ImagePair
from thinkimg.scheduler import Builder
from thinkimg.stages import build, score
from thinkimg.stages.build import EARLY, build_early, complete_inputs, follow
from thinkimg.stages.stage import Early, Input, Job, Slice, Stage
from thinkimg.store.artifacts import Store, Work
from thinkimg.store.kinds import Dataset
from thinkimg.store.manifest import Artifact, Recipe


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(build, "POLL_S", 0.005)


# follow ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.booleans())
def test_each_snapshot_holds_what_is_closed_and_the_last_is_the_artifact(tmp_path_factory, steps, pauses):
    """However many parts are closed between two looks."""
    store = Store(tmp_path_factory.mktemp("store"))
    making = Growing(store)
    seen: list[list[str]] = []

    def produce(work) -> None:
        for count in steps:
            for _ in range(count):
                number = len(work.closed)
                work.table(f"rows-{number:05}.parquet", pa.table({"n": [number]}))
            if pauses:
                making.wait_for(lambda: seen and len(seen[-1]) == len(work.closed))

    with making.run(produce):
        for snapshot in follow(making, lambda: None):
            if not snapshot.files:
                assert not seen, "it has only begun"
                continue
            values = snapshot.table("rows").column("n").to_pylist()
            assert values == list(range(len(values))) and len(snapshot.files) == len(values)
            seen.append(sorted(snapshot.files))
    assert snapshot.digest == making.result().digest and len(seen[-1]) == sum(steps)
    assert [len(names) for names in seen[:-1]] == sorted({len(names) for names in seen[:-1]}), "only when there is more"
    if pauses:
        assert len(seen) > len(steps)


def test_who_follows_what_has_only_begun_keeps_nobody_waiting(tmp_path):
    """A judge may start its server meanwhile, for minutes: a killed run's parts are discarded, and all is published."""
    making = Growing(Store(tmp_path))

    def produce(work) -> None:
        work.table("rows-00000.parquet", pa.table({"n": [1]}))
        work.discard("rows-00000.parquet")
        work.table("rows-00000.parquet", pa.table({"n": [2]}))

    with making.run(produce):
        snapshots = follow(making, lambda: None)
        next(snapshots)
        making.wait_for(lambda: making.done)
        assert making.succeeded
        assert [snapshot.table("rows").column("n").to_pylist() for snapshot in snapshots] == [[2]]


def test_a_snapshot_keeps_its_place_until_the_next_is_asked_for(tmp_path):
    making, read = Growing(Store(tmp_path)), threading.Event()

    def produce(work) -> None:
        work.table("rows-00000.parquet", pa.table({"n": [1]}))
        assert read.wait(ENDS_S)

    with making.run(produce):
        snapshots = follow(making, lambda: None)
        snapshot = next(snapshot for snapshot in snapshots if snapshot.files)
        read.set()  # it is about to be published
        time.sleep(0.05)
        assert not making.done and snapshot.table("rows").num_rows == 1
        assert next(snapshots).directory.name == "0001"


@pytest.mark.parametrize("closed", [0, 1])
def test_of_what_fails_there_is_no_last_snapshot(tmp_path, closed):
    making = Growing(Store(tmp_path))

    def produce(work) -> None:
        for number in range(closed):
            work.table(f"rows-{number:05}.parquet", pa.table({"n": [1]}))
            making.wait_for(lambda: snapshots)
        raise UserError("in vain")

    snapshots: list = []
    with pytest.raises(UserError, match="in vain"), making.run(produce):
        for snapshot in follow(making, lambda: None):
            snapshots += [snapshot] if snapshot.files else []
    assert len(snapshots) == closed


def test_it_is_there_when_it_has_begun(tmp_path):
    """With its recipe, before anything of it is closed: whoever follows it prepares meanwhile."""
    making, followed = Growing(Store(tmp_path)), threading.Event()

    def produce(work) -> None:
        assert followed.wait(ENDS_S)
        work.table("rows-00000.parquet", pa.table({"n": [1]}))

    with making.run(produce):
        snapshots = follow(making, lambda: None)
        first = next(snapshots)
        assert not first.files and first.fingerprint and not build.is_complete(first)
        followed.set()
        assert [bool(snapshot.files) for snapshot in snapshots][-1]


# build ----------------------------------------------------------------------------------------------------------------


class Pair:
    """A stage that closes two parts, and one with an early part that reads them; the test says what each does."""

    def __init__(self, root, early: Callable, maker: Callable = lambda work: None):
        self.store, self.seen, self.first = Store(root), [], threading.Event()
        self.maker, self.early = maker, early

    def make(self, job: Job) -> None:
        for number in range(2):
            job.work.table(f"samples-{number:05}.parquet", pa.table({"n": [number]}))
            assert self.first.wait(ENDS_S), "the early part did not begin"
        self.maker(job.work)

    def begin(self, job: Job, snapshots) -> None:
        for snapshot in snapshots:
            if snapshot.files:
                self.first.set()
            for name in snapshot.files:
                if not job.work.has(name):
                    self.early(job, snapshot)
                    job.work.table(name, snapshot.table("samples"))
                    self.seen.append(name)

    def finish(self, job: Job) -> None:
        job.work.json("early.json", sorted(job.early.closed))

    def build(self):
        def stage(name, run, **options) -> Stage:
            return Stage(name=name, version=1, makes=Dataset, settings=lambda config: Slice(), run=run, **options)

        maker = stage("maker", self.make)
        early = Early("rows", self.begin, lambda config: frozenset())
        reader = stage("reader", self.finish, reads={"rows": Input(Dataset, origin=maker)}, early=early)
        with Resources(load_config("tiny").where) as resources:
            builder = Builder(load_config("tiny"), self.store, resources)
            return builder.make(reader)


def test_the_early_part_reads_while_the_rest_is_made_and_its_work_goes_with_the_end(tmp_path):
    pair = Pair(tmp_path, lambda job, snapshot: None)
    made = pair.build()
    assert made.json("early.json") == pair.seen == ["samples-00000.parquet", "samples-00001.parquet"]
    assert not list((tmp_path / EARLY).glob("*/[!.]*")), "but for the lock"
    pair.seen.clear()
    assert pair.build().reference == made.reference and pair.seen == [], "cached: nothing is read"


def test_what_it_closed_before_it_was_ended_is_not_made_again(tmp_path):
    def fail(job, snapshot) -> None:
        if job.work.closed:
            raise UserError("killed")

    pair = Pair(tmp_path, fail)
    with pytest.raises(UserError, match="killed"):  # and nobody waits for it for ever
        pair.build()
    assert pair.seen == ["samples-00000.parquet"]
    again = Pair(tmp_path, lambda job, snapshot: None)
    assert again.build().json("early.json") == ["samples-00000.parquet", "samples-00001.parquet"]
    assert again.seen == ["samples-00001.parquet"]


def test_the_failure_of_what_it_follows_is_the_one_that_is_raised(tmp_path):
    def fail(work) -> None:
        raise UserError("the maker's")

    with pytest.raises(UserError, match="the maker's"):
        Pair(tmp_path, lambda job, snapshot: None, fail).build()


# scores ---------------------------------------------------------------------------------------------------------------


class Scoring:
    """Rollouts that grow in one store as they are in another, where they are scored without an early part."""

    def __init__(self, root):
        self.store, other = Store(root / "store"), Store(root / "other")
        dataset = make_dataset(self.store)
        self.source = make_rollouts(other, make_dataset(other))
        self.plain, _ = build_stage(score.score, config(), other, rollouts=self.source)
        self.making = Growing(self.store, replace(source_recipe(self.source), inputs={"dataset": dataset.reference}))
        self.inputs = {"dataset": dataset}

    def follow(self, produce: Callable[[Work], None]) -> None:
        """Run the early part while the rollouts grow."""
        stage = score.score
        with Resources(config().where) as resources, self.making.run(produce):
            build_early(
                stage, stage.settings(config()), self.inputs, follow(self.making, lambda: None), self.store, resources,
                complete=lambda given: complete_inputs(stage, config(), given, self.store), check=lambda: None,
            )  # fmt: skip

    def finish(self) -> Artifact:
        """Return the scores, which must all have been made early."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("thinkimg.rewards.part.compute_columns", unreachable)
            artifact, cached = build_stage(score.score, config(), self.store, rollouts=self.making.result())
        assert not cached
        return artifact


@pytest.mark.parametrize("interrupted", [False, True])
def test_scores_made_early_are_those_made_at_the_end(tmp_path, interrupted, monkeypatch):
    """Byte by byte; the rules are applied to each part once, be it interrupted or not."""
    it, scored, compute_columns = Scoring(tmp_path), [], score.compute_columns
    parts = parts_of(it.source)

    def apply(part, *arguments, **options):
        scored.append(part)
        if interrupted and len(scored) == 2:
            raise UserError("killed")
        return compute_columns(part, *arguments, **options)

    def produce(work: Work) -> None:
        grow(it.making, work, it.source, lambda count: len(scored) >= count)

    monkeypatch.setattr(score, "compute_columns", apply)
    if interrupted:
        with pytest.raises(UserError, match="killed"):
            it.follow(produce)
    it.follow(produce)
    assert it.finish().digest == it.plain.digest
    assert sorted(scored) == sorted(parts + parts[1:2] * interrupted)


def test_a_part_that_is_played_again_is_scored_again(tmp_path, monkeypatch):
    it, scored, compute_columns = Scoring(tmp_path), [], score.compute_columns
    first, second, *_ = parts_of(it.source)

    def apply(part, *arguments, **options):
        scored.append(part)
        return compute_columns(part, *arguments, **options)

    def produce(work: Work) -> None:
        work.table(
            first.replace("trajectories", "images"),
            pq.read_table(it.source.path(first.replace("trajectories", "images"))),
        )
        work.table(first, pq.read_table(it.source.path(second)))
        it.making.wait_for(lambda: scored)
        work.discard(first)  # while it is being read
        grow(it.making, work, it.source, lambda count: True)

    monkeypatch.setattr(score, "compute_columns", apply)
    it.follow(produce)
    assert it.finish().digest == it.plain.digest and scored.count(first) == 2


def test_a_judge_starts_before_there_is_anything_to_judge(tmp_path, monkeypatch):
    """It is told the longest questions; once, and never where the rollouts are complete."""
    it, started = Scoring(tmp_path), []

    class Own:
        uses = frozenset()

        def start(self, context, questions):
            started.append(questions)
            assert len(context.images) == 0 and context.tables == [it.inputs["dataset"]]

    def produce(work: Work) -> None:
        it.making.wait_for(lambda: started)
        assert started, "it waits for the first part"
        grow(it.making, work, it.source, lambda count: True)

    monkeypatch.setattr(score, "load_judges", lambda image: {"own": Own()})
    monkeypatch.setattr(score, "judge_early", lambda job, rollouts, part, names, lookup: None)
    monkeypatch.setattr(score, "apply_rules_early", lambda *arguments: None)
    settings = SimpleNamespace(judges=SimpleNamespace(image=None), types=("own",), components=())
    with it.store.create("early", Recipe("score early", 1, 1, {})) as work:
        resources = SimpleNamespace(where=config().where)
        job = Job(settings, it.inputs, work, it.store, resources, lambda done, total: None, map)
        monkeypatch.setattr(score, "make_sentence_judge", lambda job: None)
        with it.making.run(produce):
            score.score_early(job, follow(it.making, lambda: None))
        score.score_early(job, [it.making.result()])
    assert started == [{"Which colour?"}]


@pytest.mark.parametrize("value", [None, 0.5])
@pytest.mark.parametrize("asked", [True, False])
def test_a_judge_who_gave_no_value_needs_the_engine_again(tmp_path, monkeypatch, value, asked):
    """But not for an image that nobody was asked about, as it can't be read."""
    by = JudgeIdentity("own", "", "", "") if asked else None
    ledger = judging.build_ledger({("own", ImagePair("?", "original", "processed")): Judgement(value, None, {}, by=by)})
    it, judges = Scoring(tmp_path), {"own": SimpleNamespace(uses=frozenset({"engine"}))}

    def judge_early(job: Job, rollouts: Artifact, part: str, names, lookup) -> None:
        assert names == ["own"]
        job.work.table(score.name_early(rollouts, part, "judgements-own"), ledger)

    monkeypatch.setattr(score, "load_judges", lambda image: judges)
    monkeypatch.setattr(score, "judge_early", judge_early)
    monkeypatch.setattr(score, "apply_rules_early", lambda *arguments: None)
    monkeypatch.setattr(score, "make_sentence_judge", lambda job: None)
    with it.making.run(lambda work: grow(it.making, work, it.source, lambda count: True)):
        pass
    settings = SimpleNamespace(judges=SimpleNamespace(image=None), types=("own",), components=())
    with it.store.create("early", Recipe("score early", 1, 1, {})) as work:
        job = SimpleNamespace(settings=settings, work=work, store=it.store, progress=lambda done, total: None)
        expected = {"engine"} if asked and value is None else set()
        assert score.score_early(job, [it.making.result()]) == expected


def source_recipe(artifact: Artifact) -> Recipe:
    return Recipe(**{**artifact.manifest["recipe"], "inputs": artifact.inputs})


def unreachable(part, scoring, *_, **__):
    assert not scoring.components, "scored again"
    return {}
