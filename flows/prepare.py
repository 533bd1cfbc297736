"""prepare: a source of questions and pictures becomes a data set."""

from flows._common import Force, Overrides, Preset, ended, main, opened
from flows._flow import flow
from flows._ui import progress
from thinkimg.stages import prepare as stage


@flow(name="prepare")
def prepare(
    preset: Preset = "development",
    overrides: Overrides = [],
    force: Force = False,
):
    """Turn a source of questions and pictures into a data set."""
    config, store = opened(preset, overrides)
    with progress("prepare") as tell:
        return ended(config, store, *stage.prepare(config, store, force=force, progress=tell))


if __name__ == "__main__":
    main(prepare)
