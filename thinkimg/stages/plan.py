"""What a loop would do: the stages in order, and which of them the store holds already."""

from collections.abc import Iterator

from thinkimg.config import Config
from thinkimg.stages import clip, evaluate, pairs, prepare, rollout, score, train, warmstart
from thinkimg.store.artifacts import Artifact, Recipe, Store


def planned(config: Config) -> Iterator[str]:
    """One line per stage, up to the first that is missing: the fingerprints of all later ones depend on its content."""
    store = Store(config.where.store)

    def find(kind: str, recipe: Recipe, label: str) -> tuple[Artifact | None, str]:
        found = store.find(kind, recipe.fingerprint)
        return found, f"{label:<14} {'Cached ' if found else 'missing'} {kind}/{recipe.fingerprint[:12]}"

    dataset, line = find("dataset", prepare.recipe(config, prepare.source_of(config)), "prepare")
    yield line
    if dataset is None:
        return
    demonstrations = None
    if warmstart.has_script(config):
        known = None
        if warmstart.has_pairs(config):
            known, line = find("pairs", pairs.recipe(config, dataset, "train", config.warmstart.pairs), "pairs")
            yield line
            if known is None:
                return
        demonstrations, line = find("demonstrations", warmstart.script_recipe(config, dataset, known), "demonstrate")
        yield line
        if demonstrations is None:
            return
    policy, line = find("policy", warmstart.recipe(config, dataset, demonstrations), "warmstart")
    yield line
    small_clip = None
    if clip.wanted(config) and policy is not None:
        shown = dataset
        if config.data.source != "puzzles":
            puzzles = pairs.puzzles(config)
            shown, line = find("dataset", prepare.recipe(puzzles, None), "puzzles")
        if shown is not None:
            count = config.warmstart.pairs or clip.PAIRS
            known, line = find("pairs", pairs.recipe(config, shown, "train", count), "pairs")
            if known is not None:
                small_clip, line = find("clip", clip.recipe(config, known), "clip")
        yield line
        if small_clip is None:
            return
    first = policy
    ends = config.evaluate.samples_ends
    for iteration in range(config.iterations + 1):
        if policy is None:
            return
        count = ends if iteration in (0, config.iterations) else config.evaluate.samples
        if iteration:
            rollouts, line = find(
                "rollouts", rollout.recipe(config, dataset, policy, iteration), f"rollout {iteration}"
            )
            yield line
            if rollouts is None:
                return
            bench = score.bench_of(config, dataset, rollouts, store, None, small_clip)
            scores, line = find("scores", score.recipe(config, dataset, rollouts, bench), f"score {iteration}")
            yield line
            if scores is None:
                return
            reference = train.reference_of(config, first)
            recipe = train.recipe(config, dataset, policy, rollouts, scores, reference)
            policy, line = find("policy", recipe, f"train {iteration}")
            yield line
            if policy is None:
                return
        yield find("evaluation", evaluate.recipe(config, dataset, policy, count, blind=False), f"evaluate {iteration}")[
            1
        ]
