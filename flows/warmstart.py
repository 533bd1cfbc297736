"""warmstart: demonstrations make the first policy, and known pairs the small CLIP where the image reward asks for one."""

from prefect import flow

from flows._common import Force, Overrides, Preset, Reference, ended, main, opened
from thinkimg import console
from thinkimg.stages import clip
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
    if clip.wanted(config):
        with console.progress("clip") as progress:
            clip.train_clip(config, store, progress=progress)
    with console.progress("warmstart") as progress:
        return ended(config, store, *stage.warmstart(config, data, store, force=force, progress=progress))


if __name__ == "__main__":
    main(warmstart)
