"""The whole pipeline of `thinkimg/pipeline.py` as one flow.

Killed at any moment and started again, it continues: finished stages are in the store and read *Cached*.
"""

from contextlib import suppress
from pathlib import Path

import flows._environment  # noqa: F401

from prefect.runtime import flow_run

from flows import _ui
from flows._common import Iterations, Overrides, Preset, Seed, described, main, open_config
from flows._device import hold_device
from flows._flow import flow
from flows._run import PrefectRun
from thinkimg import console
from thinkimg.analysis import alarms, console_report
from thinkimg.closure import check_closure
from thinkimg.config.tree import Config
from thinkimg.importing import importing
from thinkimg.pipeline import outside_inputs, pipeline
from thinkimg.resources import Resources
from thinkimg.stages.train import train
from thinkimg.store.manifest import Artifact
from thinkimg.tracking.loop import open_loop
from thinkimg.tracking.projection import readable_mix

MixWeights = described(train.offers["mix"].type, train.offers["mix"].description)


def name_loop_run() -> str:
    """Return the name of the current run: preset, mix and seed, as in MLflow."""
    form = dict(flow_run.parameters)
    try:
        config, _ = open_config(form.pop("preset", "development"), form.pop("overrides", []), **form)
    except Exception:  # which the flow itself reports
        return "loop"
    return f"{Path(config.preset).stem} {readable_mix(config.mix)} seed={config.seed}"


@flow(name="thinkimg", flow_run_name=name_loop_run)
def loop(
    preset: Preset = "development",
    overrides: Overrides = [],
    iterations: Iterations = None,
    seed: Seed = None,
    mix: MixWeights = None,
):
    """Train for `iterations`, and return the reference of the final policy."""
    config, store = open_config(preset, overrides, iterations=iterations, seed=seed, mix=mix)
    check_closure()
    announce_disk(config)
    with (
        open_loop(config, store, outside_inputs(config)) as tracker,
        _ui.show_bar("iterations") as progress,
        Resources(config.where, console.note, hold_device) as resources,
    ):

        def report(iteration: int, artifacts: dict[str, Artifact]) -> None:
            tracker.log_iteration(iteration, artifacts=artifacts)
            console_report.print_iteration(tracker.record, iteration)
            console_report.print_training_command(artifacts, config, overrides)
            progress(iteration, config.iterations)
            findings = alarms.watch_iteration(tracker, store, config, iteration) if iteration else []
            console_report.print_alarms(findings, iteration)
            if (
                config.on_alarm == "stop"
                and iteration < config.iterations
                and any(finding.fired for finding in findings)
            ):
                console_report.print_summary(tracker.record, artifacts["train"], config)
                raise alarms.StoppedByAlarm(alarms.explain_stop(findings, iteration))

        _ui.show_link(tracker.link)
        run = PrefectRun(config, store, resources, tracker.link, report)
        last = pipeline(run, config)
        run.wait()
        _ui.show_loop(tracker.record)
        console_report.print_summary(tracker.record, last.result(), config)
    return str(last.result().reference)


def announce_disk(config: Config) -> None:
    """Say what whole models take on the disk, before the first is written; the small ones of a tiny preset aside."""
    if config.model.adaptation == "full" and config.model.tiny is None:
        with importing:
            from thinkimg.analysis import forecast

        with suppress(OSError):  # no config.json yet: the run will say so
            console.note(forecast.forecast_policies(config, forecast.base_config(config)))


if __name__ == "__main__":
    main(loop)
