"""train: the mix of the scores makes advantages, and GRPO steps the next policy."""

from prefect import flow

from flows._common import Force, Optional, Overrides, Preset, Reference, ended, main, opened, origin
from thinkimg import console
from thinkimg.stages import train as stage


@flow(name="train")
def train(
    scores: Reference,
    reference: Optional = None,
    preset: Preset = "development",
    overrides: Overrides = [],
    force: Force = False,
):
    config, store = opened(preset, overrides)
    judged = store.resolve(scores, "scores")
    played = origin(store, judged, "rollouts")
    data, player = origin(store, played, "dataset"), origin(store, played, "policy")
    anchor = store.resolve(reference, "policy") if reference else None
    with console.progress("train") as progress:
        return ended(
            config,
            store,
            *stage.train(config, data, player, played, judged, store, reference=anchor, force=force, progress=progress),
        )


if __name__ == "__main__":
    main(train)
