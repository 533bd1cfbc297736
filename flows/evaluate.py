"""evaluate: held-out accuracy of a policy."""

from flows._common import (
    Blind,
    Force,
    Optional,
    Overrides,
    Preset,
    Reference,
    Samples,
    ended,
    main,
    opened,
)
from flows._flow import flow
from flows._ui import progress
from thinkimg.stages import evaluate as stage


@flow(name="evaluate")
def evaluate(
    policy: Reference,
    dataset: Optional = None,
    samples: Samples = None,
    blind: Blind = False,
    preset: Preset = "development",
    overrides: Overrides = [],
    force: Force = False,
):
    """Measure held-out accuracy of a policy, greedy and sampled."""
    config, store = opened(preset, overrides)
    player = store.resolve(policy, "policy")
    data = store.resolve(dataset, "dataset") if dataset else store.origin(player, "dataset")
    with progress("evaluate") as tell:
        return ended(
            config,
            store,
            *stage.evaluate(config, data, player, store, samples=samples, blind=blind, force=force, progress=tell),
        )


if __name__ == "__main__":
    main(evaluate)
