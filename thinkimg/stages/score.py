"""Score stored rollouts: one raw column per reward component.

For each chunk of parts the judges look at the processed images first, side by side; their judgements are the ledgers
(judgements-<judge>-*). Then each part is scored by components that are pure functions of its rows and ledgers.

While the rollouts are still being played, its early part has the judges look at what is closed of them, all but those
that measure by the trainer, and scores it by the rules.
"""

import heapq
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from thinkimg.config.tree import Config
from thinkimg.errors import UserError
from thinkimg.images.toolbox import user_sources
from thinkimg.models.base import BaseSource
from thinkimg.models.clip import weights_digest
from thinkimg.rewards import judging, sentences
from thinkimg.rewards.context import JudgeContext, JudgeSettings
from thinkimg.rewards.judge import Judge, load_judges
from thinkimg.rewards.judgement import Judgements, Pair
from thinkimg.rewards.judges.teacher import FROZEN, check_teacher
from thinkimg.rewards.part import PartJob, Scoring, build_table, compute_columns, score_part
from thinkimg.rewards.registry import load_components
from thinkimg.rewards.settings import RewardsConfig
from thinkimg.stages.stage import Early, Input, Job, Lineage, Progress, Slice, Stage
from thinkimg.stages.train_clip import train_clip
from thinkimg.store.artifacts import Store, Work
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Clip, Dataset, Policy, Rollouts, Scores
from thinkimg.store.manifest import Artifact, Reference

log = logging.getLogger(__name__)

LONGEST = 16  # questions in characters, among which is the longest in tokens, or nearly so
CHUNK_ROWS = 4096  # trajectories whose images are judged together, at least


class ScoreSettings(Slice):
    """Slice of `score`."""

    rewards: RewardsConfig
    components: tuple[str, ...]
    judges: JudgeSettings | None
    """None without judges of images."""
    prompts: dict[str, str]
    """Judge -> hash of its question."""
    own_clip: bool = Field(exclude=True)

    @property
    def scoring(self) -> Scoring:
        """Components and their settings."""
        return Scoring(self.rewards, self.judges and self.judges.image, self.components)

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the judges."""
        return self.judges.image.columns if self.judges else ()

    def fingerprinted(self) -> dict[str, Any]:
        tree: dict[str, Any] = {"rewards": self.rewards.model_dump(mode="json"), "components": list(self.components)}
        if self.judges:
            tree |= {"image": self.judges.image.fingerprinted(), "prompts": self.prompts}
        return tree

    def outside(self) -> dict[str, Reference]:
        """Return the reference of a CLIP's weights that are no artifact."""
        if "embedding" not in self.types or self.own_clip:
            return {}
        return {"clip": Reference("clip", weights_digest(self.judges.image.embedding, None))}


def judge_settings(config: Config) -> JudgeSettings:
    """Return the part of the slice that judgements depend on."""
    return JudgeSettings(
        image=config.image.completed(config.family()),
        view=config.view(),
        model=config.model,
        token_budget=config.train.token_budget,
        base=BaseSource.of(config.model),
    )


def settings_of(config: Config) -> ScoreSettings:
    """Return the slice of the config. Raises UserError for a user's function that can't be used."""
    judges, asked = judge_settings(config), load_judges(config.image)
    return ScoreSettings(
        rewards=config.rewards,
        components=tuple(load_components(config.rewards, config.image)),
        judges=judges if config.image.types else None,
        prompts={name: asked[name].prompt(judges) for name in config.image.columns},
        own_clip=config.has_own_clip,
        family=config.family().name,
    )


