"""Start of the endpoint: its engine, its pictures' folder, its port."""

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from thinkimg.conversation.episode import ConversationSpec
from thinkimg.engine.client import EngineClient
from thinkimg.engine.media import Media
from thinkimg.images.decode import ImageLimits
from thinkimg.resources import Resources
from thinkimg.serving.app import Access, run_app
from thinkimg.serving.keeper import EngineKeeper
from thinkimg.serving.pictures import PictureReader
from thinkimg.serving.service import Service
from thinkimg.stages.rollout import PlaySettings
from thinkimg.store.kinds import Policy

Connect = Callable[[], Awaitable[EngineClient]]
FETCHES = 16
"""Pictures that are fetched from other hosts at once."""


@dataclass(frozen=True)
class Sources:
    """Places from which pictures are taken, and limits of their files."""

    limits: ImageLimits
    media: Path | None
    hosts: Collection[str]


def serve_chat(
    policy: Policy,
    settings: PlaySettings,
    resources: Resources,
    sources: Sources,
    access: Access,
    address: tuple[str, int],
) -> None:
    """Serve a policy at (host, port) until the process is interrupted or terminated."""
    connect = make_connect(policy, settings, resources)
    # In this thread, where an interruption is heard: a start takes half a minute, or minutes.
    asyncio.run(connect_once(connect))
    with ExitStack() as stack:
        service = make_service(policy, settings, resources, sources, EngineKeeper(in_a_thread(connect)), stack)
        host, port = address
        shown = f"[{host}]" if ":" in host else host
        resources.say(f"chat: http://{shown}:{port}/v1 serves {access.name}, the policy {policy.short}")
        if access.page:
            resources.say(f"chat: the page is http://{shown}:{port}/")
        run_app(service, access, address)


def make_service(
    policy: Policy,
    settings: PlaySettings,
    resources: Resources,
    sources: Sources,
    keeper: EngineKeeper,
    stack: ExitStack,
) -> Service:
    """Return the service of a policy; `stack` ends its threads, and removes its scratch folder."""
    spec = ConversationSpec.load(settings.conversation, settings.images, policy.vocabulary)
    folder = None  # other servers may not share the disk
    if not resources.where.engine.urls:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=resources.media)))
    pool = ThreadPoolExecutor(resources.where.workers, thread_name_prefix="tools")
    network = ThreadPoolExecutor(FETCHES, thread_name_prefix="pictures")
    for threads in (pool, network):
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
    reader = PictureReader(settings.images, sources.limits, sources.media, sources.hosts)
    media = Media(folder, resources.where.engine.image_cache_gib * 2**30)
    return Service(spec, policy.digest, keeper, media, reader, pool, network)


def make_connect(policy: Policy, settings: PlaySettings, resources: Resources) -> Connect:
    """Return a function that connects to the engine with the policy's weights, and starts it where it is ours."""

    async def connect() -> EngineClient:
        return await resources.engine(policy, settings.engine, settings.base)

    return connect


def in_a_thread(connect: Connect) -> Connect:
    """Return a function that connects without a pause for other requests, though the start of a server blocks."""

    async def start_and_connect() -> EngineClient:
        await asyncio.to_thread(lambda: asyncio.run(connect_once(connect)))  # a client belongs to one event loop
        return await connect()

    return start_and_connect


async def connect_once(connect: Connect) -> None:
    """Connect and leave: afterwards the servers run and hold the policy."""
    async with await connect():
        pass
