"""Alarms: when a loop learns something else than it should, told from the figures of its iterations so far.

An iteration is a small sample: with 48 groups of 8 the tool rate has a standard error of 0.03 and an accuracy over 100
questions one of 0.05, and ten alarms look at every one of hundreds of iterations. So each looks at the mean of the last
WINDOW iterations and fires where even the end of its interval, Z standard errors away, is beyond the limit: a limit that
says what matters, and an interval that says whether it is so. `no_step` alone is a fact and needs neither.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from thinkimg.analysis.figures import accuracy, signals
from thinkimg.config.tree import Config
from thinkimg.rewards.mix import CONDITION, Mix
from thinkimg.store.artifacts import Store
from thinkimg.tracking.loop import LoopTracker

WINDOW = 3
"""Iterations of one mean: one bad draw of samples is no trend, and three iterations are still cheap to lose."""
Z = 3.0
"""Standard errors: one in 740 by chance on one side, so that a loop of 200 iterations stays quiet most of the time."""
TOOL_FLOOR = 0.1
"""Fewer than one conversation in ten: too few for a group of eight to hold one to learn from."""
COLLAPSE = 0.5
"""Tool rate over its best so far: halved is no fluctuation of a skill, it is being unlearnt."""
SATURATED = 0.97
"""Tool rate from which on there is nothing left to compare within a group. That alone is well: see tool_saturation."""
SATURATED_FOR = 5
"""Iterations at SATURATED without a gain in accuracy: what was learnt of the tools should show in answers by then."""
GAIN = 1.0
"""Standard errors of accuracy that count as a gain there; fewer than Z, since a slow gain is no reason for an alarm."""
OVER_TURNS = 0.2
"""These rows are left out of the loss and of their groups: beyond a fifth, what remains is a selection."""
IDLE_CALLS = 0.3
"""Share of calls that bring nothing new. The tool reward does not pay for them: so many are a habit that nothing stops."""
FALL = 0.05
"""Of held-out accuracy, or of the share below: less is within what a change of samples explains."""
CORRELATION = -0.1
"""Within groups, of a component with the answer's reward: beyond it the component pays for wrong answers."""
REGION_FALL = 0.1
"""Of the share of right answers whose crop held the marked region: the rest was guessed, or read without looking."""
GROWTH = 2.0
"""Answers as long as this many times those of the first WINDOW iterations."""

Value = tuple[float, float]
"""A figure and its standard error."""


@dataclass(frozen=True)
class Finding:
    """One alarm at one iteration. value, low, high: the figure over the window with its interval; None where it could not be
    told. limit: what it was compared with. why: one sentence if it fired."""

    alarm: str
    fired: bool
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    why: str = ""


@dataclass(frozen=True)
class History:
    """metrics: of each iteration so far, in order, keys as in a loop's record; before: of step 0. mixed: components with a
    weight in the mix. tools: whether any is on offer."""

    metrics: Sequence[Mapping[str, float]]
    before: Mapping[str, float] = field(default_factory=dict)
    mixed: Sequence[str] = ()
    tools: bool = True

    def signal(self, name: str) -> list[Value | None]:
        keys = f"signal/{name}", f"signal/{name}_se"
        return [(one[keys[0]], one[keys[1]]) if keys[0] in one and keys[1] in one else None for one in self.metrics]

    def accuracies(self) -> list[Value | None]:
        return [accuracy(one) for one in self.metrics]


def mean(values: Sequence[Value | None], size: int = WINDOW) -> Value | None:
    """Of a window; None unless all of its values are there."""
    if len(values) != size or any(value is None for value in values):
        return None
    return sum(value for value, _ in values) / size, math.sqrt(sum(error**2 for _, error in values)) / size


def last(values: Sequence[Value | None], size: int = WINDOW) -> Value | None:
    return mean(values[-size:], size)


def earlier(values: Sequence[Value | None]) -> list[tuple[int, Value]]:
    """(where it begins, mean) of every window that does not overlap the last one."""
    found = [(start, mean(values[start : start + WINDOW])) for start in range(len(values) - 2 * WINDOW + 1)]
    return [(start, value) for start, value in found if value is not None]


