"""Report of a loop on the console: one line per iteration as it goes, and the table of all of them."""

from rich import box
from rich.table import Table
from rich.text import Text

from thinkimg.analysis.alarms import WINDOW, Finding, Z
from thinkimg.analysis.calibrate import Place
from thinkimg.config.tree import Config
from thinkimg.console import console, say
from thinkimg.store.artifacts import Artifact
from thinkimg.tracking.loop import ui_command
from thinkimg.tracking.records import LoopRecord


def step(record: LoopRecord, number: int) -> None:
    """One line on an iteration."""
    found = record.iteration(number).metrics
    parts = [f"{name.removeprefix('reward/')} {value:.2f}" for name, value in sorted(found.items())
             if name.startswith("reward/") and name.count("/") == 1 and name != "reward/total"]  # fmt: skip
    accuracy = f"held-out accuracy {percent(found, 'eval/accuracy')} (95 %: {interval(found)})"
    seconds = sum(value for name, value in found.items() if name.startswith("time/"))
    say(f"iteration {number}: {accuracy}, {', '.join([*parts, f'{seconds:.0f} s'])}")


def final(record: LoopRecord, policy: Artifact, config: Config) -> None:
    """The table, how to open MLflow, and where the policy is."""
    console.print(table(record))
    if config.where.tracking.enabled:
        say(f"Open MLflow with: {ui_command(config.where.store, config.where.tracking)}")
    say(f"Final policy: {policy.directory / 'policy'}")


def table(record: LoopRecord) -> Table:
    """Per iteration: every reward component, tool rate, held-out accuracy with its 95 % interval, seconds per stage."""
    rows = [(iteration.step, iteration.metrics) for iteration in record.iterations]
    rewards = sorted(
        {name for _, found in rows for name in found if name.startswith("reward/") and name.count("/") == 1}
        - {"reward/teacher_fallback"}
        | {"reward/teacher_fallback" for _, found in rows if found.get("reward/teacher_fallback")}
    )
    once, again = stage_times(record)
    caption = "Mean rewards of the rollouts; held-out accuracy after the iteration (0: before training); seconds per stage (setup: of those that run once)."
    shown = Table(title=record.name, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = [name.removeprefix("reward/") for name in rewards]
    headings = ["it.", *names, "tool rate", "accuracy", "95 %", "avg@k"]
    for heading in [*headings, "setup", *(name.removeprefix("time/").removesuffix("_s") for name in again)]:
        shown.add_column(heading, justify="right", no_wrap=True)
    for number, found in rows:
        cells = [str(number), *(decimal(found, name) for name in rewards), percent(found, "eval/tool_rate")]
        cells += [percent(found, "eval/accuracy"), interval(found), percent(found, "eval/avg_at_k")]
        setup = sum(found.get(name, 0.0) for name in once)
        shown.add_row(*cells, f"{setup:.0f}" if setup else "", *(decimal(found, name, 0) for name in again))
    return shown


def stage_times(record: LoopRecord) -> tuple[list[str], list[str]]:
    """Keys of the stages' seconds, in the order of the pipeline: of those that run once, and of those of every iteration."""
    of_steps = [
        [name for name in step.metrics if name.startswith("time/") and name.count("/") == 1 and name.endswith("_s")]
        for step in record.iterations[:2]
    ]
    again = of_steps[1] if len(of_steps) > 1 else []
    return [name for name in (of_steps[0] if of_steps else []) if name not in again], again


def calibration(places: list[Place], count: int = 8) -> None:
    """The best places at which to read attention, and how to set the first."""
    shown = Table(title="Attention tells right from wrong processing", box=box.SIMPLE_HEAD, pad_edge=False,
                  caption="AUC with its 95 % interval: on the half of the pairs that chooses, and on the other half.")  # fmt: skip
    for heading in ("layer", "rows", "chosen on", "told on"):
        shown.add_column(heading, justify="right")
    for place in places[:count]:
        halves = ["{:.3f} [{:.3f}, {:.3f}]".format(*half) for half in (place.chosen_on, place.told_on)]
        shown.add_row(str(place.layer), place.rows, *halves)
    console.print(shown)
    say(f"Use it with --set image.attention.layer={places[0].layer} --set image.attention.rows={places[0].rows}")


def alarms(findings: list[Finding], step: int) -> None:
    """The table of an iteration's alarms, if any fired."""
    if not any(one.fired for one in findings):
        return
    caption = f"Means of the last {WINDOW} iterations with intervals of {Z:g} standard errors; every iteration's table is kept."
    shown = Table(title=f"Alarms of iteration {step}", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("alarm", "", "value", "interval", "limit", "why"):
        shown.add_column(heading, justify="left" if heading in ("alarm", "", "why") else "right")
    for one in findings:
        figures = [f"{value:.3g}" if value is not None else "" for value in (one.value, one.low, one.high, one.limit)]
        between = f"{figures[1]} … {figures[2]}" if one.value is not None else ""
        shown.add_row(one.alarm, "ALARM" if one.fired else "", figures[0], between, figures[3], Text(one.why))
    console.print(shown)


def decimal(found: dict[str, float], name: str, digits: int = 2) -> str:
    return f"{found[name]:.{digits}f}" if name in found else ""


def percent(found: dict[str, float], name: str) -> str:
    return f"{100 * found[name]:.0f} %" if name in found else ""


def interval(found: dict[str, float]) -> str:
    low, high = found.get("eval/accuracy_low"), found.get("eval/accuracy_high")
    return "" if low is None or high is None else f"{100 * low:.0f}–{100 * high:.0f}"
