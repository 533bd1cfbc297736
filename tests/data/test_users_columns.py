"""Columns of a user's own never meet our names: whatever they are called and hold, nothing that we compute changes."""

import dataclasses
import datetime
import decimal
import inspect
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from single_stage import build_stage

from thinkimg import records as schemas
from thinkimg.analysis.figures import marked_region
from thinkimg.config.load import validate
from thinkimg.data.settings import RowsConfig
from thinkimg.data.source import raw_row
from thinkimg.errors import UserError
from thinkimg.records import AnswerType, Sample, StopReason, Trajectory, Turn, TurnKind, from_row, to_row
from thinkimg.rewards import functions
from thinkimg.rewards.batch import Batch
from thinkimg.rewards.rules.answer import score as score_answers
from thinkimg.rewards.settings import RewardsConfig
from thinkimg.rewards.user_function import UserFunction
from thinkimg.stages.evaluate import summarise_evaluation
from thinkimg.stages.prepare import prepare
from thinkimg.store.artifacts import Store

ROW = Trajectory(
    "t", "s", "g", 0, "p", (1, 2), (0, 1), (-0.5,), ("i",), ((1, 8, 8),), (Turn("b", TurnKind.ANSWER, tokens=1),), "b",
    StopReason.ANSWER, None, "w", ((112, 112),),
)  # fmt: skip
# What a puzzle's samples say, every field of a sample, every argument of a reward function, every key of our own.
OURS = sorted(
    {"family", "photograph", "solution", "target", "answers", "columns", "metadata", "puzzles", "trainer_state"}
    | {field.name for kind in (Sample, Trajectory) for field in dataclasses.fields(kind)}
    | {"prompts", "completions", "completion_ids", "final_answer", "images", "log_extra", "log_metric", "self", "split"}
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(OURS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
LOOKALIKES = st.sampled_from(
    [[1, 2, 30, 40], ["a", "b"], "detail", [{"name": "crop_image", "args": {}}], {"columns": {}}, "train", 3]
)
COLUMNS = st.dictionaries(st.sampled_from(OURS) | st.text(max_size=6), JSON | LOOKALIKES, max_size=5)


def sample(columns: dict, **changes) -> Sample:
    row = Sample("s", "?", ("a",), AnswerType.TEXT, (), ("i",), "jsonl", "held_out", columns=columns)
    return dataclasses.replace(row, **changes)


def computed(one: Sample) -> tuple:
    batch = Batch([ROW], {"s": one}, config=RewardsConfig(), images=None)
    scores = score_answers(batch)
    metrics = summarise_evaluation([one], np.array([[ROW]], dtype=object), np.array([[scores[0].value]]))
    return scores, metrics, marked_region(one)


@given(COLUMNS)
def test_nothing_that_is_computed_changes(columns):
    for ours in ({}, {"answers": ("a", "b"), "targets": ((1, 2, 3, 4),)}):
        stored = to_row(sample(columns, **ours))
        again = from_row(Sample, json.loads(json.dumps(stored)))
        assert again == sample(columns, **ours)
        assert stored.keys() == set(schemas.sample_schema().names)
        assert computed(again) == computed(sample({}, **ours))


@given(COLUMNS)
def test_a_reward_function_is_given_ours_by_name_and_all_of_theirs_together(columns):
    seen: dict = {}

    def mine(completions, **given):
        seen.update(given, completions=completions)
        return [0.5] * len(completions)

    function = UserFunction("own:mine", "mine", mine, "")
    (one,) = functions.score_with(function, Batch([ROW], {"s": sample(columns)}, config=RewardsConfig(), images=None))
    assert one.value == 0.5 and seen["columns"] == [columns]
    assert seen["answer"] == ["a"] and seen["final_answer"] == ["b"] and seen["question"] == ["?"]
    assert inspect.isfunction(seen["log_extra"]) and inspect.isfunction(seen["log_metric"])
    ours = seen.keys() - columns.keys()
    for name in columns.keys() - {*OURS, *ours}:
        assert seen[name] == [columns[name]]


def source(root, records: list[dict], **data):
    for i in range(len(records)):
        Image.new("RGB", (60, 40), (i, 0, 0)).save(root / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "question": f"{i}?", "answer": "yes"} | r) for i, r in enumerate(records)]
    (root / "d.jsonl").write_text("\n".join(lines))
    return validate(
        {"data": {"source": "jsonl", "path": str(root / "d.jsonl"), "boxes": "xywh", **data}, "where": {"workers": 1}}
    )


