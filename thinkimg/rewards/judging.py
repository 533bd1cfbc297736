"""Judging of the processed images in a part of the rollouts.

    trajectories ──► collect_pairs ──► run_judges ─┬─► reject_unfit: images in which nothing can be seen
                                                   └─► ask_judge ──► Lookup of stored scores, else Judge.judge
    judgements ──► build_ledger ──► judgements-<judge>-*.parquet ──► read_ledger

A pair that was judged before, by the same judge, is not judged again: its judgement is found in stored scores by its
key.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from thinkimg import records
from thinkimg.errors import UserError, check_share, is_passing
from thinkimg.images.decode import pixel_hash
from thinkimg.records import Sample, Trajectory
from thinkimg.rewards.context import JudgeContext
from thinkimg.rewards.judge import Judge, load_judges
from thinkimg.rewards.judgement import JudgeIdentity, Judgement, Judgements, Pair
from thinkimg.rewards.pairs import find_defect, pair_images
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Artifact

log = logging.getLogger(__name__)

FEW = 5  # refusals that may be the pairs' own fault, however few pairs there are

Lookup = Callable[[str, set[str]], dict[str, Judgement]]
"""Function of a component and keys: key -> judgement, for those that were made before."""
RECENT = 32  # score artifacts that are searched for earlier judgements, the newest first


def collect_pairs(rows: Iterable[Trajectory], samples: dict[str, Sample], tools: tuple[str, ...] | None) -> set[Pair]:
    """Return the pairs to be judged in some trajectories, each once. tools: `conversation.tools` of the rows."""
    return {pair for row in rows for pair in pair_images(row, samples[row.sample_id], tools) if isinstance(pair, Pair)}


def run_judges(
    names: Sequence[str],
    wanted: set[Pair],
    context: JudgeContext,
    lookup: Lookup,
    close: Callable[[str, Judgements], None],
    *,
    strict: bool = True,
) -> None:
    """Have judges look at pairs, side by side where the memory holds them all.

    close(component, judgements) is called when a judge has ended. Raises the first failure after all have ended, so
    that the judgements of the others are kept. strict: a judge that refused most pairs has failed.
    """
    pairs = sorted(wanted, key=sort_key)
    rejected = dict(zip(pairs, context.map(lambda pair: reject_unfit(pair, context), pairs), strict=True))
    fit = [pair for pair in pairs if rejected[pair] is None]
    context.expect(len(fit) * len(names))
    judges = load_judges(context.settings.image)

    def judge_all(name: str) -> Judgements:
        judged = dict(zip(fit, ask_judge(judges[name], fit, context, lookup), strict=True))
        if again := [pair for pair in fit if judged[pair].refused]:  # once more: what refused it may have passed
            judged |= zip(again, ask_judge(judges[name], again, context, lookup), strict=True)
        refused = [judged[pair].reason or "?" for pair in again if judged[pair].refused]
        if refused:
            log.warning("%s refused %d of %d judgements, the first: %s", name, len(refused), len(judged), refused[0])
        if strict and len(refused) >= FEW:
            check_share(refused, len(judged), f"judgements of {name}")
        return {(name, pair): rejected[pair] or judged[pair] for pair in pairs}

    threads = 1 if context.resources.where.takes_turns else len(names)
    failures: list[BaseException] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="judge") as pool:
        running = {pool.submit(judge_all, name): name for name in names}
        for future in as_completed(running):
            if error := future.exception():
                failures.append(error)
            else:
                close(running[future], future.result())
    if failures:
        raise failures[0]


def reject_unfit(pair: Pair, context: JudgeContext) -> Judgement | None:
    """Return the judgement of a pair whose image can't be read or shows nothing; None where a judge has to look."""
    try:
        for sha256 in (pair.original, pair.processed):
            image = context.images.decoded(sha256)
            if pixel_hash(image) != sha256:
                raise ValueError(f"the pixels stored as {sha256[:16]}… have another hash")
        reason = find_defect(image)
    except (KeyError, OSError, ValueError) as error:
        if is_passing(error):
            raise
        return Judgement(None, f"An image can't be read: {error}", {})
    return Judgement(0.0, reason, {}) if reason else None


