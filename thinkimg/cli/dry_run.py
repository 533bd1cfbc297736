"""Output of `--dry-run`: the resolved config, the state of each stage, and the memory of a training step."""

import yaml

from thinkimg.analysis.forecast import forecast_needs
from thinkimg.closure import check_closure
from thinkimg.config.tree import Config
from thinkimg.console import takes_unicode
from thinkimg.dry_run import preview
from thinkimg.errors import UserError
from thinkimg.pipeline import pipeline
from thinkimg.scheduler import Plan
from thinkimg.store.artifacts import Store


def print_pipeline(config: Config) -> None:
    """Print the dry run of a loop."""
    plan = Plan(config)
    pipeline(plan, config)
    print_plan(plan)


def print_plan(plan: Plan) -> None:
    """Print the dry run of planned stages."""
    config = plan.config
    print(yaml.safe_dump(config.public(), sort_keys=False, allow_unicode=takes_unicode()))
    for line in preview(plan, Store(config.where.store)):
        print(line, flush=True)
    try:
        check_closure()
    except UserError as error:  # the plan may be for another machine
        print(f"This machine can't run it: {error}")
    if any(handle.stage.name == "train" for handle in plan.handles):
        print(forecast_needs(config))
