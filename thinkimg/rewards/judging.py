"""The judges at work on one part of the rollouts: whatever was judged before is taken from stored scores, by content."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from thinkimg import records
from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.records import Sample, Trajectory
from thinkimg.rewards.context import JudgeContext
from thinkimg.rewards.judge import Judge, load_judges
from thinkimg.rewards.judgement import Identity, Judgement, Judgements, Pair
from thinkimg.rewards.pairs import degenerate, processed
from thinkimg.store.artifacts import Artifact, Store

log = logging.getLogger(__name__)

Known = Callable[[str, set[str]], dict[str, Judgement]]
"""component, keys -> the judgements among these that were made before."""
RECENT = 32  # score artifacts that are searched for earlier judgements, the newest first


def pairs_of(rows: Iterable[Trajectory], samples: dict[str, Sample], tools: tuple[str, ...] | None) -> set[Pair]:
    """What there is to judge in some trajectories, each once. tools: `conversation.tools` of the rows."""
    return {pair for row in rows for pair in processed(row, samples[row.sample_id], tools) if isinstance(pair, Pair)}


def judge(
    names: Sequence[str], wanted: set[Pair], context: JudgeContext, known: Known,
    close: Callable[[str, Judgements], None],
) -> None:  # fmt: skip
    """Have the judges of some components look at pairs; `close(component, found)` gets what one has found when it has ended.

    Raises the first failure, after the others have ended: what they found is not lost with it.
    """
    pairs = sorted(wanted, key=key_of)
    looked = dict(zip(pairs, context.map(lambda pair: unfit(pair, context), pairs), strict=True))
    fit = [pair for pair in pairs if looked[pair] is None]
    context.expect(len(fit) * len(names))

    judges = load_judges(context.settings.image)

    def found(name: str) -> Judgements:
        answers = dict(zip(fit, ask(judges[name], fit, context, known), strict=True))
        return {(name, pair): looked[pair] or answers[pair] for pair in pairs}

    # One after the other where engine and trainer take turns in the memory.
    together = not context.resources.exclusive
    failures: list[BaseException] = []
    with ThreadPoolExecutor(len(names) if together else 1, thread_name_prefix="judge") as pool:
        asked = {pool.submit(found, name): name for name in names}
        for future in as_completed(asked):
            if error := future.exception():
                failures.append(error)
            else:
                close(asked[future], future.result())
    if failures:
        raise failures[0]


def unfit(pair: Pair, context: JudgeContext) -> Judgement | None:
    """A judgement that needs no judge: an image that can't be read, or in which nothing can be seen."""
    try:
        for sha256 in (pair.original, pair.processed):
            image = context.images.decoded(sha256)
            if pixel_hash(image) != sha256:
                raise ValueError(f"the pixels stored as {sha256[:16]}… have another hash")
        reason = degenerate(image)
    except (KeyError, OSError, ValueError, UserError) as error:
        return Judgement(None, f"An image can't be read: {error}", {})
    return Judgement(0.0, reason, {}) if reason else None


def ask(judge: Judge, pairs: Sequence[Pair], context: JudgeContext, known: Known) -> list[Judgement]:
    """A judge's judgements of pairs, in order; only those that are not known are made."""
    if not pairs:
        return []
    who: Identity = judge.identity(context)
    keys = {pair: who.key(pair) for pair in pairs}
    before = known(who.judge, set(keys.values()))
    new = [pair for pair in pairs if keys[pair] not in before]
    context.judged(len(pairs) - len(new))
    made = dict(zip(new, judge.judge(new, context), strict=True)) if new else {}
    return [replace(made[pair] if pair in made else before[keys[pair]], by=who) for pair in pairs]


def table(judgements: Judgements) -> pa.Table:
    """The ledger: one row per judgement, in a fixed order."""
    rows = []
    for (component, pair), one in sorted(judgements.items(), key=lambda item: (item[0][0], *key_of(item[0][1]))):
        by = one.by or Identity("", "", "", "")
        rows.append({
            "key": by.key(pair) if one.by else "", "component": component, **asdict(by), "question": pair.question,
            "original": pair.original, "processed": pair.processed, "value": one.value, "reason": one.reason,
            "evidence": json.dumps(one.evidence, sort_keys=True), "unreachable": one.unreachable,
        })  # fmt: skip
    return pa.Table.from_pylist(rows, records.judgements())


def key_of(pair: Pair) -> tuple[str, str, str]:
    return pair.question, pair.original, pair.processed


def read(path: Path) -> Judgements:
    """What `table` has written."""
    found = {}
    for row in pq.read_table(path).to_pylist():
        found[row["component"], Pair(row["question"], row["original"], row["processed"])] = judgement(row)
    return found


def judgement(row: dict[str, Any]) -> Judgement:
    who = Identity(row["judge"], row["model"], row["weights"], row["prompt"]) if row["judge"] else None
    return Judgement(row["value"], row["reason"], json.loads(row["evidence"]), who, row["unreachable"])


def earlier(store: Store, rollouts: str) -> Known:
    """Judgements with a value in complete scores of the store: all of the rollouts with this digest, and the newest of
    others."""

    def own(artifact: Artifact) -> bool:
        return artifact.manifest["recipe"]["inputs"].get("rollouts", {}).get("digest") == rollouts

    there = [artifact for artifact in store.list("scores") if not artifact.dropped]
    found = sorted(there, key=lambda artifact: artifact.manifest["finished"], reverse=True)
    others = islice((artifact for artifact in found if not own(artifact)), RECENT)
    searched = [*filter(own, found), *others]

    def known(component: str, keys: set[str]) -> dict[str, Judgement]:
        wanted = pa.array(sorted(keys))
        made: dict[str, Judgement] = {}
        for path in (path for artifact in searched for path in ledgers(artifact, component)):
            rows = pq.read_table(path)
            hits = rows.filter(pc.and_(pc.is_in(rows["key"], wanted), pc.is_valid(rows["value"]))).to_pylist()
            made |= {row["key"]: judgement(row) for row in hits}
        return made

    return known


def ledgers(artifact: Artifact, component: str) -> Iterable[Path]:
    """A component's files of judgements; none where the artifact has none, or is damaged: then what it knew is judged again."""
    table = f"judgements-{component}"
    if not any(name.startswith(table) for name in artifact.files):
        return ()
    try:
        return artifact.table_files(table)
    except UserError as error:
        log.warning("%s", error)
        return ()
