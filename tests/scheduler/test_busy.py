"""How well the pipeline's order keeps engine and trainer busy: the real pipeline with recorded durations, no clock."""

from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from thinkimg.config.load import load_config
from thinkimg.pipeline import pipeline
from thinkimg.scheduler import Scheduler, Task


@dataclass(frozen=True)
class Durations:
    """Seconds of a stage's work on each resource, alone on it."""

    rollout: float
    judges: float
    """On the engine: of the judges that ask it, while the rollouts are played."""
    attention: float
    """On the trainer."""
    train: float
    evaluate: float
    rules: float
    """On neither."""

    def of(self, task: Task) -> float:
        if task.early:
            return self.judges
        seconds = {"rollout": self.rollout, "train": self.train, "evaluate": self.evaluate}
        return (
            self.attention + self.rules
            if task.handle.stage.label == "score"
            else seconds.get(task.handle.stage.label, 1)
        )


DEMO = Durations(rollout=11.0, judges=2.0, attention=1.0, train=2.0, evaluate=11.0, rules=0.5)
"""Of `make demo` on 154db0b: its rollouts and their judges took 13 s together, which was divided by eye."""
ESTIMATE_7B = Durations(rollout=110.0, judges=15.0, attention=12.0, train=200.0, evaluate=40.0, rules=1.0)
"""64 groups of 8 on an H100: counts of operations and published rates, not a measurement."""


@dataclass
class Simulation:
    """Run of a pipeline in which the tasks on the engine share it."""

    scheduler: Scheduler
    durations: Durations
    now: float = 0.0
    left: dict[Task, float] = field(default_factory=dict)
    """Work under way: seconds that it would take alone."""
    busy: dict[str, float] = field(default_factory=lambda: {"engine": 0.0, "trainer": 0.0})
    trained: list[float] = field(default_factory=list)

    def run(self) -> None:
        while ready := self.scheduler._ready(list(self.left)) or self.left:
            for task in ready if ready is not self.left else ():
                if task.handle.stage.early and not task.early:
                    assert task.handle.early.done(), "it does what its early part has left"
                future: Future = Future()
                setattr(task.handle, "early" if task.early else "future", future)
                self.left[task] = self.durations.of(task)
            if ready is self.left:
                self.step()

    def step(self) -> None:
        """Go on to the next end."""
        config, sharing = self.scheduler.config, [task for task in self.left if self.uses(task, "engine")]
        rate = {task: 1 / len(sharing) if task in sharing and self.works(task) else 1.0 for task in self.left}
        active = {task: seconds / rate[task] for task, seconds in self.left.items() if self.works(task)}
        task, seconds = min(active.items(), key=lambda item: item[1])
        for name in self.busy:
            if any(name in other.uses(config) and self.works(other) for other in self.left):
                self.busy[name] += seconds
        for other in active:
            self.left[other] -= seconds * rate[other]
        self.now += seconds
        del self.left[task]
        (task.handle.early if task.early else task.handle.future).set_result(frozenset())
        if task.handle.stage.label == "train":
            self.trained.append(self.now)

    def uses(self, task: Task, resource: str) -> bool:
        return resource in task.uses(self.scheduler.config) and self.works(task)

    def works(self, task: Task) -> bool:
        """The judges have their last pictures when the rollouts have ended; their work is counted after them."""
        return not task.early or task.handle.followed.done


def simulate(durations: Durations, lag: int) -> Simulation:
    overrides = ["iterations=12", f"loop.lag={lag}", "evaluate.every=1"]
    scheduler = Scheduler(load_config("tiny", overrides), lambda handle: None)
    pipeline(scheduler, scheduler.config)
    simulation = Simulation(scheduler, durations)
    simulation.run()
    assert all(handle.done for handle in scheduler.handles)
    return simulation


def per_iteration(simulation: Simulation) -> float:
    """Seconds between the steps, in the middle of the run."""
    return (simulation.trained[9] - simulation.trained[3]) / 6


@pytest.mark.parametrize("durations", [DEMO, ESTIMATE_7B], ids=["demo", "7B, estimated"])
def test_with_a_lag_the_busier_of_both_sets_the_pace(durations):
    engine = durations.rollout + durations.judges + durations.evaluate
    trainer = durations.train + durations.attention
    assert per_iteration(simulate(durations, lag=1)) <= 1.1 * max(engine, trainer)
    alone = engine + trainer - durations.evaluate  # evaluation and the next rollouts share the engine's policy
    assert per_iteration(simulate(durations, lag=0)) >= 0.95 * alone


@pytest.mark.parametrize("train", [1, 5, 10, 14, 20, 60])
def test_whatever_the_balance(train):
    durations = Durations(rollout=7, judges=3, attention=1.5, train=train, evaluate=4, rules=0.5)
    pace = per_iteration(simulate(durations, lag=1))
    assert pace <= 1.1 * max(14.0, train + 1.5), pace
