"""Alarms: signs in the figures of a loop's iterations that it learns something else than it should.

One iteration is a small sample: with 48 groups of 8 the tool rate has a standard error of 0.03, and an accuracy over
100 questions one of 0.05. The alarms look at hundreds of iterations. So each takes the mean of the last WINDOW
iterations, and fires where its whole interval of Z standard errors is beyond the limit. `unjudged`,
`effective_sample` and `no_step` need no interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from thinkimg.analysis.figures import Estimate, compute_signals, estimate_accuracy
from thinkimg.config.tree import Config
from thinkimg.rewards.mix import CONDITION, Mix
from thinkimg.store.artifacts import Store
from thinkimg.tracking.loop import LoopTracker

WINDOW = 3
"""Iterations of one mean: one bad sample is no trend, and three iterations are still cheap to lose."""
Z = 3.0
"""Standard errors: one in 740 by chance on one side, so that a loop of 200 iterations stays quiet most of the time."""
TOOL_FLOOR = 0.1
"""Tool rate below which a group of eight rarely holds a conversation to learn tool use from."""
COLLAPSE = 0.5
"""Tool rate over its best so far: a skill that fluctuates does not lose half of it."""
SATURATED = 0.97
"""Tool rate above which groups have nothing left to compare. By itself this is fine: see tool_saturation."""
SATURATED_FOR = 5
"""Iterations at SATURATED without a gain in accuracy: by then better tool use should show in the answers."""
GAIN = 1.0
"""Standard errors of accuracy that count as a gain there; fewer than Z, since a slow gain is no reason for an alarm."""
OVER_TURNS = 0.2
"""Share of rows that are left out of the loss and of their groups: beyond a fifth, the rest is a selection."""
FAILED = 0.05
"""Share of conversations that failed: none should, and those that did are no random part."""
IDLE_CALLS = 0.3
"""Share of calls that bring nothing new. The tool reward does not pay for them: so many are a habit without a cost."""
FALL = 0.05
"""Fall of held-out accuracy: less may be a change of samples."""
CORRELATION = -0.1
"""Correlation within groups of a component with the answer's reward: below it the component pays for wrong answers."""
REGION_FALL = 0.1
"""Fall of the share of right answers whose crop held the marked region: the others guessed, or read without looking."""
EFFECTIVE = 0.5
"""Effective share of the sample: below it, half of what the rollouts cost is lost."""
GROWTH = 2.0
"""Length of answers over that of the first WINDOW iterations."""


@dataclass(frozen=True)
class Finding:
    """Verdict of one alarm at one iteration."""

    alarm: str
    fired: bool
    value: float | None = None
    """The figure over the window; None, like its interval, where it is not available."""
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    why: str = ""
    """One sentence if the alarm fired."""


@dataclass(frozen=True)
class History:
    """Figures of a loop so far, as its record has them."""

    metrics: Sequence[Mapping[str, float]]
    """Metrics of each iteration from 1, in order."""
    before: Mapping[str, float] = field(default_factory=dict)
    """Metrics of step 0."""
    mixed: Sequence[str] = ()
    """Components with a weight in the mix."""
    tools: bool = True
    """True if any tool is on offer."""

    def signal(self, name: str) -> list[Estimate | None]:
        """Return `signal/<name>` of each iteration."""
        value, error = f"signal/{name}", f"signal/{name}_se"
        return [(step[value], step[error]) if value in step and error in step else None for step in self.metrics]

    def accuracies(self) -> list[Estimate | None]:
        """Return the held-out accuracy of each iteration that was evaluated (`evaluate.every`)."""
        return [estimate_accuracy(metrics) for metrics in self.metrics if is_evaluated(metrics)]


def is_evaluated(metrics: Mapping[str, float]) -> bool:
    return "eval/accuracy" in metrics


def window_mean(values: Sequence[Estimate | None], size: int = WINDOW) -> Estimate | None:
    """Return the mean of `size` values; None unless all of them are available."""
    if len(values) != size or any(value is None for value in values):
        return None
    return sum(value for value, _ in values) / size, math.sqrt(sum(error**2 for _, error in values)) / size


def last_window(values: Sequence[Estimate | None], size: int = WINDOW) -> Estimate | None:
    return window_mean(values[-size:], size)


def earlier_windows(values: Sequence[Estimate | None]) -> list[tuple[int, Estimate]]:
    """Return (first index, mean) of every window that does not overlap the last one."""
    means = [(start, window_mean(values[start : start + WINDOW])) for start in range(len(values) - 2 * WINDOW + 1)]
    return [(start, mean) for start, mean in means if mean is not None]


def subtract(first: Estimate, second: Estimate) -> Estimate:
    """Return the difference of two independent estimates."""
    return first[0] - second[0], math.hypot(first[1], second[1])


