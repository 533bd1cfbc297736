"""warmstart: demonstrations make the first policy."""

from prefect import flow

from flows._common import Force, Overrides, Preset, Reference, ended, main, opened
from thinkimg import console
from thinkimg.stages import warmstart as stage


@flow(name="warmstart")
def warmstart(
    dataset: Reference,
    preset: Preset = "development",
    overrides: Overrides = [],
    force: Force = False,
):
    config, store = opened(preset, overrides)
    data = store.resolve(dataset, "dataset")
    with console.progress("warmstart") as progress:
        return ended(config, store, *stage.warmstart(config, data, store, force=force, progress=progress))


if __name__ == "__main__":
    main(warmstart)
