"""rollout: a policy plays this iteration's samples."""

from flows._common import Force, Iteration, Optional, Overrides, Preset, Reference, ended, main, opened
from flows._flow import flow
from flows._ui import progress
from thinkimg.stages import rollout as stage


@flow(name="rollout")
def rollout(
    policy: Reference,
    dataset: Optional = None,
    iteration: Iteration = 1,
    preset: Preset = "development",
    overrides: Overrides = [],
    force: Force = False,
):
    """Let a policy play an iteration's samples."""
    config, store = opened(preset, overrides)
    player = store.resolve(policy, "policy")
    data = store.resolve(dataset, "dataset") if dataset else store.origin(player, "dataset")
    with progress(f"rollout {iteration}") as tell:
        return ended(
            config,
            store,
            *stage.rollout(config, data, player, store, iteration=iteration, force=force, progress=tell),
        )


if __name__ == "__main__":
    main(rollout)