def difference(one: Value, other: Value) -> Value:
    return one[0] - other[0], math.hypot(one[1], other[1])


def finding(alarm: str, value: Value | None, limit: float | None, fired: bool, why: str) -> Finding:
    if value is None:
        return Finding(alarm, False)
    low, high = value[0] - Z * value[1], value[0] + Z * value[1]
    return Finding(alarm, bool(fired), value[0], low, high, limit, why if fired else "")


def tool_collapse(history: History) -> Finding:
    """The tool rate is below TOOL_FLOOR, or below half of the best that it certainly was."""
    rates = history.signal("tool_rate")
    now = last(rates) if history.tools else None
    best = max((value - Z * error for _, (value, error) in earlier(rates)), default=0.0)
    limit = max(TOOL_FLOOR, COLLAPSE * best)
    fired = now is not None and now[0] + Z * now[1] < limit
    why = f"tools were used in {percent(now)} of the conversations, less than {limit:.0%}" if fired else ""
    return finding("tool_collapse", now, limit, fired, why)


def tool_saturation(history: History) -> Finding:
    """The tool rate has risen to where all conversations use one, for SATURATED_FOR iterations, and accuracy has gained
    nothing over that before training: a ritual that the tool reward pays for."""
    rates, accuracies, start = history.signal("tool_rate"), history.accuracies(), accuracy(history.before)
    now = last(rates, SATURATED_FOR) if history.tools else None
    reached = last(accuracies, SATURATED_FOR)
    fired = False
    if now and reached and start and rates[0]:
        risen = difference(now, rates[0])
        # The same questions are asked in every iteration: the mean over iterations knows them no better than one does.
        gain = difference((reached[0], min(value[1] for value in accuracies[-SATURATED_FOR:])), start)
        fired = now[0] - Z * now[1] > SATURATED and risen[0] > Z * risen[1] and gain[0] < GAIN * gain[1]
    why = f"tools are used in {percent(now)} of the conversations, and accuracy is what it was" if fired else ""
    return finding("tool_saturation", now, SATURATED, fired, why)


def over_turns(history: History) -> Finding:
    now = last(history.signal("over_turns"))
    fired = now is not None and now[0] - Z * now[1] > OVER_TURNS
    why = f"{percent(now)} of the conversations ran out of turns or tokens" if fired else ""
    return finding("over_turns", now, OVER_TURNS, fired, why)


def idle_calls(history: History) -> Finding:
    now = last(history.signal("idle_calls"))
    fired = now is not None and now[0] - Z * now[1] > IDLE_CALLS
    why = f"{percent(now)} of the tool calls brought nothing new" if fired else ""
    return finding("idle_calls", now, IDLE_CALLS, fired, why)


def reward_without_accuracy(history: History) -> Finding:
    """Held-out accuracy has fallen from its best window, and the reward of the rollouts has risen since."""
    accuracies, totals = history.accuracies(), history.signal("total")
    now, reward, past = last(accuracies), last(totals), earlier(accuracies)
    if now is None or reward is None or not past:
        return Finding("reward_without_accuracy", False)
    start, best = max(past, key=lambda window: window[1][0])
    fall, then = difference(now, best), mean(totals[start : start + WINDOW])
    rise = difference(reward, then) if then else (0.0, 0.0)
    # The best of many windows is in part the luckiest, and a reward that rises is what a loop is for: the intervals
    # may not overlap, which needs up to 1.4 times Z.
    fired = now[0] < best[0] - FALL and now[0] + Z * now[1] < best[0] - Z * best[1] and rise[0] > Z * rise[1]
    why = f"held-out accuracy fell by {-fall[0]:.0%} while the reward rose by {rise[0]:.2f}" if fired else ""
    return finding("reward_without_accuracy", fall, -FALL, fired, why)


def against_the_answer(history: History) -> Finding:
    """A component of the mix is paid for wrong answers; the worst of them is shown."""
    found = {name: last(history.signal(f"correlation/{name}")) for name in history.mixed}
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        return Finding("against_the_answer", False)
    name, worst = min(known.items(), key=lambda item: item[1][0] + Z * item[1][1])
    fired = worst[0] + Z * worst[1] < CORRELATION
    why = f"'{name}' correlates with right answers by {worst[0]:.2f}" if fired else ""
    return finding("against_the_answer", worst, CORRELATION, fired, why)


