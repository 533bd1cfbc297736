"""The whole pipeline, as `thinkimg/pipeline.py` has it, on Prefect.

Killed anywhere and started again it goes on: what is complete is found in the store and reads *Cached*.
"""

from flows import _ui
from flows._common import Iterations, Overrides, Preset, Seed, described, main, open_config
from flows._device import device
from flows._flow import flow
from flows._run import PrefectRun
from thinkimg import console
from thinkimg.analysis import alarms, console_report
from thinkimg.closure import check_closure
from thinkimg.pipeline import pipeline
from thinkimg.resources import Resources
from thinkimg.stages.train import train
from thinkimg.store.artifacts import Artifact
from thinkimg.tracking.loop import open_loop

Mix = described(train.offers["mix"].type, train.offers["mix"].description)


@flow(name="thinkimg")
def loop(
    preset: Preset = "development",
    overrides: Overrides = [],
    iterations: Iterations = None,
    seed: Seed = None,
    mix: Mix = None,
):
    """Train for `iterations`; returns the reference of the final policy."""
    config, store = open_config(preset, overrides, iterations=iterations, seed=seed, mix=mix)
    check_closure()
    with (
        open_loop(config, store) as tracker,
        _ui.bar("iterations") as progress,
        Resources(config.where, console.say, device) as resources,
    ):

        def report(iteration: int, made: dict[str, Artifact]) -> None:
            tracker.log_iteration(iteration, artifacts=made)
            console_report.step(tracker.record, iteration)
            progress(iteration, config.iterations)
            findings = alarms.watch(tracker, store, config, iteration) if iteration else []
            console_report.alarms(findings, iteration)
            if config.on_alarm == "stop" and iteration < config.iterations and any(one.fired for one in findings):
                console_report.final(tracker.record, made["train"], config)
                raise alarms.Stopped(alarms.sentence(findings, iteration))

        _ui.show_link(tracker.link)
        run = PrefectRun(config, store, resources, tracker.link, report)
        last = pipeline(run, config)
        run.wait()
        _ui.show_loop(tracker.record)
        console_report.final(tracker.record, last.result(), config)
    return str(last.result().reference)


if __name__ == "__main__":
    main(loop)
