"""The command line: every stage and the loop, from presets and overrides."""

import os
from typing import Annotated

from cyclopts import App, Parameter

from thinkimg import __version__
from thinkimg.cli.scores import ledger
from thinkimg.exit import guarded

app = App(name="thinkimg", help="Teach a vision-language model to think with images.", version=__version__)


Preset = Annotated[str, Parameter(name=["--preset", "-p"], help="Name of a preset, or the path of a YAML file.")]
Set = Annotated[
    list[str] | None, Parameter(name=["--set", "-s"], help="A setting, as a.b=value; may be repeated.", negative=[])
]
DryRun = Annotated[
    bool, Parameter(help="Print the resolved config and what is there already, do nothing.", negative=[])
]
Force = Annotated[bool, Parameter(help="Make a new attempt even if there is one.", negative=[])]
Reference = Annotated[str, Parameter(help="An artifact: the beginning of its fingerprint, or its path.")]


def settings(preset: str, overrides: list[str] | None) -> dict:
    return {"preset": preset, "overrides": overrides or []}


def stage(name: str, preset: str, overrides: list[str] | None, dry_run: bool, **arguments) -> None:
    """Run one stage as a flow of its own and say what it made."""
    from thinkimg.config import load

    config = load(preset, overrides or ())
    from thinkimg.store.artifacts import Store

    # Before Prefect's server is started: a mistyped fingerprint is told at once.
    kinds = {"reference": "policy"}
    given = {name: value for name, value in arguments.items() if isinstance(value, str)}
    for key, value in given.items():
        arguments[key] = str(Store(config.where.store).resolve(value, kinds.get(key, key)).reference)
    if dry_run:
        plan(config)
        return
    from importlib import import_module

    from flows import _server

    _server.start()  # while the stage is imported
    flow = getattr(import_module(f"flows.{name}"), name)
    made = flow(**settings(preset, overrides), **arguments)
    print(made)


@app.command
def prepare(*, preset: Preset = "development", set: Set = None, dry_run: DryRun = False, force: Force = False) -> None:
    """Turn a source of questions and pictures into a data set."""
    stage("prepare", preset, set, dry_run, force=force)


