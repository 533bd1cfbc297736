"""Alarms: the figures of an iteration, no alarm from noise, each alarm where it should fire, and a loop's record."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_store import CROP, GROUPS, SHA, group, make_dataset, make_rollouts, make_scores
from ledger_store import settings as configured
from rewards_rows import call, final, sample, trajectory

from thinkimg.analysis import alarms, console_report
from thinkimg.analysis.alarms import WINDOW, Finding, History, check_alarms, watch_iteration
from thinkimg.analysis.figures import (
    compute_signals,
    estimate_accuracy,
    estimate_correlation,
    estimate_ratio,
    estimate_share,
    find_idle_calls,
    holds_region,
    marked_region,
)
from thinkimg.config.load import load_config
from thinkimg.console import console
from thinkimg.grpo.settings import LossConfig
from thinkimg.records import CallStatus
from thinkimg.rewards.mix import Mix
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe
from thinkimg.tracking.loop import open_loop
from thinkimg.tracking.records import load_record, loop_id
from thinkimg.tracking.settings import TrackingConfig

NAMES = [alarm.__name__ for alarm in alarms.ALARMS]
CLUSTERS, ROWS, QUESTIONS = 48, 8, 100
groups = np.repeat(np.arange(CLUSTERS), ROWS)
everywhere = np.ones(CLUSTERS * ROWS, dtype=bool)


# the figures ----------------------------------------------------------------------------------------------------------


def test_the_error_of_a_share_is_that_of_its_clusters():
    """Over many draws of groups that agree within themselves it is as stated: twice that of independent rows."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        found.append(estimate_share(clustered(rng, 0.4, 0.5), everywhere, groups))
    values, errors = np.array(found).T
    assert abs(values.mean() - 0.4) < 0.01
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)
    assert errors.mean() > 1.8 * math.sqrt(0.4 * 0.6 / len(groups))


def test_a_share_of_all_or_none_is_not_certain():
    for hits in (np.zeros(len(groups)), np.ones(len(groups))):
        value, error = estimate_share(hits, everywhere, groups)
        assert value == hits[0] and 0.002 < error < 0.01


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_ratio_is_the_pooled_one_and_rows_without_a_count_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    values, counts = rng.uniform(size=40), rng.integers(0, 3, 40)
    counts[:2] = 1
    names = rng.permutation(np.repeat(np.arange(8), 5))
    names[:2] = 0, 1
    mean, error = estimate_ratio(values, counts, names)
    used = counts > 0
    assert mean == pytest.approx(values[used].sum() / counts.sum()) and error >= 0
    assert estimate_ratio(np.where(used, values, np.nan), counts, names) == (mean, error)
    order = rng.permutation(40)
    assert estimate_ratio(values[order], counts[order], names[order]) == pytest.approx((mean, error))
    assert estimate_ratio(values, np.zeros(40), names) is None is estimate_ratio(values, counts, np.zeros(40))


def test_the_correlation_is_within_groups():
    rng = np.random.default_rng(0)
    level = np.repeat(rng.normal(size=CLUSTERS), ROWS) * 10  # questions differ far more than answers to one do
    noise = rng.normal(size=(2, len(groups)))
    one, other = noise[0] + level, -0.6 * noise[0] + 0.8 * noise[1] + level
    assert np.corrcoef(one, other)[0, 1] > 0.9
    value, error = estimate_correlation(one, other, everywhere, groups)
    assert abs(value + 0.6) < 3 * error < 0.2
    drawn = [estimate_correlation(*rng.normal(size=(2, len(groups))), everywhere, groups) for _ in range(300)]
    values, errors = np.array(drawn).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)


def test_a_correlation_leaves_out_what_is_missing_or_does_not_count():
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, len(groups)))
    valid = rng.random(len(groups)) < 0.8
    before = estimate_correlation(one, other, valid, groups)
    one[~valid] = 1e6
    assert estimate_correlation(one, other, valid, groups) == before
    one[valid & (rng.random(len(groups)) < 0.2)] = np.nan
    assert (
        estimate_correlation(one, other, valid, groups)
        == estimate_correlation(one, other, valid & ~np.isnan(one), groups)
        != before
    )
    constant = np.repeat(rng.normal(size=CLUSTERS), ROWS)
    assert estimate_correlation(constant, other, everywhere, groups) is None
    assert estimate_correlation(one, other, ~everywhere, groups) is None