def test_a_worked_solution_beside_the_answer_goes_through_prepare_and_evaluation(tmp_path):
    own = {"solution": "It is large, so yes.", "family": "geometry", "target": "cat", "photograph": 3, "answers": "no"}
    dataset, _ = build_stage(prepare, source(tmp_path, [own] * 6), Store(tmp_path / "store"))
    samples = list(dataset.samples())
    assert len(samples) == 6 and all(one.columns == own and one.metadata == {} for one in samples)
    rows = np.array([[dataclasses.replace(ROW, answer="yes")]] * 6, dtype=object)
    metrics = summarise_evaluation(samples, rows, np.ones((6, 1)))
    assert metrics["accuracy"] == 1 and not any("geometry" in name or "right" in name for name in metrics)


def test_a_column_of_any_kind_becomes_json():
    """As a user's own source, or the Hub's features, give it: keys of any type, dates, bytes, NaN."""
    day = datetime.date(2026, 1, 2)
    value = {1: "a", None: (3, float("nan")), day: {b"key": day}, "image": b"1234", "deep": [decimal.Decimal("1.5")]}
    record = {"image": 0, "question": "q", "answer": "a", "own": value, "raw": b"left out"}
    row = raw_row(record, RowsConfig(), lambda value: lambda: b"", id="0", where="row 0")
    assert row.columns == {"own": {
        "1": "a", "None": [3, None], "2026-01-02": {"b'key'": "2026-01-02"}, "image": "4 bytes", "deep": ["1.5"],
    }}  # fmt: skip


def test_further_answers_and_targets_are_those_of_the_mapped_columns(tmp_path):
    records = [{"also": ["yep", "y"], "box": [1, 2.5, 3, 4], "answers": ["never"]}, {"also": None, "box": None}, {}]
    config = source(tmp_path, records, columns={"answers": "also", "target": "box"})
    dataset, _ = build_stage(prepare, config, Store(tmp_path / "store"))
    samples = {one.question: one for one in dataset.samples()}
    assert samples["0?"].answers == ("yes", "yep", "y") and samples["0?"].targets == ((1, 2.5, 3, 4),)
    assert samples["0?"].columns == {"answers": ["never"]}
    for name in ("1?", "2?"):
        assert samples[name].answers == ("yes",) and samples[name].targets == () and samples[name].columns == {}
    assert all(one.metadata == {} for one in samples.values())


@pytest.mark.parametrize(
    ("column", "value"),
    [("answers", [{"a": 1}]), ("answers", "yes"), ("answers", {"a": 1}), ("answers", [""]), ("target", [1, 2, 3]),
     ("target", [1, 2, 0, 4]), ("target", ["1", "2", "3", "4"]), ("target", "cat"), ("target", [1, 2, True, 4])],
)  # fmt: skip
def test_a_mapped_column_that_does_not_fit_is_refused_with_its_reason(tmp_path, column, value):
    reason = {"answers": "answer|empty|text", "target": "target"}[column]
    with pytest.raises(UserError, match=rf"2 of 2 rows are refused.*\(({reason})\)"):
        build_stage(prepare, source(tmp_path, [{"own": value}] * 2, columns={column: "own"}), Store(tmp_path / "store"))


def first_version(metadata: str, **changes) -> dict:
    """A row of a sample as version 1 of the tables has it."""
    row = to_row(sample({})) | {"answer": "a", "metadata": metadata} | changes
    return {name: value for name, value in row.items() if name not in ("answers", "targets", "columns")}


def test_a_store_of_the_first_version_is_read_as_it_was_meant(tmp_path):
    """There a user's columns and our names shared one name space."""
    flat = {"solution": "It is.", "answers": ["b"], "target": [1, 2, 3, 4], "n": 1}
    pq.write_table(pa.Table.from_pylist([first_version(json.dumps(flat))]), tmp_path / "samples.parquet")
    (stored,) = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert from_row(Sample, stored) == sample(flat, answers=("a", "b"), targets=((1, 2, 3, 4),))
    for unlike in ({"answers": [1], "target": "cat"}, {"target": [1, 2, 3]}, {"target": [0, 0, True, 8]},
                   {"target": [0, 0, 0, 8]}, {"target": [0, 0, float("inf"), 8]}):  # fmt: skip
        assert from_row(Sample, first_version(json.dumps(unlike))) == sample(unlike)
    apart = {"columns": {"answers": "mine"}, "answers": ["b"], "target": [1, 2, 3, 4]}  # the later prepare
    expected = sample({"answers": "mine"}, answers=("a", "b"), targets=((1, 2, 3, 4),))
    assert from_row(Sample, first_version(json.dumps(apart))) == expected
    puzzle = {"family": "detail", "solution": [], "photograph": "p"}
    for marked, targets in ((None, ()), ([1, 2, 3, 4], ((1, 2, 3, 4),))):
        one = from_row(Sample, first_version(json.dumps(puzzle | {"target": marked}), source="puzzles"))
        assert one == sample({}, source="puzzles", metadata=puzzle, targets=targets)
