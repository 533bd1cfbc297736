"""score: every reward component of stored rollouts, raw and unweighted."""

from flows._common import Force, Overrides, Preset, Reference, ended, main, opened
from flows._flow import flow
from flows._runner import mapper
from flows._ui import progress
from thinkimg.stages import score as stage


@flow(name="score")
def score(
    rollouts: Reference,
    preset: Preset = "development",
    overrides: Overrides = [],
    force: Force = False,
):
    """Score stored rollouts: one raw column per reward component."""
    config, store = opened(preset, overrides)
    played = store.resolve(rollouts, "rollouts")
    data = store.origin(played, "dataset")
    with progress("score") as tell, mapper(config.where) as run:
        return ended(config, store, *stage.score(config, data, played, store, force=force, progress=tell, mapper=run))


if __name__ == "__main__":
    main(score)
