"""train: the mix of the scores makes advantages, and GRPO steps the next policy."""

from flows._common import Force, Mix, Optional, Overrides, Preset, Reference, ended, main, opened
from flows._flow import flow
from flows._ui import progress
from thinkimg.stages import train as stage


@flow(name="train")
def train(
    scores: Reference,
    reference: Optional = None,
    preset: Preset = "development",
    overrides: Overrides = [],
    mix: Mix = None,
    force: Force = False,
):
    """Take GRPO steps from scored rollouts to the next policy."""
    config, store = opened(preset, overrides, mix=mix)
    judged = store.resolve(scores, "scores")
    played = store.origin(judged, "rollouts")
    data, player = store.origin(played, "dataset"), store.origin(played, "policy")
    anchor = store.resolve(reference, "policy") if reference else None
    with progress("train") as tell:
        return ended(
            config,
            store,
            *stage.train(config, data, player, played, judged, store, reference=anchor, force=force, progress=tell),
        )


if __name__ == "__main__":
    main(train)
