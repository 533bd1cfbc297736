"""warmstart: demonstrations make the first policy, and known pairs the small CLIP where the image reward asks for one."""

from flows._common import Force, Overrides, Preset, Reference, ended, main, opened
from flows._flow import flow
from flows._ui import progress
from thinkimg.stages import clip
from thinkimg.stages import warmstart as stage


@flow(name="warmstart")
def warmstart(
    dataset: Reference,
    preset: Preset = "development",
    overrides: Overrides = [],
    force: Force = False,
):
    """Make the first policy from demonstrations, a checkpoint, or the base model as it is."""
    config, store = opened(preset, overrides)
    data = store.resolve(dataset, "dataset")
    if clip.wanted(config):
        with progress("clip") as tell:
            clip.train_clip(config, store, progress=tell)
    with progress("warmstart") as tell:
        return ended(config, store, *stage.warmstart(config, data, store, force=force, progress=tell))


if __name__ == "__main__":
    main(warmstart)