def test_the_figures_of_stored_rollouts(tmp_path):
    store = Store(tmp_path)
    dataset = make_dataset(store, target=[0, 0, 8, 8])  # a crop of 4 view pixels of 56 holds 8 of 112
    rollouts = make_rollouts(store, dataset)
    found = compute_signals(dataset, rollouts, make_scores(store, dataset, rollouts), Mix({"answer": 0.5}, {}))
    expected = {"tool_rate": 3 / 4, "failed": 1 / 5, "over_turns": 1 / 4, "idle_calls": 0, "no_op_calls": 0,
                "answer_tokens": 2, "total": 1 / 3, "region_in_crop": 1 / 2}  # fmt: skip
    assert {key.removeprefix("signal/") for key in found if not key.endswith("_se")} == set(expected), (
        "six groups are too few for a correlation"
    )
    for name, value in expected.items():
        assert found[f"signal/{name}"] == pytest.approx(value) and found[f"signal/{name}_se"] >= 0
    elsewhere = make_dataset(store, target=[80, 80, 8, 8])
    rollouts = make_rollouts(store, elsewhere)
    assert (
        compute_signals(elsewhere, rollouts, make_scores(store, elsewhere, rollouts), Mix({}, {}))[
            "signal/region_in_crop"
        ]
        == 0
    )
    unmarked = make_dataset(store)
    rollouts = make_rollouts(store, unmarked)
    found = compute_signals(unmarked, rollouts, make_scores(store, unmarked, rollouts), Mix({}, {}))
    assert "signal/region_in_crop" not in found


def test_a_target_is_that_of_the_only_picture():
    box = (0.0, 0.0, 8.0, 8.0)
    assert marked_region(sample(targets=(box,))) == box and marked_region(sample()) is None
    assert marked_region(sample(targets=(box,), images=(SHA, CROP))) is None


def test_idle_calls_are_those_that_bring_nothing_new():
    def crop(image, status=CallStatus.OK, source=0, **args):
        return replace(call(status=status, source=source, **args), image=image)

    row = trajectory(
        crop(CROP, x=1),
        crop(SHA, CallStatus.DUPLICATE, x=0),  # the whole picture: a no-op
        crop(CROP, CallStatus.DUPLICATE, x=1),  # there before
        replace(call("get_image_info"), image=None),
        replace(call("get_image_info", image="current"), image=None),  # asked before
        replace(call(status=CallStatus.ERROR), image=None),
        final("red"), answer="red", images=(SHA, CROP, SHA, CROP),
    )  # fmt: skip
    assert [(no_op, row.turns.index(turn)) for no_op, turn in find_idle_calls(row)] == [
        (True, 1),
        (False, 2),
        (False, 4),
    ]


def test_a_crop_of_most_of_the_picture_does_not_hold_a_region():
    def cropped(**box):
        return trajectory(replace(call(**box), image=CROP), final("red"), answer="red", images=(SHA, CROP),
                          grids=((1, 4, 4), (1, 4, 4)))  # fmt: skip

    target, size = [40, 40, 20, 20], (112, 112)
    assert holds_region(cropped(x=20, y=20, width=20, height=20), target, size)
    assert not holds_region(cropped(x=0, y=0, width=56, height=50), target, size)
    assert not holds_region(cropped(x=0, y=0, width=20, height=20), target, size)
    turned = trajectory(replace(call("flip_image", direction="vertical"), image=CROP), final("red"), answer="red",
                        images=(SHA, CROP), grids=((1, 4, 4), (1, 4, 4)))  # fmt: skip
    assert not holds_region(turned, target, size)


# noise ----------------------------------------------------------------------------------------------------------------


