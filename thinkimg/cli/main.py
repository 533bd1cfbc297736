"""Verbs of the command line: every stage, the loop, servers, and MLflow."""

import os
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from thinkimg import __version__
from thinkimg.cli.flags import (
    ArtifactFlag,
    DryRunFlag,
    PortFlag,
    PresetFlag,
    SetFlag,
    check_port,
    open_config,
    read_reference,
)
from thinkimg.cli.scores import ledger
from thinkimg.environment import child_environment, is_loopback
from thinkimg.errors import UserError
from thinkimg.exit import run_guarded
from thinkimg.stages.names import stage_names

app = App(name="thinkimg", help="Teach a vision-language model to think with images.", version=__version__)

for stage, line in stage_names().items():
    app.command(f"thinkimg.cli.stages:{stage}", name=stage.replace("_", "-"), help=line)


@app.command
def run(*, preset: PresetFlag = "development", set: SetFlag = None, dry_run: DryRunFlag = False) -> None:
    """Run the whole loop, or continue it."""
    config, _ = open_config(preset, set)  # a mistake in it is reported before anything starts
    config.family()
    if dry_run:
        from thinkimg.cli.dry_run import print_pipeline

        print_pipeline(config)
        return
    from flows import _server
    from thinkimg.closure import check_closure

    check_closure()
    _server.start_server()  # while the stages are imported
    from flows.loop import loop

    loop(preset=preset, overrides=set or [])


@app.command
def serve(
    *,
    policy: Annotated[
        str | None,
        Parameter(help="Policy whose weights to serve. Left out: the base model's.", converter=read_reference),
    ] = None,
    host: Annotated[
        str, Parameter(help="Address to listen on. Whoever reaches it can change the weights.")
    ] = "127.0.0.1",
    port: PortFlag = 8000,
    preset: PresetFlag = "development",
    set: SetFlag = None,
) -> None:
    """Run a vLLM server until it is stopped; a loop uses it by `where.engine.urls`."""
    check_port(host, port)
    dropped = os.environ.keys() - child_environment("engine", os.environ).keys()
    if "VLLM_API_KEY" in dropped and not is_loopback(host):
        raise UserError(
            f"The server takes no key: whoever reaches {host} could use it, whatever VLLM_API_KEY is.",
            hint="Unset VLLM_API_KEY, and let nobody but the loops reach the port; or leave --host out.",
        )
    from thinkimg import resources
    from thinkimg.engine.server import ServerSettings
    from thinkimg.models.base import BaseSource
    from thinkimg.stages.rollout import settings_of

    config, store = open_config(preset, set)
    weights = store.resolve(policy, "policy") if policy else None
    adapters = config.model.adaptation == "lora" and resources.serves_adapters(config.where.engine)
    rank = config.model.lora_rank if adapters else None
    server = ServerSettings(settings_of(config).engine, config.where.engine, rank)
    resources.exec_server(server, BaseSource.of(config.model), weights, host=host, port=port)


@app.command
def trainer(
    *,
    rank: Annotated[int, Parameter(help="Rank of this node: 1, 2, …; the loop's own node has 0.")],
    preset: PresetFlag = "development",
    set: SetFlag = None,
) -> None:
    """Train for a loop on another node until interrupted; takes the same settings as the loop."""
    from thinkimg.trainer.client import serve_rank

    serve_rank(open_config(preset, set)[0].where.trainer, rank)


@app.command
def deployments() -> None:
    """Print prefect.yaml: a deployment of the loop and of each stage."""
    from flows._deployments import render_deployments

    print(render_deployments(), end="")


@app.command
def schema(
    *,
    markdown: Annotated[bool, Parameter(help="Print the page docs/configuration.md instead.", negative=[])] = False,
) -> None:
    """Print the JSON Schema of presets, for editors."""
    import json

    if markdown:
        from thinkimg.cli.configuration import page

        print(page(), end="")
        return
    from thinkimg.config.tree import Config

    tree = Config.model_json_schema()
    extends = {
        "type": "string",
        "description": "Preset that this one starts from: a name, or a path relative to this file.",
    }
    tree["properties"] = {"extends": extends} | tree["properties"]
    print(json.dumps(tree, indent=1))


app.command(
    "thinkimg.cli.artifacts:app",
    name="artifacts",
    help="List, show, trace, verify, clean up and export artifacts.",
)

app.command(
    "thinkimg.cli.data:app", name="data", help="Look at data sets: before they are prepared, and prepared ones."
)

track = App(name="track", help="Bring MLflow up to date with the store, and show it.")
app.command(track)


@track.command
def sync(*, preset: PresetFlag = "development", set: SetFlag = None) -> None:
    """Add to MLflow what it lacks of the store; a second time adds nothing."""
    from thinkimg.tracking.loop import sync_store

    config, store = open_config(preset, set)
    print(sync_store(store, config.where.tracking))


@track.command
def ui(*, port: PortFlag = 5000, preset: PresetFlag = "tiny", set: SetFlag = None) -> None:
    """Serve MLflow's UI at http://127.0.0.1:5000, or another port, until it is stopped."""
    from thinkimg.tracking.connection import uri_of
    from thinkimg.tracking.loop import compare_link, list_ui_arguments, ui_command

    config, _ = open_config(preset, set)
    store, tracking = config.where.store, config.where.tracking
    if not (tracking.uri or "").startswith("http"):
        check_port("127.0.0.1", port)
    command, link = ui_command(store, tracking, port), compare_link(store, tracking, port)
    print(f"{command}\nCompare mixes at: {link}", flush=True)
    argv, database = list_ui_arguments(store, tracking, port), uri_of(Path(store), tracking)
    os.execvpe(argv[0], argv, child_environment("mlflow", os.environ, {"MLFLOW_BACKEND_STORE_URI": database}))


app.command(
    "thinkimg.cli.chat:chat", name="chat", help="Serve a policy with its tools: OpenAI's chat completions at /v1."
)

app.command("thinkimg.cli.view:view", name="view", help="Write all conversations of an artifact as a log of Inspect.")

app.update(ledger)

calibrate = App(name="calibrate", help="Find the settings of a judge for a model.")
app.command(calibrate)


@calibrate.command
def attention(
    policy: ArtifactFlag,
    *,
    pairs: Annotated[int, Parameter(help="Number of built-in puzzles to try it on, at most.")] = 100,
    preset: PresetFlag = "tiny",
    set: SetFlag = None,
) -> None:
    """Find the layer and query rows whose attention best tells right from wrong processing of built-in puzzles."""
    from thinkimg.analysis.calibrate import calibrate_attention
    from thinkimg.analysis.console_report import print_calibration

    config, store = open_config(preset, set)
    print_calibration(calibrate_attention(config, store.resolve(policy, "policy"), store, count=pairs))


def main() -> None:
    run_guarded(app)


if __name__ == "__main__":
    main()