def run(job: Job[ScoreSettings]) -> None:
    """Score chunk after chunk, with one part in memory, and close a part of the same number for each of the rollouts.

    Progress counts trajectories. Raises UserError for rollouts of another data set.
    """
    settings, work, rollouts = job.settings, job.work, job.inputs["rollouts"]
    dataset = job.inputs["dataset"]
    origin = rollouts.inputs["dataset"]
    if origin.digest != dataset.digest:
        raise UserError(
            f"{rollouts.reference} was not made from {dataset.reference}.", hint=f"Its data set is {origin}."
        )
    parts = list(rollouts.parts())
    tally = Tally(job.progress, sum(rollouts.files[part]["rows"] for part in parts))
    early = Ahead(job.early)

    def ledgers_of(judge: str) -> list[Path]:
        return early.ledgers(judge) + list_tables(work, f"judgements-{judge}")

    lookup = judging.make_lookup(job.store, rollouts.digest, ledgers_of) if settings.judges else None
    judges = load_judges(settings.judges.image) if settings.judges else ()
    sentence_judge = early.extend(make_sentence_judge(job))
    for number, chunk in enumerate(group_parts(rollouts, parts)):
        verdicts = name_ledger(number)
        if is_unreached(work, number) or (work.has(verdicts) and not sentences.is_complete(work.path(verdicts))):
            for part in chunk:
                work.discard(name_scores(part))
        missing = {part: rollouts.files[part]["rows"] for part in chunk if not work.has(name_scores(part))}
        tally.score(sum(rollouts.files[part]["rows"] for part in chunk if part not in missing))
        if settings.judges and missing:
            tally.begin(sum(missing.values()))
            fill_ledgers(job, make_context(job, rollouts, tally.expect, tally.judge), number, chunk, lookup)
        if sentence_judge and missing:
            sentences.fill_ledger(work, verdicts, collect_answers(job, rollouts, chunk), sentence_judge)
        ledgers = tuple(work.path(name) for name in (name_ledger(number, judge) for judge in judges) if work.has(name))
        judged = (work.path(verdicts),) if work.has(verdicts) else ()
        places = dataset.directory, rollouts.directory, ledgers, judged
        jobs = [PartJob(part, settings.scoring, *places, early.rules(rollouts, part)) for part in missing]
        for part, columns in zip(missing, job.map(score_part, jobs), strict=True):
            work.table(name_scores(part), build_table(rollouts.checked(part), columns))
            tally.score(missing[part])
    job.resources.release_encoder()
    ledgers = [name for name in (name_ledger(i, "teacher") for i in range(len(parts))) if work.has(name)]
    if unreached := [reason for name in ledgers for reason in list_unreachable(work.path(name))]:
        log.warning(
            "%d images were not judged by the teacher, as image.teacher.fallback allows; --force asks it again. "
            "The first: %s", len(unreached), unreached[0],
        )  # fmt: skip
    work.metrics |= summarise_scores([work.path(name_scores(part)) for part in parts], list(settings.components))


class Ahead:
    """Tables that the early part of a scoring has closed."""

    def __init__(self, work: Work | None):
        """work: of the early part; None where there was none."""
        self._work = work

    def ledgers(self, component: str) -> list[Path]:
        """Return the ledgers of a judge."""
        return list_tables(self._work, f"judgements-{component}") if self._work else []

    def rules(self, rollouts: Artifact, part: str) -> Path | None:
        """Return the scores of a part by the rules, None without."""
        name = name_early(rollouts, part, "scores")
        return self._work.path(name) if self._work and self._work.has(name) else None

    def extend(self, judge: sentences.SentenceJudge | None) -> sentences.SentenceJudge | None:
        """Return the judge of answers, which looks here first."""
        if judge is None or self._work is None:
            return judge
        verdicts = [v for path in list_tables(self._work, sentences.TABLE) for v in sentences.read_ledger(path).items()]
        earlier = {answer.key(judge.model): verdict for answer, verdict in verdicts if verdict.value is not None}
        return replace(judge, lookup=lambda keys: judge.lookup(keys) | {k: earlier[k] for k in keys if k in earlier})


