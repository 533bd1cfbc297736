"""The whole pipeline.

    prepare ──► dataset ─┬─► rollout ──► rollouts ──► score ──► scores ──► train ──► policy ─┐
                         │      ▲                    (one column per      (mix, advantages,  │
                         │      └── policy ◄──────────  reward component)  GRPO steps) ◄─────┘   × iterations
                         └─► evaluate ──► evaluation

Killed anywhere and started again it goes on: what is complete is found in the store and reads *Cached*.
"""

from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows import _ui
from flows._common import Iterations, Mix, Overrides, Preset, Seed, beside, main, opened, with_settings
from flows._flow import flow
from flows.evaluate import evaluate
from flows.prepare import prepare
from flows.rollout import rollout
from flows.score import score
from flows.train import train
from flows.warmstart import warmstart
from thinkimg import console, tracking
from thinkimg.analysis import alarms, console_report
from thinkimg.closure import check_closure
from thinkimg.resources import Machines
from thinkimg.stages.train import check_mix


@flow(name="thinkimg")
def loop(
    preset: Preset = "development",
    overrides: Overrides = [],
    iterations: Iterations = None,
    seed: Seed = None,
    mix: Mix = None,
):
    """Train for `iterations`; returns the reference of the final policy."""
    overrides = with_settings(overrides, iterations=iterations, seed=seed, mix=mix)
    config, store = opened(preset, overrides)
    settings = {"preset": preset, "overrides": overrides}
    # A sub-flow lives and dies with this flow: its own heartbeat would cost a second each time.
    with (
        Machines(config, console.say),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        tracking.open_loop(config, store) as tracker,
        _ui.bar("iterations") as progress,
    ):

        def note(step: int, **references: str) -> None:
            made = {name: store.resolve(reference) for name, reference in references.items()}
            if "demonstrations" in made.get("warmstart", made["evaluate"]).manifest["recipe"]["inputs"]:
                made["demonstrate"] = store.origin(made["warmstart"], "demonstrations")
            tracker.log_iteration(step, artifacts=made)
            for artifact in beside(store, made.values()) if step <= 1 else ():
                tracker.log_stage(artifact)
            console_report.step(tracker.record, step)
            progress(step, config.iterations)

        def watch(step: int) -> None:
            found = alarms.watch(tracker, store, config, step)
            console_report.alarms(found, step)
            if config.on_alarm == "stop" and step < config.iterations and any(one.fired for one in found):
                console_report.final(tracker.record, store.resolve(policy), config)
                raise alarms.Stopped(alarms.sentence(found, step))

        _ui.LOOP_LINK.set(tracker.link)
        _ui.show_link(tracker.link)
        check_closure()
        check_mix(config)
        ends = config.evaluate.samples_ends
        dataset = prepare(**settings)
        policy = first = warmstart(dataset, **settings)
        note(0, prepare=dataset, warmstart=policy, evaluate=evaluate(policy, samples=ends, **settings))
        for iteration in range(1, config.iterations + 1):
            rollouts = rollout(policy, iteration=iteration, **settings)
            scores = score(rollouts, **settings)
            policy = train(scores, reference=first, **settings)
            last = iteration == config.iterations
            evaluation = evaluate(policy, samples=ends if last else config.evaluate.samples, **settings)
            note(iteration, rollout=rollouts, score=scores, train=policy, evaluate=evaluation)
            watch(iteration)
        _ui.show_loop(tracker.record)
        console_report.final(tracker.record, store.resolve(policy), config)
    return policy


if __name__ == "__main__":
    main(loop)
