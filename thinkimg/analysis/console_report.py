"""Console report of a loop: a line per iteration as it ends, its alarms, and the table of all iterations."""

import shlex
from collections.abc import Iterable, Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from thinkimg.analysis.alarms import WINDOW, Finding, Z
from thinkimg.analysis.calibrate import LayerAuc
from thinkimg.config.tree import Config
from thinkimg.console import console, say
from thinkimg.stages.evaluate import describe_accuracy
from thinkimg.store.manifest import Artifact
from thinkimg.tracking.loop import ui_command
from thinkimg.tracking.records import LoopRecord

TOTAL, FALLBACK = "reward/total", "reward/teacher_fallback"


def print_iteration(record: LoopRecord, number: int) -> None:
    """Print one line: held-out accuracy, failed conversations, mean rewards, seconds."""
    metrics = record.iteration(number).metrics
    rewards = [f"{name.removeprefix('reward/')} {metrics[name]:.2f}" for name in reward_keys(metrics) if name != TOTAL]
    accuracy = describe_accuracy({name.removeprefix("eval/"): value for name, value in metrics.items()})
    seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
    say(f"iteration {number}: {accuracy}, {', '.join([*rewards, f'{seconds:.0f} s'])}")


def print_training_command(artifacts: Mapping[str, Artifact], config: Config, overrides: Iterable[str]) -> None:
    """Print the command that trains on an iteration's scores again, where these do not tell the policy: with a lag."""
    if config.loop.lag and "score" in artifacts:
        policy = artifacts["train"].inputs["policy"]
        words = ["thinkimg", "train", "--scores", artifacts["score"].short, "--policy", str(policy.fingerprint)[:12]]
        words += ["--preset", config.preset, *(word for text in overrides for word in ("--set", text))]
        say(f"its training alone: {shlex.join(words)}")


def reward_keys(names: Iterable[str]) -> list[str]:
    """Return those of mean rewards, sorted."""
    return sorted({name for name in names if name.startswith("reward/") and name.count("/") == 1})


def print_summary(record: LoopRecord, policy: Artifact, config: Config) -> None:
    """Print the table of all iterations, the command that opens MLflow, and the policy's path."""
    console.print(iterations_table(record))
    if config.where.tracking.enabled:
        say(f"Open MLflow with: {ui_command(config.where.store, config.where.tracking)}")
    say(f"Final policy: {policy.directory / 'policy'}")


def iterations_table(record: LoopRecord) -> Table:
    """Return, per iteration: mean rewards, tool rate, held-out accuracy with its 95 % interval, seconds per stage."""
    rows = [(iteration.step, iteration.metrics) for iteration in record.iterations]
    rewards = reward_keys(name for _, metrics in rows for name in metrics if name != FALLBACK or metrics[name])
    once, again = stage_times(record)
    caption = (
        "Mean rewards of the rollouts; held-out accuracy after the iteration (0: before training); "
        "seconds per stage (setup: stages that run once)."
    )
    table = Table(title=record.name, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = [name.removeprefix("reward/") for name in rewards]
    headings = ["it.", *names, "tool rate", "accuracy", "95 %", "avg@k"]
    for heading in [*headings, "setup", *(name.removeprefix("time/").removesuffix("_s") for name in again)]:
        table.add_column(heading, justify="right", no_wrap=True)
    for number, metrics in rows:
        cells = [str(number), *(decimal(metrics, name) for name in rewards), percent(metrics, "eval/tool_rate")]
        cells += [percent(metrics, "eval/accuracy"), interval(metrics), percent(metrics, "eval/avg_at_k")]
        setup = sum(metrics.get(name, 0.0) for name in once)
        table.add_row(*cells, f"{setup:.0f}" if setup else "", *(decimal(metrics, name, 0) for name in again))
    return table


def stage_times(record: LoopRecord) -> tuple[list[str], list[str]]:
    """Return the keys of the stages' seconds, in pipeline order: of those that run once, and of the others."""
    of_steps = [
        [name for name in step.metrics if name.startswith("time/") and name.count("/") == 1 and name.endswith("_s")]
        for step in record.iterations[:2]
    ]
    once, again = (*of_steps, [], [])[:2]
    return [name for name in once if name not in again], again


def print_calibration(results: list[LayerAuc], count: int = 8) -> None:
    """Print the best layers and query rows of the attention judge, and the settings that choose the first."""
    caption = "AUC with its 95 % interval: on the half of the pairs that selects, and on the other half."
    caption += f" The best {count} of {len(results)}." if len(results) > count else ""
    title = "Attention on right against wrong processing"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("layer", "rows", "selection half", "test half"):
        table.add_column(heading, justify="right")
    for result in results[:count]:
        halves = ["{:.3f} [{:.3f}, {:.3f}]".format(*half) for half in (result.selection, result.test)]
        table.add_row(str(result.layer), result.rows, *halves)
    console.print(table)
    say(f"Use it with --set image.attention.layer={results[0].layer} --set image.attention.rows={results[0].rows}")


def print_alarms(findings: list[Finding], step: int) -> None:
    """Print the table of an iteration's alarms, if any fired."""
    if not any(finding.fired for finding in findings):
        return
    caption = f"Means of the last {WINDOW} iterations ± {Z:g} standard errors; alarms without data are left out."
    table = Table(title=f"Alarms of iteration {step}", caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("alarm", "", "value", "interval", "limit", "why"):
        table.add_column(heading, justify="left" if heading in ("alarm", "", "why") else "right")
    for finding in findings:
        if finding.value is not None:
            figures = (finding.value, finding.low, finding.high, finding.limit)
            value, low, high, limit = (f"{figure:.3g}" for figure in figures)
            fired = "ALARM" if finding.fired else ""
            table.add_row(finding.alarm, fired, value, f"{low} … {high}", limit, Text(finding.why))
    console.print(table)


def decimal(metrics: Mapping[str, float], name: str, digits: int = 2) -> str:
    return f"{metrics[name]:.{digits}f}" if name in metrics else ""


def percent(metrics: Mapping[str, float], name: str) -> str:
    return f"{100 * metrics[name]:.0f} %" if name in metrics else ""


def interval(metrics: Mapping[str, float]) -> str:
    low, high = metrics.get("eval/accuracy_low"), metrics.get("eval/accuracy_high")
    return "" if low is None or high is None else f"{100 * low:.0f}–{100 * high:.0f}"
