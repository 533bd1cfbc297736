"""Registry of reward components by name: rules, judges, and a user's own functions."""

from collections.abc import Callable
from functools import partial

from thinkimg.errors import UserError
from thinkimg.registry import short_name
from thinkimg.rewards import functions
from thinkimg.rewards.batch import Batch, Score
from thinkimg.rewards.judge import load_judges
from thinkimg.rewards.settings import JUDGES, RULES, ImageConfig, RewardsConfig
from thinkimg.rewards.user_function import load_function

Component = Callable[[Batch], list[Score]]

RESERVED = ("trajectory_id", "sample_id", "group_id", "total", "image", "teacher_fallback")
"""Names with another meaning where scores are stored or shown."""


def load_components(rewards: RewardsConfig, image: ImageConfig | None) -> dict[str, Component]:
    """Return all components by name. Raises UserError for one that can't be loaded, or whose name is taken.

    First come those of this package in alphabetical order (of the judges those of image.types), then the user's rules,
    judges and functions as configured. Cheap, to be called before a long run.
    """
    judges = load_judges(image) if image else {}
    columns = dict(zip(image.columns, image.types, strict=True)) if image else {}
    scorers: dict[str, Component] = {name: RULES[name].score for name in RULES.shipped}
    scorers |= {name: judges[name].score for name, path in columns.items() if path in JUDGES.shipped}
    scorers = dict(sorted(scorers.items()))
    own: list[tuple[str, str, Component]] = [(path, short_name(path), RULES[path].score) for path in rewards.rules]
    own += [(path, name, judges[name].score) for name, path in columns.items() if path not in JUDGES.shipped]
    own += [
        (entry.path, entry.name, partial(functions.score_with, entry))
        for entry in map(load_function, rewards.functions)
    ]
    for path, name, score in own:
        taken = [*RULES.shipped, *JUDGES.shipped, *scorers, *RESERVED]
        if name in taken:
            raise UserError(
                f"The reward {path} cannot be called '{name}': the name is taken.",
                hint=f"Rename it; taken are {', '.join(dict.fromkeys(taken))}.",
            )
        scorers[name] = score
    return scorers
