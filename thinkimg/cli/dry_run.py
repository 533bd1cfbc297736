"""What `--dry-run` prints: the resolved config, what the store holds, and the memory of a training step."""

import yaml

from thinkimg.analysis.forecast import forecast
from thinkimg.config.tree import Config
from thinkimg.dry_run import look
from thinkimg.pipeline import pipeline
from thinkimg.scheduler import Plan
from thinkimg.store.artifacts import Store


def show_pipeline(config: Config) -> None:
    """Print a loop's."""
    plan = Plan(config)
    pipeline(plan, config)
    show(plan)


def show(plan: Plan) -> None:
    config = plan.config
    tree = config.model_dump(mode="json") | {"where": config.where.public()}
    print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    for line in look(plan, Store(config.where.store)):
        print(line, flush=True)
    if any(handle.stage.name == "train" for handle in plan.handles):
        print(forecast(config))