def ask_judge(judge: Judge, pairs: Sequence[Pair], context: JudgeContext, lookup: Lookup) -> list[Judgement]:
    """Return a judge's judgements of pairs, in order; those that were made before are looked up."""
    if not pairs:
        return []
    identity = judge.identity(context)
    keys = {pair: identity.key(pair) for pair in pairs}
    stored = lookup(identity.judge, set(keys.values()))
    new = [pair for pair in pairs if keys[pair] not in stored]
    context.judged(len(pairs) - len(new))
    judged = dict(zip(new, judge.judge(new, context), strict=True)) if new else {}
    return [replace(judged[pair] if pair in judged else stored[keys[pair]], by=identity) for pair in pairs]


def build_ledger(judgements: Judgements) -> pa.Table:
    """Return the ledger: one row per judgement, in a fixed order."""
    rows = []
    for (component, pair), judgement in sorted(
        judgements.items(), key=lambda item: (item[0][0], *sort_key(item[0][1]))
    ):
        by = judgement.by or JudgeIdentity("", "", "", "")
        rows.append({
            "key": by.key(pair) if judgement.by else "", "component": component, **asdict(by),
            "question": pair.question, "original": pair.original, "processed": pair.processed,
            "value": judgement.value, "reason": judgement.reason,
            "evidence": json.dumps(judgement.evidence, sort_keys=True), "unreachable": judgement.unreachable,
        })  # fmt: skip
    return pa.Table.from_pylist(rows, records.judgement_schema())


def sort_key(pair: Pair) -> tuple[str, str, str]:
    """Return the key by which pairs are sorted."""
    return pair.question, pair.original, pair.processed


def read_ledger(path: Path) -> Judgements:
    """Return the judgements of a ledger."""
    return {
        (row["component"], Pair(row["question"], row["original"], row["processed"])): parse_judgement(row)
        for row in pq.read_table(path).to_pylist()
    }


def has_refusals(ledger: Path) -> bool:
    """Tell whether a judge was asked for a value and gave none."""
    return any(judgement.by and judgement.value is None for judgement in read_ledger(ledger).values())


def parse_judgement(row: dict[str, Any]) -> Judgement:
    """Return the judgement of a ledger's row."""
    by = JudgeIdentity(row["judge"], row["model"], row["weights"], row["prompt"]) if row["judge"] else None
    return Judgement(row["value"], row["reason"], json.loads(row["evidence"]), by, row["unreachable"])


def make_lookup(store: Store, rollouts: str, ledgers: Callable[[str], Iterable[Path]] = lambda component: ()) -> Lookup:
    """Return a lookup of judgements with a value in complete scores of the store.

    It searches all scores of the rollouts with this digest, and the newest RECENT of others. ledgers: function of a
    component to further ledgers.
    """

    def of_rollouts(artifact: Artifact) -> bool:
        return "rollouts" in artifact.inputs and artifact.inputs["rollouts"].digest == rollouts

    complete = [artifact for artifact in store.list("scores") if not artifact.dropped]
    newest = sorted(complete, key=lambda artifact: artifact.manifest["finished"], reverse=True)
    others = islice((artifact for artifact in newest if not of_rollouts(artifact)), RECENT)
    searched = [*filter(of_rollouts, newest), *others]

    def lookup(component: str, keys: set[str]) -> dict[str, Judgement]:
        wanted = pa.array(sorted(keys))
        judgements: dict[str, Judgement] = {}
        for path in chain(ledgers(component), (p for artifact in searched for p in find_ledgers(artifact, component))):
            rows = pq.read_table(path)
            hits = rows.filter(pc.and_(pc.is_in(rows["key"], wanted), pc.is_valid(rows["value"]))).to_pylist()
            judgements |= {row["key"]: parse_judgement(row) for row in hits}
        return judgements

    return lookup


def find_ledgers(artifact: Artifact, component: str) -> Iterable[Path]:
    """Return a component's ledgers; none where the artifact is damaged, so that its pairs are judged again."""
    table = f"judgements-{component}"
    if not any(name.startswith(table) for name in artifact.files):
        return ()
    try:
        return artifact.table_files(table)
    except UserError as error:
        log.warning("%s", error)
        return ()
