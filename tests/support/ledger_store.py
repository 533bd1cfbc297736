"""A small real store for the tests of the ledger and the alarms: a data set, rollouts, scores, judgements, a policy."""

import json
import random
from dataclasses import replace

import pyarrow as pa
from rewards_rows import call, failed, final, malformed, sample, trajectory

from thinkimg import records
from thinkimg.config.load import load_config
from thinkimg.config.tree import Config
from thinkimg.records import AnswerType, StopReason, to_row
from thinkimg.rewards.joined import join
from thinkimg.rewards.mix import Mix
from thinkimg.stages.train import advantages_table, compute_advantages, train
from thinkimg.store.manifest import Recipe

SHA, CROP = "ab" * 32, "cd" * 32
COMPONENTS = ("answer", "embedding", "format", "self", "tool")
GROUPS, SIZE = 6, 5
MIX = [
    "image.only_if_right=false",
    "mix={format: 0.2, tool: 0.3, answer: 0.3, image: 0.2}",
    "image.types=[self, embedding]",
]


def settings(root, *overrides: str) -> Config:
    return load_config("tiny", [f"where.store={root}", "where.tracking.enabled=false", *MIX, *overrides])


def group(number: int) -> list[records.Trajectory]:
    """Right with a crop, wrong with a crop, right without, out of turns with every turn in order, failed."""
    box = {"x": 0, "y": 0, "width": 4, "height": 4}
    crop = replace(call(**box), image=CROP)
    seen = {"images": (SHA, CROP), "grids": ((1, 4, 4), (1, 4, 4))}
    rows = [
        trajectory(crop, final("red"), answer="red", **seen),
        trajectory(crop, final("blue"), answer="blue", **seen),
        trajectory(malformed(), final("red"), answer="red"),
        trajectory(crop, stop=StopReason.MAX_TURNS, **seen),
        failed(),
    ]
    names = {"sample_id": f"s{number}", "group_id": f"g{number}"}
    return [replace(row, trajectory_id=f"t{number}{i}-{i}", index=i, **names) for i, row in enumerate(rows)]


def make_dataset(store, target=None):
    targets = () if target is None else (tuple(target),)

    def produce(work):
        rows = [sample("red", AnswerType.CHOICE, ("red", "blue"), targets=targets) for _ in range(GROUPS)]
        rows = [to_row(replace(row, sample_id=f"s{i}", images=(SHA,))) for i, row in enumerate(rows)]
        work.table("samples.parquet", pa.Table.from_pylist(rows, records.sample_schema()))
        image = {"sha256": SHA, "data": b"never decoded", "width": 112, "height": 112}
        work.table("images.parquet", pa.Table.from_pylist([image], records.image_schema()))

    return store.build("dataset", Recipe("prepare", 1, 1, {"target": target}), produce)[0]


def make_rollouts(store, dataset, groups=None, number=1):
    groups = groups or [group(i) for i in range(GROUPS)]

    def produce(work):
        for part, rows in enumerate((groups[: GROUPS // 2], groups[GROUPS // 2 :])):
            rows = [to_row(row) for one in rows for row in one]
            work.table(f"trajectories-{part:05}.parquet", pa.Table.from_pylist(rows, records.trajectory_schema()))
        image = {"sha256": CROP, "data": b"never decoded", "width": 28, "height": 28}
        work.table("images-00000.parquet", pa.Table.from_pylist([image], records.image_schema()))

    recipe = Recipe("rollout", 1, 1, {"iteration": number}, {"dataset": dataset.reference})
    return store.build("rollouts", recipe, produce)[0]


def make_scores(store, dataset, rollouts, change=lambda row: None, model="judge", kept=True, **config):
    """Scores that a hash of trajectory and component decides, `self` with a judgement behind each.

    change: edits a row. kept: whether the table of judgements is there.
    """
    rows = [score_row(row, model) for row in rollouts.table("trajectories").to_pylist()]
    for row in rows:
        change(row)
    judged = [judgement(row, model) for row in rows if row["self"]["evidence"]]

    def produce(work):
        work.table("scores-00000.parquet", pa.Table.from_pylist(rows, records.score_schema(list(COMPONENTS))))
        if kept:
            work.table("judgements-00000.parquet", pa.Table.from_pylist(judged, records.judgement_schema()))

    inputs = {"dataset": dataset.reference, "rollouts": rollouts.reference}
    recipe = Recipe("score", 1, 1, {"components": list(COMPONENTS), "judge": {"model": model}} | config, inputs)
    return store.build("scores", recipe, produce, force=True)[0]


def score_row(row, model):
    found = {name: row[name] for name in ("trajectory_id", "sample_id", "group_id")}
    for name in COMPONENTS:
        draw = random.Random(row["trajectory_id"] + name)
        value = {"answer": float(row["answer"] == "red")}.get(name, round(draw.random(), 3))
        evidence = json.dumps({"judgements": [f"{model}:{row['trajectory_id']}"]}) if name == "self" else None
        if name in ("self", "embedding") and draw.random() < 0.3:
            found[name] = {"value": None, "status": "missing", "reason": "The judge was away.", "evidence": None}
        else:
            reason = None if value else "The answer is not the right one."
            found[name] = {"value": value, "status": "ok" if value else "zero", "reason": reason, "evidence": evidence}
    return found


def judgement(row, model):
    evidence = json.dumps({"p": [0.25, 0.75]})
    texts = {"model": model, "weights": "0" * 64, "prompt": "1" * 64, "question": "Which colour?"}
    images = {"original": SHA, "processed": CROP}
    key = f"{model}:{row['trajectory_id']}"
    verdict = {"value": row["self"]["value"], "reason": None, "evidence": evidence}
    who = {"key": key, "component": "self", "judge": "self", "unreachable": False}
    return who | texts | images | verdict


def make_policy(store, dataset, rollouts, scores, config, change=lambda row: None):
    """As the stage makes it, but for the training. change: edits a row of its advantages."""
    settings, joined = train.settings(config), join(rollouts, scores)
    table = advantages_table(joined, *compute_advantages(Mix.from_tree(settings.mix), settings.train, joined))
    rows = table.to_pylist()
    for row in rows:
        change(row)
    table = pa.Table.from_pylist(rows, table.schema)
    recipe = train.recipe(settings, {"dataset": dataset, "policy": dataset, "rollouts": rollouts, "scores": scores})
    return store.build("policy", recipe, lambda work: work.table("advantages.parquet", table))[0]
