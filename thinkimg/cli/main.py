"""The command line: every stage and the loop, from presets and overrides."""

import os
from typing import Annotated

from cyclopts import App, Parameter

from thinkimg import __version__
from thinkimg.cli.scores import ledger
from thinkimg.exit import guarded
from thinkimg.stages.names import stage_names

app = App(name="thinkimg", help="Teach a vision-language model to think with images.", version=__version__)


Preset = Annotated[str, Parameter(name=["--preset", "-p"], help="Name of a preset, or the path of a YAML file.")]
Set = Annotated[
    list[str] | None, Parameter(name=["--set", "-s"], help="A setting, as a.b=value; may be repeated.", negative=[])
]
DryRun = Annotated[
    bool, Parameter(help="Print the resolved config and what is there already, do nothing.", negative=[])
]
Reference = Annotated[str, Parameter(help="An artifact: the beginning of its fingerprint, or its path.")]

for stage, line in stage_names().items():
    app.command(f"thinkimg.cli.stages:{stage}", name=stage.replace("_", "-"), help=line)


@app.command
def run(*, preset: Preset = "development", set: Set = None, dry_run: DryRun = False) -> None:
    """Run the whole loop, or go on with it."""
    from thinkimg.config.load import load

    config = load(preset, set or ())
    if dry_run:
        from thinkimg.cli.dry_run import show_pipeline

        show_pipeline(config)
        return
    from flows import _server
    from thinkimg.closure import check_closure

    check_closure()
    _server.start()  # while the stages are imported
    from flows.loop import loop

    loop(preset=preset, overrides=set or [])


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
    from thinkimg.config.load import load
    from thinkimg.models.base import BaseSource
    from thinkimg.stages.rollout import settings_of
    from thinkimg.store.artifacts import Store

    config = load(preset, set or ())
    weights = Store(config.where.store).resolve(policy, "policy") if policy else None
    rank = config.model.lora_rank if config.model.adaptation == "lora" else None
    engine, base = settings_of(config).engine, BaseSource.of(config.model)
    resources.serve(config.where, engine, base, weights, rank, host=host, port=port)


@app.command
def trainer(
    *,
    rank: Annotated[int, Parameter(help="Of this node: 1, 2, …; 0 is the loop's own.")],
    preset: Preset = "development",
    set: Set = None,
) -> None:
    """Train for a loop that runs on another node, with the same settings as that; until interrupted."""
    from thinkimg.config.load import load
    from thinkimg.trainer.client import serve_rank

    serve_rank(load(preset, set or ()).where.trainer, rank)


@app.command
def deployments() -> None:
    """Print prefect.yaml, with a deployment of the loop and of each stage."""
    from flows._deployments import deployments

    print(deployments(), end="")


@app.command
def schema() -> None:
    """Print the JSON Schema of presets, for editors."""
    import json

    from thinkimg.config.tree import Config

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
    from thinkimg.config.load import load
    from thinkimg.store.artifacts import Store
    from thinkimg.tracking import loop

    config = load(preset, set or ())
    print(loop.sync(Store(config.where.store), config.where.tracking))


@track.command
def ui(*, preset: Preset = "tiny", set: Set = None) -> None:
    """Show MLflow at http://127.0.0.1:5000 until it is stopped."""
    from thinkimg.config.load import load
    from thinkimg.tracking.loop import compare_link, ui_command

    config = load(preset, set or ())
    command = ui_command(config.where.store, config.where.tracking)
    link = compare_link(config.where.store, config.where.tracking)
    print(f"{command}\nCompare mixes at {link}", flush=True)
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
    from thinkimg.config.load import load
    from thinkimg.store.artifacts import Store

    config = load(preset, set or ())
    store = Store(config.where.store)
    player = store.resolve(policy, "policy")
    calibration(calibrate_attention(config, player, store, count=pairs))


def main() -> None:
    guarded(app)


if __name__ == "__main__":
    main()