def clearly_below(now: Estimate, best: Estimate, fall: float) -> bool:
    """Tell whether `now` is more than `fall` below the best window, and the two intervals do not overlap.

    The best of many windows is in part the luckiest; intervals that may not overlap ask for up to 1.4 times Z.
    """
    return now[0] < best[0] - fall and now[0] + Z * now[1] < best[0] - Z * best[1]


def make_finding(alarm: str, value: Estimate | None, limit: float | None, fired: bool, why: str) -> Finding:
    if value is None:
        return Finding(alarm, False)
    low, high = value[0] - Z * value[1], value[0] + Z * value[1]
    return Finding(alarm, bool(fired), value[0], low, high, limit, why if fired else "")


def tool_collapse(history: History) -> Finding:
    """The tool rate is below TOOL_FLOOR, or below half of the lower end of its best window."""
    rates = history.signal("tool_rate")
    now = last_window(rates) if history.tools else None
    best = max((value - Z * error for _, (value, error) in earlier_windows(rates)), default=0.0)
    limit = max(TOOL_FLOOR, COLLAPSE * best)
    fired = now is not None and now[0] + Z * now[1] < limit
    why = f"tools were used in {_percent(now)} of the conversations, less than {limit:.0%}"
    return make_finding("tool_collapse", now, limit, fired, why)


def tool_saturation(history: History) -> Finding:
    """Nearly all conversations use a tool for SATURATED_FOR iterations, and accuracy is not above that before training.

    Then tool use is a ritual that the tool reward pays for.
    """
    rates, accuracies, start = history.signal("tool_rate"), history.accuracies(), estimate_accuracy(history.before)
    now = last_window(rates, SATURATED_FOR) if history.tools else None
    reached = last_window(accuracies, SATURATED_FOR)
    fired = False
    if now and reached and start and rates[0]:
        risen = subtract(now, rates[0])
        # Every iteration asks the same questions: a mean over iterations is no more precise than one of them.
        gain = subtract((reached[0], min(value[1] for value in accuracies[-SATURATED_FOR:])), start)
        fired = now[0] - Z * now[1] > SATURATED and risen[0] > Z * risen[1] and gain[0] < GAIN * gain[1]
    why = f"tools are used in {_percent(now)} of the conversations, and accuracy has not gained"
    return make_finding("tool_saturation", now, SATURATED, fired, why)


def share_alarm(history: History, name: str, limit: float, what: str) -> Finding:
    """Return the finding of an alarm for a share that is above its limit."""
    now = last_window(history.signal(name))
    fired = now is not None and now[0] - Z * now[1] > limit
    return make_finding(name, now, limit, fired, f"{_percent(now)} of the {what}")


def failed(history: History) -> Finding:
    """Too many conversations failed: by the engine, a tool, or the limits of a conversation."""
    return share_alarm(history, "failed", FAILED, "conversations failed")


def unjudged(history: History) -> Finding:
    """Too many questions of the evaluations have no verdict: accuracy is that of the others."""
    evaluated = [step for step in history.metrics if is_evaluated(step) and "eval/judged" in step]
    now = last_window([(1 - step["eval/judged"] / step["eval/trajectories"], 0.0) for step in evaluated])
    fired = now is not None and now[0] > FAILED
    return make_finding("unjudged", now, FAILED, fired, f"{_percent(now)} of the held-out questions have no verdict")


def over_turns(history: History) -> Finding:
    """Too many conversations ran out of turns or tokens."""
    return share_alarm(history, "over_turns", OVER_TURNS, "conversations ran out of turns or tokens")


def idle_calls(history: History) -> Finding:
    """Too many tool calls brought nothing new."""
    return share_alarm(history, "idle_calls", IDLE_CALLS, "tool calls brought nothing new")


def reward_without_accuracy(history: History) -> Finding:
    """Held-out accuracy has fallen from its best window while the reward of the rollouts rose."""
    accuracies, totals = history.accuracies(), history.signal("total")
    now, reward, past = last_window(accuracies), last_window(totals), earlier_windows(accuracies)
    if now is None or reward is None or not past:
        return Finding("reward_without_accuracy", False)
    start, best = max(past, key=lambda window: window[1][0])
    beside = [total for total, metrics in zip(totals, history.metrics, strict=True) if is_evaluated(metrics)]
    fall, before = subtract(now, best), window_mean(beside[start : start + WINDOW])
    rise = subtract(reward, before) if before else (0.0, 0.0)
    fired = clearly_below(now, best, FALL) and rise[0] > Z * rise[1]  # rising alone is what a loop is for
    why = f"held-out accuracy fell by {-fall[0]:.0%} while the reward rose by {rise[0]:.2f}"
    return make_finding("reward_without_accuracy", fall, -FALL, fired, why)


def against_the_answer(history: History) -> Finding:
    """A component of the mix pays for wrong answers; the finding shows the worst component."""
    means = {name: last_window(history.signal(f"correlation/{name}")) for name in history.mixed}
    available = {name: mean for name, mean in means.items() if mean is not None}
    if not available:
        return Finding("against_the_answer", False)
    name, worst = min(available.items(), key=lambda item: item[1][0] + Z * item[1][1])
    fired = worst[0] + Z * worst[1] < CORRELATION
    why = f"'{name}' correlates with right answers by {worst[0]:.2f}"
    return make_finding("against_the_answer", worst, CORRELATION, fired, why)