def clustered(rng, rate, agreement=0.2):
    """(N,) 0 or 1: groups differ, as questions do; agreement is the correlation of two rows of one group."""
    if rate <= 0 or rate >= 1:
        return np.full(len(groups), float(rate))
    level = rng.beta(rate * (1 / agreement - 1), (1 - rate) * (1 / agreement - 1), CLUSTERS)
    return (rng.random(len(groups)) < np.repeat(level, ROWS)).astype(float)


def iteration(
    rng,
    tool=0.8,
    right=0.5,
    region=0.5,
    idle=0.05,
    over=0.05,
    total=0.6,
    tokens=60.0,
    held_out=0.5,
    against=0.0,
    failed=0.0,
    effective=0.9,
    evaluated=True,
    verdicts=1.0,
):
    """The metrics of an iteration of 48 x 8 conversations with these true rates."""
    answer = clustered(rng, right)
    component = rng.normal(size=len(groups)) + against * (answer - 0.5)
    figures = {
        "tool_rate": estimate_share(clustered(rng, tool), everywhere, groups),
        "failed": estimate_share(clustered(rng, failed), everywhere, groups),
        "over_turns": estimate_share(clustered(rng, over), everywhere, groups),
        "idle_calls": estimate_share(clustered(rng, idle), everywhere, groups),
        "region_in_crop": estimate_share(clustered(rng, region), answer * (groups % 2), groups),
        "answer_tokens": estimate_ratio(rng.gamma(4, tokens / 4, len(groups)), everywhere, groups),
        "total": estimate_ratio(rng.normal(total, 0.3, len(groups)), everywhere, groups),
        "correlation/tool": estimate_correlation(component, answer, everywhere, groups),
    }
    found = {f"signal/{name}": pair[0] for name, pair in figures.items() if pair}
    found |= {f"signal/{name}_se": pair[1] for name, pair in figures.items() if pair}
    held_out = rng.binomial(QUESTIONS, held_out) / QUESTIONS
    judged = {"eval/accuracy": held_out, "eval/trajectories": QUESTIONS, "eval/judged": round(verdicts * QUESTIONS)}
    found |= judged if evaluated else {}
    return found | {"train/rows": 300.0, "train/sampling/effective_sample": effective}


def judged(metrics, before=0.5, **more):
    """Alarm -> the iterations (from 1) in which it fired."""
    start = {"eval/accuracy": before, "eval/trajectories": 300}
    fired = {}
    for step in range(1, len(metrics) + 1):
        for found in check_alarms(History(metrics[:step], start, ["tool"], **more)):
            if found.fired:
                fired.setdefault(found.alarm, []).append(step)
    return fired


@pytest.mark.parametrize("course", ["nothing is learnt", "all is learnt", "the reward rises, accuracy stays"])
def test_noise_fires_no_alarm(course):
    """Forty loops of forty iterations; the rates stay, or rise as they did in the demo."""
    rng, noisy = np.random.default_rng(0), 0
    for _ in range(40):
        learnt = np.linspace(0, 1, 40) * (course == "all is learnt")
        paid = np.linspace(0, 1, 40) * (course != "nothing is learnt")
        metrics = [
            iteration(rng, tool=0.72 + 0.27 * done, right=0.4 + 0.5 * done, region=0.6 + 0.35 * done,
                      total=0.6 + 0.3 * more, held_out=0.4 + 0.45 * done, tokens=60 * (1 + 0.5 * done))
            for done, more in zip(learnt, paid, strict=True)
        ]  # fmt: skip
        noisy += bool(judged(metrics, before=0.4))
    assert noisy <= 2


def course(rng, before, after, first=12, then=8):
    return [iteration(rng, **before) for _ in range(first)] + [iteration(rng, **after) for _ in range(then)]


