"""prepare: a source of questions and pictures becomes a data set."""

from prefect import flow

from flows._common import Force, Overrides, Preset, ended, main, opened
from thinkimg import console
from thinkimg.stages import prepare as stage


@flow(name="prepare")
def prepare(
    preset: Preset = "development",
    overrides: Overrides = [],
    force: Force = False,
):
    config, store = opened(preset, overrides)
    with console.progress("prepare") as progress:
        return ended(config, store, *stage.prepare(config, store, force=force, progress=progress))


if __name__ == "__main__":
    main(prepare)
