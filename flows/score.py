"""score: every reward component of stored rollouts, raw and unweighted."""

from prefect import flow

from flows._common import Force, Overrides, Preset, Reference, ended, main, opened, origin
from thinkimg import console
from thinkimg.stages import score as stage


@flow(name="score")
def score(
    rollouts: Reference,
    preset: Preset = "development",
    overrides: Overrides = [],
    force: Force = False,
):
    config, store = opened(preset, overrides)
    played = store.resolve(rollouts, "rollouts")
    with console.progress("score") as progress:
        data = origin(store, played, "dataset")
        return ended(config, store, *stage.score(config, data, played, store, force=force, progress=progress))


if __name__ == "__main__":
    main(score)