@pytest.mark.parametrize(
    ("alarm", "before", "after"),
    [
        ("tool_collapse", {"tool": 0.8}, {"tool": 0.2}),
        ("tool_saturation", {"tool": 0.7}, {"tool": 1.0}),
        ("failed", {"failed": 0.0}, {"failed": 0.2}),
        ("over_turns", {"over": 0.05}, {"over": 0.4}),
        ("idle_calls", {"idle": 0.05}, {"idle": 0.5}),
        ("reward_without_accuracy", {"total": 0.6, "held_out": 0.6}, {"total": 0.9, "held_out": 0.3}),
        ("against_the_answer", {"against": 0.0}, {"against": -1.0}),
        ("region_missed", {"region": 0.9}, {"region": 0.3}),
        ("long_answers", {"tokens": 60}, {"tokens": 180}),
        ("unjudged", {"verdicts": 1.0}, {"verdicts": 0.8}),
        ("effective_sample", {"effective": 0.9}, {"effective": 0.3}),
    ],
)
def test_what_goes_wrong_fires_its_alarm_and_no_other_within_a_few_iterations(alarm, before, after):
    rng = np.random.default_rng(3)
    for _ in range(5):
        fired = judged(course(rng, before, after))
        assert set(fired) == {alarm}
        assert 12 < fired[alarm][0] <= 12 + 6 and fired[alarm][-1] == 20, "it lasts as long as what it is about"


def test_a_loop_that_is_evaluated_now_and_then_has_its_alarms():
    """Of every fourth iteration the accuracy is known: the alarms look at these, beside the reward of the same."""
    rng, every = np.random.default_rng(3), 4
    for _ in range(5):
        states = [{"total": 0.6, "held_out": 0.6}] * 24 + [{"total": 0.9, "held_out": 0.3}] * 16
        metrics = [iteration(rng, **state, evaluated=i % every == every - 1) for i, state in enumerate(states)]
        fired = judged(metrics)
        assert set(fired) == {"reward_without_accuracy"} and 24 < fired["reward_without_accuracy"][0] <= 40


def test_a_loop_that_gains_accuracy_may_saturate_and_one_that_begins_there_may_stay():
    rng = np.random.default_rng(0)
    gaining = course(rng, {"tool": 0.7, "held_out": 0.5}, {"tool": 1.0, "held_out": 0.8})
    assert "tool_saturation" not in judged(gaining)
    assert "tool_saturation" not in judged(course(rng, {"tool": 1.0}, {"tool": 1.0}))


def test_a_falling_accuracy_with_a_falling_reward_is_no_hacking():
    rng = np.random.default_rng(0)
    assert judged(course(rng, {"total": 0.9, "held_out": 0.6}, {"total": 0.6, "held_out": 0.3})) == {}


def test_without_tools_on_offer_their_alarms_are_silent():
    metrics = course(np.random.default_rng(0), {"tool": 0.0}, {"tool": 0.0})
    assert set(judged(metrics)) == {"tool_collapse"} and judged(metrics, tools=False) == {}


def test_no_step_is_told_at_once_and_before_there_is_a_window_nothing_else_is():
    rng = np.random.default_rng(0)
    wrong = {"tool": 0.0, "over": 0.9, "idle": 0.9, "against": -3.0}
    first = [iteration(rng, **wrong) | {"train/rows": 0.0} for _ in range(WINDOW - 1)]
    assert judged(first) == {"no_step": [1, 2]}
    assert check_alarms(History([{}])) == [Finding(name, False) for name in NAMES]
    assert estimate_accuracy({"eval/accuracy": 0.5}) is None


# a loop ---------------------------------------------------------------------------------------------------------------


def make_policy(store, rows, number, scores):
    def produce(work):
        work.json("weights.json", [number])
        work.metrics |= {"train/rows": rows}

    recipe = Recipe("train", 1, 1, {"number": number}, {"scores": scores.reference})
    return store.build("policy", recipe, produce)[0]