def region_missed(history: History) -> Finding:
    """Fewer of the right answers come with a crop that held the marked region than did in the best window."""
    shares = history.signal("region_in_crop")
    now, past = last(shares), earlier(shares)
    if now is None or not past:
        return Finding("region_missed", False)
    _, best = max(past, key=lambda window: window[1][0])
    # The best of many windows is in part the luckiest: the two intervals may not overlap, which needs up to 1.4 times Z.
    fired = now[0] < best[0] - REGION_FALL and now[0] + Z * now[1] < best[0] - Z * best[1]
    why = f"only {percent(now)} of the right answers had a crop that held the marked region, after {percent(best)}"
    return finding("region_missed", now, best[0] - REGION_FALL, fired, why)


def long_answers(history: History) -> Finding:
    lengths = history.signal("answer_tokens")
    now, first = last(lengths), mean(lengths[:WINDOW])
    if now is None or first is None or len(lengths) < 2 * WINDOW:
        return Finding("long_answers", False)
    growth = difference(now, (GROWTH * first[0], GROWTH * first[1]))
    fired = growth[0] > Z * growth[1]
    why = f"answers have {now[0]:.0f} tokens, after {first[0]:.0f} in the first {WINDOW} iterations"
    return finding("long_answers", now, GROWTH * first[0], fired, why)


def no_step(history: History) -> Finding:
    rows = history.metrics[-1].get("train/rows") if history.metrics else None
    fired = rows == 0
    why = "no group was left to learn from, and no step was taken"
    return finding("no_step", None if rows is None else (rows, 0.0), 0.0, fired, why)


ALARMS: tuple[Callable[[History], Finding], ...] = (
    tool_collapse, tool_saturation, over_turns, idle_calls, reward_without_accuracy, against_the_answer, region_missed,
    long_answers, no_step,
)  # fmt: skip


def judge(history: History) -> list[Finding]:
    """Every alarm, fired or not, in order."""
    return [alarm(history) for alarm in ALARMS]


def percent(value: Value | None) -> str:
    return "–" if value is None else f"{value[0]:.0%}"


class Stopped(RuntimeError):
    """An alarm ended the loop, as `on_alarm: stop` asks; everything of its last iteration is published."""


def watch(tracker: LoopTracker, store: Store, config: Config, step: int) -> list[Finding]:
    """Tell an iteration's figures, judge it by all that came before, and log both: `signal/…`, `watch/<name>` (0 or 1), and
    the table `alarms`, which keeps every iteration. Returns the findings, fired or not.

    It reads what the step has published, so that a loop that goes on, or is run again, finds the same.
    """
    record, mix = tracker.record, Mix.of_settings(config.mix, config.image)
    made = {reference.kind: reference for reference in record.iteration(step).artifacts.values()}
    dataset = next(reference for _, reference in record.references("dataset"))
    inputs = [store.resolve(reference) for reference in (dataset, made["rollouts"], made["scores"])]
    figures = signals(*inputs, mix)
    past = {iteration.step: iteration.metrics for iteration in record.iterations if iteration.step < step}
    history = History(
        [metrics for number, metrics in past.items() if number > 0] + [record.iteration(step).metrics | figures],
        past.get(0, {}),
        [name for name in mix.columns() if name != CONDITION],
        config.conversation.tools is None or len(config.conversation.tools) > 0,
    )
    findings = judge(history)
    rows = [row for row in record.tables.get("alarms", []) if row["step"] != step]
    rows += [{"step": step} | asdict(one) for one in findings]
    record.tables["alarms"] = sorted(rows, key=lambda row: row["step"])
    tracker.log_iteration(step, figures | {f"watch/{one.alarm}": float(one.fired) for one in findings})
    return findings


def sentence(findings: Sequence[Finding], step: int) -> str:
    """End of a loop by an alarm."""
    reasons = [f"{one.alarm}: {one.why}" for one in findings if one.fired]
    return f"Stopped after iteration {step} by an alarm ({'; '.join(reasons)}); go on with on_alarm=warn."