def score_early(job: Job[ScoreSettings], snapshots: Iterable[Artifact]) -> frozenset[str]:
    """Judge and score each part of the rollouts as it is closed, as far as that needs neither trainer nor others.

    What is left out here, `run` makes up for: judgements that were refused, and rules that wait for a verdict. Returns
    the names of the resources of judges who have to be asked again.
    """
    judges = load_judges(job.settings.judges.image) if job.settings.judges else {}
    names = [name for name, judge in judges.items() if name in job.settings.types and "trainer" not in judge.uses]
    rules = tuple(name for name in job.settings.components if name not in judges)
    judge, lookup = make_sentence_judge(job), judging.make_lookup(job.store, rollouts="")
    for rollouts in snapshots:
        if names and not rollouts.files:  # they have only begun
            start_judges(job, rollouts, [judges[name] for name in names])
        for part in rollouts.parts() if rollouts.has_table("trajectories") else ():
            job.progress(0, 0)
            judge_early(job, rollouts, part, names, lookup)
            apply_rules_early(job, rollouts, part, rules, judge)
    again = [name for name in names if any(map(judging.has_refusals, list_tables(job.work, f"judgements-{name}")))]
    return frozenset[str]().union(*(judges[name].uses for name in again))


def start_judges(job: Job[ScoreSettings], rollouts: Rollouts, judges: Iterable[Judge]) -> None:
    """Have judges start what takes long to start, for the longest questions of the data set."""
    context = make_context(job, rollouts)
    batches = job.inputs["dataset"].batches("samples", ["question"])
    questions = (question for batch in batches for question in batch.column(0).to_pylist())
    longest = set(heapq.nlargest(LONGEST, questions, key=len))
    for judge in judges:
        judge.start(context, longest)


def judge_early(
    job: Job[ScoreSettings], rollouts: Rollouts, part: str, names: Iterable[str], lookup: judging.Lookup
) -> None:
    """Have some judges look at a closed part, unless they have."""
    ledgers = {name: name_early(rollouts, part, f"judgements-{name}") for name in names}

    def close(name: str, judgements: Judgements) -> None:
        job.work.table(ledgers[name], judging.build_ledger(judgements))

    if missing := [name for name, ledger in ledgers.items() if not job.work.has(ledger)]:
        rows = list(rollouts.trajectories(part))
        pairs = judging.collect_pairs(rows, job.inputs["dataset"].samples_of(rows), rollouts.tools)
        context = make_context(job, rollouts, judged=lambda count: job.progress(0, 0))
        judging.run_judges(missing, pairs, context, lookup, close, strict=False)


def apply_rules_early(
    job: Job[ScoreSettings],
    rollouts: Rollouts,
    part: str,
    rules: tuple[str, ...],
    judge: sentences.SentenceJudge | None,
) -> None:
    """Score a closed part by some rules, once, unless a verdict on one of its answers is missing."""
    verdicts, table = (name_early(rollouts, part, name) for name in (sentences.TABLE, "scores"))
    if job.work.has(table) or job.work.has(verdicts):  # answers without a verdict are asked again by `run`
        return
    if judge is not None:
        sentences.fill_ledger(job.work, verdicts, collect_answers(job, rollouts, [part]), judge)
    ledgers = [job.work.path(verdicts)] if job.work.has(verdicts) else []
    if all(map(sentences.is_complete, ledgers)):
        scoring = replace(job.settings.scoring, components=rules)
        columns = compute_columns(part, scoring, job.inputs["dataset"], rollouts, verdicts=ledgers)
        job.work.table(table, build_table(rollouts.checked(part), columns))


def list_tables(work: Work, table: str) -> list[Path]:
    """Return the closed tables of one kind."""
    return [work.path(name) for name in work.closed if name.rpartition("-")[0] == table]


def name_early(rollouts: Artifact, part: str, table: str) -> str:
    """Return the name of an early table on a part as it is now: one that is played again has another."""
    return f"{table}-{rollouts.files[part]['sha256'][:16]}.parquet"


def make_sentence_judge(job: Job[ScoreSettings]) -> sentences.SentenceJudge | None:
    """Return the judge of answers that are compared with sentences; None where none is configured."""
    return sentences.make_judge(job.settings.rewards.answer.judge, job.resources.where.teacher, job.store)