def run_loop(store, settings, steps):
    """As flows/loop.py has it, without the stages; the last iteration takes no step."""
    dataset = make_dataset(store, target=[0, 0, 8, 8])
    found = []
    with open_loop(settings, store) as tracker:
        tracker.log_iteration(0, {"eval/accuracy": 0.5}, {"prepare": dataset})
        for step in range(1, steps + 1):
            rollouts = make_rollouts(store, dataset, [group(i) for i in range(GROUPS)], number=step)
            scores = next((s for s in store.list("scores") if s.manifest["recipe"]["inputs"]["rollouts"]["digest"]
                           == rollouts.digest), None) or make_scores(store, dataset, rollouts)  # fmt: skip
            policy = make_policy(store, 0 if step == steps else 9, step, scores)
            tracker.log_iteration(step, artifacts={"rollout": rollouts, "score": scores, "train": policy})
            found.append(watch_iteration(tracker, store, settings, step))
    return found


def test_a_loop_keeps_every_table_and_logs_the_same_keys_in_every_iteration(tmp_path):
    store, settings = Store(tmp_path), configured(tmp_path)
    found = run_loop(store, settings, 4)
    assert [[one.alarm for one in step if one.fired] for step in found] == [
        [], [], ["failed"], ["failed", "no_step"],
    ]  # fmt: skip
    record = load_record(store, loop_id(settings))
    for step in range(1, 5):
        metrics = record.iteration(step).metrics
        assert {key for key in metrics if key.startswith("watch/")} == {f"watch/{name}" for name in NAMES}
        assert metrics["watch/no_step"] == float(step == 4) and metrics["signal/tool_rate"] == 0.75
        table = [row for row in record.tables["alarms"] if row["step"] == step]
        assert [row["alarm"] for row in table] == NAMES
        assert [row["fired"] for row in table] == [one.fired for one in found[step - 1]]
    assert len(record.tables["alarms"]) == 4 * len(NAMES)
    path = tmp_path / "loops" / f"{record.loop_id}.json"
    before = record.iterations, record.tables
    assert run_loop(store, settings, 4) == found, "what came later has no influence"
    again = load_record(store, loop_id(settings))
    assert [one.metrics for one in again.iterations] == [one.metrics for one in before[0]]
    assert again.tables == before[1] and path.is_file()


def test_the_figures_arrive_in_mlflow(tmp_path):
    store = Store(tmp_path)
    settings = configured(tmp_path, "where.tracking.enabled=true", "where.tracking.traces=0")
    run_loop(store, settings, 2)
    from thinkimg.tracking.connection import Connection

    connection = Connection(store.root, TrackingConfig())
    (run,) = connection.all_runs(connection.loops)
    for key in ("watch/no_step", "watch/tool_collapse", "signal/tool_rate", "signal/tool_rate_se"):
        assert [point.step for point in connection.client.get_metric_history(run.info.run_id, key)] == [1, 2]
    assert "alarms.json" in [file.path for file in connection.client.list_artifacts(run.info.run_id)]
    assert "on_alarm" not in run.data.params


def test_what_an_alarm_does_is_no_part_of_what_a_loop_is(tmp_path):
    warn, stop = (configured(tmp_path, f"on_alarm={what}") for what in ("warn", "stop"))
    assert loop_id(warn) == loop_id(stop) and warn != stop
    assert isinstance(warn.train.loss, LossConfig) and warn.on_alarm == "warn" == load_config("tiny").on_alarm


def test_the_console_shows_a_table_when_one_fires_and_nothing_else(tmp_path):
    quiet = [Finding(name, False, 0.1, 0.0, 0.2, 0.3) for name in NAMES[:-1]] + [Finding("no_step", False)]
    loud = [*quiet[:-1], Finding("no_step", True, 0.0, 0.0, 0.0, 0.0, "nothing [bold]left")]
    with console.capture() as captured:
        console_report.print_alarms(quiet, 3)
    assert captured.get() == ""
    with console.capture() as captured:
        console_report.print_alarms(loud, 3)
    assert all(text in captured.get() for text in ("Alarms of iteration 3", *NAMES, "nothing [bold]left"))
    assert alarms.explain_stop(loud, 3) == (
        "Stopped after iteration 3 by an alarm (no_step: nothing [bold]left). To continue, set on_alarm=warn."
    )
