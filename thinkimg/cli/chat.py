"""Verb `thinkimg chat`: the policy with its tools behind an OpenAI-compatible endpoint."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from thinkimg.cli.flags import ArtifactFlag, PortFlag, PresetFlag, SetFlag, check_port, open_config, read_path
from thinkimg.environment import is_loopback
from thinkimg.errors import UserError, shorten
from thinkimg.keys import read_key


def chat(
    *,
    policy: ArtifactFlag,
    host: Annotated[str, Parameter(help="Address to listen on; any but this machine's own needs --api-key-env.")] = (
        "127.0.0.1"
    ),
    port: PortFlag = 8001,
    media: Annotated[
        Path | None,
        Parameter(help="Folder below which clients may name pictures by file:// addresses.", converter=read_path),
    ] = None,
    api_key_env: Annotated[
        str | None, Parameter(help="Environment variable with the key that clients must send.")
    ] = None,
    page: Annotated[bool, Parameter(help="Serve a page for people at /, too.", negative=[])] = False,
    timeout: Annotated[float, Parameter(help="Seconds for one request.", validator=Number(gt=0))] = 600.0,
    preset: PresetFlag = "development",
    set: SetFlag = None,
) -> None:
    """Serve a policy with its tools: OpenAI's chat completions at /v1, until it is stopped."""
    key = None if api_key_env is None else read_key(api_key_env)
    if key is None and not is_loopback(host):
        raise UserError(
            f"Without a key, whoever reaches {shorten(host)} could use the endpoint.",
            hint="Name the environment variable that holds one: --api-key-env NAME.",
        )
    if media is not None and not media.is_dir():
        raise UserError(f"There is no folder {media}.", hint="Correct --media.")
    check_port(host, port)
    import logging

    from thinkimg.images.decode import ImageLimits
    from thinkimg.resources import Resources
    from thinkimg.serving.app import Access
    from thinkimg.serving.serve import Sources, serve_chat
    from thinkimg.stages.rollout import compare_settings, settings_of

    config, store = open_config(preset, set)
    config.family()
    chosen, settings = store.resolve(policy, "policy"), settings_of(config)
    if difference := compare_settings(settings, {"policy": chosen}, store):
        logging.getLogger(__name__).warning("%s", difference)
    limits = ImageLimits(max_bytes=config.images.max_bytes, max_pixels=config.images.max_decoded_pixels)
    sources = Sources(limits, media, getattr(config.data, "url_hosts", ()))  # the puzzles have none
    access = Access(
        created=int(datetime.fromisoformat(chosen.manifest["finished"]).timestamp()),
        key=key,
        timeout_s=timeout,
        concurrency=config.where.engine.concurrency,
        page=page,
    )
    with Resources(config.where) as resources:
        serve_chat(chosen, settings, resources, sources, access, (host, port))