def make_context(
    job: Job[ScoreSettings],
    rollouts: Artifact,
    expect: Callable[[int], None] = lambda count: None,
    judged: Callable[[int], None] = lambda count: None,
) -> JudgeContext:
    """Return the judges' context; expect, judged: as it has them."""
    assert job.settings.judges is not None
    tables = [job.inputs["dataset"], *([rollouts] if rollouts.files else [])]
    policies = (job.inputs.get(role) for role in ("player", "first", "clip"))
    return JudgeContext(job.settings.judges, job.resources, *policies, tables, ImageTable(tables), expect, judged)


class Tally:
    """Progress of a scoring in trajectories; while a chunk is judged, its share grows with the judgements made."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._lock = progress, total, threading.Lock()
        self._scored = self._shown = self._chunk = self._expected = self._judged = 0

    def begin(self, chunk: int) -> None:
        """Start a chunk of so many trajectories."""
        self._chunk, self._expected, self._judged = chunk, 0, 0

    def expect(self, judgements: int) -> None:
        """Add judgements that are about to be made."""
        with self._lock:
            self._expected += judgements

    def judge(self, judgements: int) -> None:
        """Count judgements that were made."""
        with self._lock:
            self._judged += judgements
            self._show(self._scored + self._chunk * self._judged // max(1, self._expected))

    def score(self, trajectories: int) -> None:
        """Count trajectories that have their scores."""
        with self._lock:
            self._scored += trajectories
            self._show(self._scored)

    def _show(self, done: int) -> None:
        self._shown = max(self._shown, done)  # a judge that takes over for another one adds judgements
        self._progress(self._shown, self._total)


def group_parts(rollouts: Artifact, parts: list[str]) -> Iterator[list[str]]:
    """Yield the parts that are judged together: judges work in batches, and may have to take turns in the memory."""
    chunk: list[str] = []
    for part in parts:
        chunk.append(part)
        if sum(rollouts.files[name]["rows"] for name in chunk) >= CHUNK_ROWS or part == parts[-1]:
            yield chunk
            chunk = []


def fill_ledgers(
    job: Job[ScoreSettings], context: JudgeContext, number: int, chunk: list[str], lookup: judging.Lookup
) -> None:
    """Close a chunk's ledgers, one per judge, unless an earlier run closed them and reached the judge."""
    pairs: set[Pair] = set()
    for part in chunk:
        rows = list(job.inputs["rollouts"].trajectories(part))
        samples = job.inputs["dataset"].samples_of(rows)
        pairs |= judging.collect_pairs(rows, samples, job.inputs["rollouts"].tools)
    judge_pairs(job.work, context, number, pairs, lookup)


def collect_answers(job: Job[ScoreSettings], rollouts: Rollouts, chunk: list[str]) -> set[sentences.GivenAnswer]:
    """Return the answers of a chunk that a model has to compare with sentences."""
    answers: set[sentences.GivenAnswer] = set()
    for part in chunk:
        rows = list(rollouts.trajectories(part))
        answers |= sentences.collect_answers(rows, job.inputs["dataset"].samples_of(rows))
    return answers


def is_unreached(work: Work, number: int) -> bool:
    """Tell whether an earlier run closed a chunk's ledger while the teacher could not be reached."""
    name = name_ledger(number, "teacher")
    return work.has(name) and bool(list_unreachable(work.path(name)))


def judge_pairs(work: Work, context: JudgeContext, number: int, pairs: set[Pair], lookup: judging.Lookup) -> None:
    """Have all judges look at a chunk's pairs, and `self` too where it takes over for an unreachable teacher."""

    def close(name: str, judgements: Judgements) -> None:
        work.discard(name_ledger(number, name))  # of a run that did not reach the judge; `lookup` has what it got
        work.table(name_ledger(number, name), judging.build_ledger(judgements))

    def ask(names: Iterable[str]) -> None:
        missing = [name for name in names if not work.has(name_ledger(number, name)) or name in again]
        if missing:
            judging.run_judges(missing, pairs, context, lookup, close)

    image = context.settings.image
    again = ["teacher"] if is_unreached(work, number) else []
    if again and "self" not in image.columns:
        work.discard(name_ledger(number, "self"))  # it stood in for it
    ask(image.columns)
    falls_back = "teacher" in image.types and image.teacher.fallback == "self"
    if falls_back and list_unreachable(work.path(name_ledger(number, "teacher"))):
        ask(["self"])  # about all pairs: whole groups fall back


