"""evaluate: held-out accuracy of a policy."""

from prefect import flow

from flows._common import Force, Optional, Overrides, Preset, Reference, ended, main, opened, origin
from thinkimg import console
from thinkimg.stages import evaluate as stage


@flow(name="evaluate")
def evaluate(
    policy: Reference,
    dataset: Optional = None,
    samples: int | None = None,
    blind: bool = False,
    preset: Preset = "development",
    overrides: Overrides = [],
    force: Force = False,
):
    config, store = opened(preset, overrides)
    player = store.resolve(policy, "policy")
    data = store.resolve(dataset, "dataset") if dataset else origin(store, player, "dataset")
    with console.progress("evaluate") as progress:
        return ended(
            config,
            store,
            *stage.evaluate(config, data, player, store, samples=samples, blind=blind, force=force, progress=progress),
        )


if __name__ == "__main__":
    main(evaluate)
