"""What an evaluation says of known trajectories, and which samples an iteration draws."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.analysis.figures import binomial_error, estimate_accuracy
from thinkimg.puzzles.geometry import Geometry
from thinkimg.puzzles.scenes import Family, make_puzzle, photographs
from thinkimg.records import AnswerType, CallStatus, Sample, StopReason, Trajectory, Turn, TurnKind
from thinkimg.stages.evaluate import bootstrap_interval, describe_accuracy, judge_answers, summarise_evaluation
from thinkimg.stages.rollout import draw_samples, summarise_rows


def sample(number: int, answer: str = "a", metadata: dict | None = None) -> Sample:
    return Sample(
        f"s{number}", "?", (answer,), AnswerType.CHOICE, ("a", "b", "c", "d"), (), "test", "train", metadata or {}
    )


def trajectory(
    turns: tuple[Turn, ...] = (), answer: str | None = "a", stop: StopReason = StopReason.ANSWER
) -> Trajectory:
    return Trajectory("t", "s", "g", 0, "p", (), (), (), (), (), turns, answer, stop, None, "w", ())


def call(name: str, args: str, status: CallStatus = CallStatus.OK, source: int = 0) -> Turn:
    image = None if status is CallStatus.ERROR else "i"
    return Turn("", TurnKind.TOOL, name, args, status, source=source, image=image, tokens=3)


@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 5))
def test_every_sample_is_drawn_once_before_any_is_drawn_again(count, per_iteration, seed):
    samples = [sample(i) for i in range(count)]
    iterations = [[s.sample_id for s in draw_samples(samples, per_iteration, i, seed)] for i in range(1, 9)]
    times = Counter(s.sample_id for s in samples)
    for drawn in iterations:
        assert len(drawn) == len(set(drawn)) == min(count, per_iteration)
        times.update(drawn)
        assert max(times.values()) - min(times.values()) <= 1
    assert [s.sample_id for s in draw_samples(samples, per_iteration, 3, seed)] == iterations[2]


def test_bootstrap_is_repeatable_and_holds_the_mean():
    values = np.random.default_rng(1).uniform(size=80)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high and (low, high) == bootstrap_interval(values)
    assert bootstrap_interval(values[:1]) == (values[0], values[0])


def solved(puzzle, answer: str) -> tuple[Sample, Trajectory]:
    import json

    solution = [{"name": c.name, "args": c.args} for c in puzzle.solution]
    metadata = {"family": str(puzzle.family), "solution": solution}
    targets = () if puzzle.target is None else (puzzle.target,)
    turns = tuple(call(c.name, json.dumps(c.args), source=i) for i, c in enumerate(puzzle.solution))
    asked = replace(sample(0, puzzle.answer, metadata), choices=puzzle.choices, targets=targets)
    images = ("o", *("i" for _ in turns))
    row = trajectory((*turns, Turn("", TurnKind.ANSWER)), answer)
    return asked, replace(row, images=images, grids=((1, 8, 8),) * len(images), sizes=((112, 112),) * len(images))


def test_accuracy_is_broken_down_into_arguments_and_reading():
    puzzles = [make_puzzle(list(Family), sorted(photographs())[:3], i, seed=3, geometry=Geometry(28)) for i in range(8)]
    pairs = [solved(puzzle, puzzle.answer) for puzzle in puzzles]
    wrong = next(choice for choice in puzzles[0].choices if choice != puzzles[0].answer)
    asked, row = pairs[0]
    pairs[0] = asked, replace(row, answer=wrong)  # right calls, wrong reading
    asked, row = pairs[1]
    # The right answer by luck.
    pairs[1] = asked, replace(row, turns=(row.turns[-1],), images=("o",), grids=((1, 8, 8),), sizes=((112, 112),))
    rows = np.array([[row, row] for _, row in pairs], dtype=object)
    values = np.array([[float(row.answer == asked.answer)] * 2 for asked, row in pairs])
    found = summarise_evaluation([asked for asked, _ in pairs], rows, values)
    assert found["accuracy"] == found["avg_at_k"] == 7 / 8
    assert found["tool_rate"] == found["right_arguments"] == 7 / 8
    assert found["right_reading"] == pytest.approx(6 / 7)
    assert found["chance"] == 0.25
    assert found["detail/accuracy"] == 0.5 and found["both/accuracy"] == 1.0
    assert found["dark/right_arguments"] == 0.5


def test_a_failed_call_is_no_use_of_a_tool():
    failed = call("crop_image", "{}", CallStatus.ERROR)
    asked = sample(0, metadata={"family": "dark", "solution": []})
    rows = np.array([[trajectory((failed, Turn("", TurnKind.ANSWER)))]], dtype=object)
    assert summarise_evaluation([asked], rows, np.array([[1.0]]))["tool_rate"] == 0


def test_summary_counts_calls_ends_and_tokens():
    rows = [
        trajectory(
            (
                call("flip_image", "{}"),
                call("flip_image", "{}", CallStatus.DUPLICATE),
                Turn("", TurnKind.ANSWER, tokens=4),
            )
        ),
        trajectory((Turn("", TurnKind.MALFORMED, tokens=2),), None, StopReason.MAX_TURNS),
    ]
    found = summarise_rows(rows)
    assert found["tool/rate"] == 0.5 and found["tool/calls"] == 1.0
    assert found["tool/ok"] == found["tool/duplicate"] == 0.5
    assert found["stop/answer"] == found["stop/max_turns"] == 0.5
    assert found["malformed"] == 0.25 and found["turns"] == 2.0 and found["tokens"] == 6.0


@pytest.mark.parametrize(
    ("calls", "right"),
    [
        ([("crop_image", {"x": 28, "y": 56, "width": 28, "height": 28}, 0)], True),
        ([("crop_image", {"x": 56, "y": 56, "width": 28, "height": 28}, 0)], False),  # the neighbouring cell
        ([("crop_image", {"x": 0, "y": 28, "width": 84, "height": 84}, 0)], False),  # holds it, too small to be read
        ([("zoom_image", {"factor": 4, "center_x": 42, "center_y": 70}, 0)], True),
        (
            [
                ("crop_image", {"x": 0, "y": 56, "width": 56, "height": 56}, 0),
                ("crop_image", {"x": 56, "y": 0, "width": 56, "height": 56}, 1),
            ],
            True,
        ),
        ([("rotate_image", {"angle": 90}, 0), ("crop_image", {"x": 28, "y": 56, "width": 28, "height": 28}, 1)], False),
        (
            [("adjust_brightness", {"factor": 2}, 0), ("crop_image", {"x": 28, "y": 56, "width": 28, "height": 28}, 1)],
            True,
        ),
    ],
)
def test_right_calls_follow_the_coordinates_through_the_images(calls, right):
    import json

    from thinkimg.puzzles.demonstrations import has_right_calls

    asked = replace(sample(0, metadata={"family": "detail", "solution": []}), targets=((112, 224, 112, 112),))
    turns = tuple(call(name, json.dumps(args), source=source) for name, args, source in calls)
    images = ("o", *("i" for _ in turns))
    row = replace(trajectory(turns), images=images, sizes=((112, 112),) * len(images))
    assert has_right_calls(asked, row) is right


FAILED = replace(trajectory(stop=StopReason.FAILED, answer=None), error="The prompt has 2237 tokens.")


def test_conversations_that_failed_are_no_wrong_answers():
    """The handed case: six right, four failed."""
    rows = np.array([[trajectory(), trajectory()]] * 6 + [[FAILED, trajectory()]] * 4, dtype=object)
    values = np.array([[1.0, 0.0]] * 6 + [[np.nan, 1.0]] * 4)
    found = summarise_evaluation([sample(i) for i in range(10)], rows, values)
    assert (found["accuracy"], found["judged"], found["failed"]) == (1.0, 6, 4)
    assert found["accuracy_low"] == pytest.approx(0.6097, abs=1e-3) and found["avg_at_k"] == 0.4
    assert estimate_accuracy({f"eval/{name}": value for name, value in found.items()})[1] == binomial_error(1.0, 6)
    assert describe_accuracy(found) == (
        "held-out accuracy 100 % (95 %: 61–100), avg@k 40 %, chance 25 %, 4 conversations failed and don't count"
    )


def test_without_any_answer_there_is_no_accuracy():
    rows, values = np.array([[FAILED, FAILED]] * 2, dtype=object), np.full((2, 2), np.nan)
    found = summarise_evaluation([sample(0), sample(1)], rows, values)
    assert found["accuracy"] is found["avg_at_k"] is found["tool_rate"] is None and found["failed"] == 4
    assert describe_accuracy(found).startswith("no held-out accuracy, chance 25 %, 4 conversations failed")


@given(st.lists(st.sampled_from([0.0, 0.4, 0.5, 1.0, np.nan]), min_size=1, max_size=30), st.integers(0, 9))
def test_what_failed_changes_no_figure_of_the_others(values, seed):
    """However many fail, the figures are those of an evaluation without them."""
    column = np.array(values)[:, None]
    rows = np.array([[FAILED if np.isnan(value) else trajectory()] for value in values], dtype=object)
    samples, kept = [sample(i) for i in range(len(values))], np.flatnonzero(~np.isnan(column[:, 0]))
    found = summarise_evaluation(samples, rows, column)
    if len(kept):
        alone = summarise_evaluation([samples[i] for i in kept], rows[kept], column[kept])
        same = {name for name in alone if not name.startswith(("stop/", "failed", "trajectories"))}
        assert {name: found[name] for name in same} == {name: alone[name] for name in same}


def test_an_answer_that_can_not_be_judged_is_none():
    boxes = {"s0": replace(sample(0, "no box"), answer_type=AnswerType.BOX, choices=())}
    rows = [replace(trajectory(answer="1, 2, 3, 4"), sample_id="s0", images=("o",), sizes=((9, 9),)), FAILED]
    assert np.isnan(judge_answers(rows, boxes, 0.01, Pixels())).all()


class Pixels:
    def decoded(self, sha256):
        from PIL import Image

        return Image.new("RGB", (9, 9))