def list_unreachable(ledger: Path) -> list[str]:
    """Return the reasons for which a judge was not reached, of each such judgement in its ledger."""
    return [judgement.reason or "?" for judgement in judging.read_ledger(ledger).values() if judgement.unreachable]


def name_ledger(number: int, component: str | None = None) -> str:
    """Return the name of a chunk's ledger: of a judge of images, or of the verdicts on answers."""
    table = sentences.TABLE if component is None else f"judgements-{component}"
    return f"{table}-{number:05}.parquet"


def name_scores(part: str) -> str:
    """Return the name of the scores of a part of the rollouts."""
    return part.replace("trajectories", "scores", 1)


def summarise_scores(parts: list[Path], names: list[str]) -> dict[str, float | None]:
    """Return metrics of scored parts.

    reward/<component>: mean of the present values, None without one. missing/<component>: number of missing values.
    reward/teacher_fallback: share of trajectories that fell back from the teacher.
    """
    metrics: dict[str, float | None] = {}
    for name in names:
        total, present, missing, fallen = 0.0, 0, 0, 0
        for path in parts:
            column = pq.ParquetFile(path).read([name]).column(name)
            values = np.array(pc.struct_field(column, "value").to_pylist(), dtype=np.float64)  # None becomes NaN
            finite = values[~np.isnan(values)]
            total, present, missing = total + finite.sum(), present + len(finite), missing + len(values) - len(finite)
            if name == "teacher":
                evidence = pc.struct_field(column, "evidence")
                fallen += pc.sum(pc.match_substring(evidence, '"fallback":')).as_py() or 0
        metrics[f"reward/{name}"] = float(total / present) if present else None
        metrics[f"missing/{name}"] = missing
        if name == "teacher":
            metrics["reward/teacher_fallback"] = fallen / max(1, present + missing)
    return metrics


def asks_policy(config: Config) -> bool:
    """Tell whether a judge needs the policy that made the rollouts."""
    return bool(set(config.image.types) - {"embedding"})


def check(config: Config) -> None:
    """Raise UserError where a judge's endpoint or its key is missing."""
    check_teacher(config.image, config.where.teacher)
    sentences.check_judge(config.rewards.answer.judge, config.where.teacher)


def warn(settings: ScoreSettings, inputs: Mapping[str, Artifact], store: Store) -> str:
    """Return a sentence on samples whose answers nobody compares; "" where there are none."""
    return sentences.explain_unjudged_of(inputs["dataset"], settings.rewards.answer.judge)


def uses(config: Config) -> frozenset[str]:
    """Return the resources that the judges occupy: the engine for `self`, the trainer for `attention`."""
    return frozenset[str]().union(*(judge.uses for judge in load_judges(config.image).values()))


score = Stage(
    name="score",
    version=8,
    makes=Scores,
    settings=settings_of,
    run=run,
    reads={
        "rollouts": Input(Rollouts),
        "dataset": Input(Dataset, origin=Lineage("rollouts", "dataset")),
        "player": Input(Policy, origin=Lineage("rollouts", "policy"), counts=asks_policy, implied=True),
        "clip": Input(Clip, origin=train_clip, counts=lambda config: config.has_own_clip),
        "first": Input(
            Policy,
            origin=Lineage("player", "policy", first=True),
            counts=lambda config: "teacher" in config.image.types and config.image.teacher.model == FROZEN,
        ),
    },
    packages=lambda settings: (
        ("rapidfuzz", "math-verify", "latex2sympy2_extended", "sympy")
        + (("torch", "open-clip-torch", "transformers") if settings.judges else ())
    ),
    outside=ScoreSettings.outside,
    # A tool states which region its image shows.
    loads=lambda settings, inputs: user_sources(inputs["rollouts"].tools) if settings.judges else {},
    check=check,
    warn=warn,
    uses=lambda config: uses(config) & {"trainer"},
    player="player",
    early=Early("rollouts", score_early, lambda config: uses(config) - {"trainer"}),
)