@app.command
def warmstart(
    *,
    dataset: Reference,
    preset: Preset = "development",
    set: Set = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Make the first policy from demonstrations, a checkpoint, or the base model as it is."""
    stage("warmstart", preset, set, dry_run, dataset=dataset, force=force)


@app.command
def rollout(
    *, policy: Reference, dataset: Reference | None = None, iteration: int = 1, preset: Preset = "development",
    set: Set = None, dry_run: DryRun = False, force: Force = False,
) -> None:  # fmt: skip
    """Let a policy play an iteration's samples. The data set is the one that the policy was made from, unless named."""
    stage("rollout", preset, set, dry_run, policy=policy, dataset=dataset, iteration=iteration, force=force)


@app.command
def score(
    *,
    rollouts: Reference,
    preset: Preset = "development",
    set: Set = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Score stored rollouts: one raw column per reward component."""
    stage("score", preset, set, dry_run, rollouts=rollouts, force=force)


@app.command
def train(
    *, scores: Reference, reference: Reference | None = None, preset: Preset = "development", set: Set = None,
    dry_run: DryRun = False, force: Force = False,
) -> None:  # fmt: skip
    """Take GRPO steps from scored rollouts to the next policy."""
    stage("train", preset, set, dry_run, scores=scores, reference=reference, force=force)


@app.command
def evaluate(
    *, policy: Reference, dataset: Reference | None = None, samples: int | None = None, blind: bool = False,
    preset: Preset = "development", set: Set = None, dry_run: DryRun = False, force: Force = False,
) -> None:  # fmt: skip
    """Measure held-out accuracy. --blind shows grey images in place of those that tools make."""
    stage("evaluate", preset, set, dry_run, policy=policy, dataset=dataset, samples=samples, blind=blind, force=force)


@app.command
def run(*, preset: Preset = "development", set: Set = None, dry_run: DryRun = False) -> None:
    """Run the whole loop, or go on with it."""
    from thinkimg.config import load

    config = load(preset, set or ())
    if dry_run:
        plan(config)
        return
    from flows import _server
    from thinkimg.closure import check_closure

    check_closure()
    _server.start()  # while the stages are imported
    from flows.loop import loop

    loop(**settings(preset, set))


@app.command
def serve(
    *,
    policy: Annotated[
        Reference | None, Parameter(help="Start with its weights. Left out: with the base model's.")
    ] = None,
    host: Annotated[
        str, Parameter(help="Address to listen at. Whoever reaches it can change the weights.")
    ] = "127.0.0.1",
    port: int = 8000,
    preset: Preset = "development",
    set: Set = None,
) -> None:
    """Run a vLLM server for the `where.engine.urls` of loops and judges, until it is stopped."""
    from thinkimg import resources
    from thinkimg.config import load
    from thinkimg.store.artifacts import Store

    config = load(preset, set or ())
    resources.serve(config, Store(config.where.store).resolve(policy, "policy") if policy else None, host, port)


@app.command
def trainer(
    *,
    rank: Annotated[int, Parameter(help="Of this node: 1, 2, …; 0 is the loop's own.")],
    preset: Preset = "development",
    set: Set = None,
) -> None:
    """Train for a loop that runs on another node, with the same settings as that; until interrupted."""
    from thinkimg.config import load
    from thinkimg.trainer.worker import serve_rank

    serve_rank(load(preset, set or ()).where.trainer, rank)


@app.command
def schema() -> None:
    """Print the JSON Schema of presets, for editors."""
    import json

    from thinkimg.config import Config

    found = Config.model_json_schema()
    extends = {
        "type": "string",
        "description": "Preset that this one starts from: a name, or a path relative to this file.",
    }
    found["properties"] = {"extends": extends} | found["properties"]
    print(json.dumps(found, indent=1))


app.command(
    "thinkimg.cli.artifacts:app",
    name="artifacts",
    help="What the stages made: list, show, lineage, verify, gc, export.",
)

track = App(name="track", help="MLflow, the projection of the store.")
app.command(track)


@track.command
def sync(*, preset: Preset = "development", set: Set = None) -> None:
    """Add to MLflow what it lacks; doing it again adds nothing."""
    from thinkimg import tracking
    from thinkimg.config import load
    from thinkimg.store.artifacts import Store

    config = load(preset, set or ())
    print(tracking.sync(Store(config.where.store), config.where.tracking))


@track.command
def ui(*, preset: Preset = "tiny", set: Set = None) -> None:
    """Show MLflow at http://127.0.0.1:5000 until it is stopped."""
    from thinkimg import tracking
    from thinkimg.config import load

    config = load(preset, set or ())
    command = tracking.ui_command(config)
    print(f"{command}\nCompare mixes at {tracking.compare_link(config)}", flush=True)
    os.execvp("sh", ["sh", "-c", f"exec env {command}"])


app.update(ledger)

calibrate = App(name="calibrate", help="Find what a judge needs to know about a model.")
app.command(calibrate)


@calibrate.command
def attention(
    policy: Reference,
    *,
    pairs: Annotated[int, Parameter(help="How many of the built-in puzzles to try it on, at most.")] = 100,
    preset: Preset = "tiny",
    set: Set = None,
) -> None:
    """Layer and query rows at which attention tells right from wrong processing of the built-in puzzles."""
    from thinkimg.analysis.calibrate import calibrate_attention
    from thinkimg.analysis.console_report import calibration
    from thinkimg.config import load
    from thinkimg.store.artifacts import Store

    config = load(preset, set or ())
    store = Store(config.where.store)
    player = store.resolve(policy, "policy")
    calibration(calibrate_attention(config, player, store, count=pairs))


def plan(config) -> None:
    """Print the resolved config as YAML, stage by stage what the store holds already, and the memory of a training step."""
    import yaml

    from thinkimg.stages.plan import planned
    from thinkimg.trainer.forecast import forecast

    tree = config.model_dump(mode="json") | {"where": config.where.public()}
    print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    for line in planned(config):
        print(line, flush=True)
    print(forecast(config))


def main() -> None:
    guarded(app)


if __name__ == "__main__":
    main()