def region_missed(history: History) -> Finding:
    """The share of right answers with a crop that held the marked region has fallen from its best window."""
    shares = history.signal("region_in_crop")
    now, past = last_window(shares), earlier_windows(shares)
    if now is None or not past:
        return Finding("region_missed", False)
    _, best = max(past, key=lambda window: window[1][0])
    why = f"only {_percent(now)} of the right answers had a crop that held the marked region, after {_percent(best)}"
    return make_finding("region_missed", now, best[0] - REGION_FALL, clearly_below(now, best, REGION_FALL), why)


def long_answers(history: History) -> Finding:
    """Answers are GROWTH times as long as in the first WINDOW iterations."""
    lengths = history.signal("answer_tokens")
    now, first = last_window(lengths), window_mean(lengths[:WINDOW])
    if now is None or first is None or len(lengths) < 2 * WINDOW:
        return Finding("long_answers", False)
    growth = subtract(now, (GROWTH * first[0], GROWTH * first[1]))
    fired = growth[0] > Z * growth[1]
    why = f"answers have {now[0]:.0f} tokens, after {first[0]:.0f} in the first {WINDOW} iterations"
    return make_finding("long_answers", now, GROWTH * first[0], fired, why)


def effective_sample(history: History) -> Finding:
    """The correction for engine and trainer leaves too little of the sample: weights of 0, or few that outweigh all."""
    name = "train/sampling/effective_sample"
    now = last_window([(step[name], 0.0) if name in step else None for step in history.metrics])
    fired = now is not None and now[0] < EFFECTIVE
    why = f"the correction leaves {_percent(now)} of the sample: see train.loss.vllm_importance_sampling_mode"
    return make_finding("effective_sample", now, EFFECTIVE, fired, why)


def no_step(history: History) -> Finding:
    """No group of the iteration had different rewards."""
    rows = history.metrics[-1].get("train/rows") if history.metrics else None
    why = "no group had different rewards, so no training step was taken"
    return make_finding("no_step", None if rows is None else (rows, 0.0), 0.0, rows == 0, why)


ALARMS: tuple[Callable[[History], Finding], ...] = (
    tool_collapse,
    tool_saturation,
    failed,
    unjudged,
    over_turns,
    idle_calls,
    reward_without_accuracy,
    against_the_answer,
    region_missed,
    long_answers,
    effective_sample,
    no_step,
)


def check_alarms(history: History) -> list[Finding]:
    """Return the finding of every alarm, fired or not, in order."""
    return [alarm(history) for alarm in ALARMS]


def _percent(value: Estimate | None) -> str:
    return "–" if value is None else f"{value[0]:.0%}"


class StoppedByAlarm(RuntimeError):
    """End of a loop by an alarm, as `on_alarm: stop` asks; all of its last iteration is published."""


def watch_iteration(tracker: LoopTracker, store: Store, config: Config, step: int) -> list[Finding]:
    """Compute an iteration's figures, check the alarms, log both, and return the findings.

    Logged are `signal/…`, `watch/<alarm>` (0 or 1), and the table `alarms`, which keeps every iteration. All is read
    from published artifacts: a loop that is continued or run again gets the same.
    """
    record, mix = tracker.record, Mix.from_config(config.mix, config.image)
    references = {reference.kind: reference for reference in record.iteration(step).artifacts.values()}
    dataset = next(reference for _, reference in record.references("dataset"))
    inputs = [store.resolve(reference) for reference in (dataset, references["rollouts"], references["scores"])]
    figures = compute_signals(*inputs, mix)
    past = {iteration.step: iteration.metrics for iteration in record.iterations if iteration.step < step}
    history = History(
        [metrics for number, metrics in past.items() if number > 0] + [record.iteration(step).metrics | figures],
        past.get(0, {}),
        [name for name in mix.columns() if name != CONDITION],
        config.conversation.tools is None or len(config.conversation.tools) > 0,
    )
    findings = check_alarms(history)
    rows = [row for row in record.tables.get("alarms", []) if row["step"] != step]
    rows += [{"step": step} | asdict(finding) for finding in findings]
    record.tables["alarms"] = sorted(rows, key=lambda row: row["step"])
    fired = {f"watch/{finding.alarm}": float(finding.fired) for finding in findings}
    tracker.log_iteration(step, figures | fired)
    return findings


def explain_stop(findings: Sequence[Finding], step: int) -> str:
    """Return the message of a loop that an alarm ends."""
    reasons = [f"{finding.alarm}: {finding.why}" for finding in findings if finding.fired]
    return f"Stopped after iteration {step} by an alarm ({'; '.join(reasons)}). To continue, set on_alarm=warn."
