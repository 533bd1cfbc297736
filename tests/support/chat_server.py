"""Endpoint in a thread of this process, over an engine whose turns are a function of the prompt; and real clients."""

import asyncio
import base64
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
from aiohttp import web
from chat_codecs import tiny_codec
from PIL import Image

from thinkimg.conversation.episode import ConversationSpec
from thinkimg.conversation.protocol import Answer, ToolCall, load_protocol
from thinkimg.conversation.settings import ConversationConfig
from thinkimg.conversation.tokens import expansion
from thinkimg.engine.client import EngineUnavailable
from thinkimg.engine.media import Media
from thinkimg.engine.request import Generation, ImageRef, Sampling
from thinkimg.images.decode import ImageLimits
from thinkimg.images.settings import ViewLimits
from thinkimg.serving.app import Access, make_app
from thinkimg.serving.keeper import EngineKeeper
from thinkimg.serving.pictures import PictureReader
from thinkimg.serving.service import Service

OPEN = Access()
VIEW = ViewLimits(min_pixels=28 * 28, max_pixels=4 * 28 * 28)
LIMITS = ImageLimits(max_bytes=2**20, max_pixels=2**20)
THINK = load_protocol("think")
CROP = THINK.render_turn("look", ToolCall("crop_image", {"x": 0, "y": 0, "width": 28, "height": 28}))


def open_data_uri(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def answer(text: str) -> str:
    return THINK.render_turn("seen", Answer(text))


def look_then_answer(prompt: str, sampling: Sampling) -> str:
    """A crop, then the last word of the question."""
    asked = prompt.rpartition("Image 0: ")[2]
    return answer(asked.partition("<|im_end|>")[0].split()[-1]) if "Image 1:" in prompt else CROP


class ScriptedClient:
    """Stands in for an EngineClient; `script(prompt, sampling)` gives each turn as text."""

    media, urls, concurrency = "data", ("scripted",), 64

    def __init__(self, script: Callable[[str, Sampling], str] = look_then_answer):
        self.script, self.codec = script, tiny_codec()
        self.requests: list[tuple[str, Sampling]] = []
        self.gone = False
        self.delay = 0.0
        self.cancelled = self.closed = 0

    async def generate(self, ids: list[int], images: list[ImageRef], sampling: Sampling) -> Generation:
        prompt = self.codec.decode(ids)
        self.requests.append((prompt, sampling))
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.gone:
            raise EngineUnavailable("it was killed")
        tokens = [VIEW.count_tokens(Image.open(io.BytesIO(image.data)).size) for image in images]
        expanded = np.repeat(ids, expansion(ids, tokens, self.codec.image)).tolist()
        turn = [*self.codec.encode(self.script(prompt, sampling)), self.codec.end]
        reason = "stop" if len(turn) <= sampling.max_tokens else "length"
        turn = turn[: sampling.max_tokens]
        return Generation(turn, [-1.0] * len(turn), expanded, reason, "v0")

    async def versions(self) -> dict[str, str]:
        if self.gone:
            raise EngineUnavailable("it was killed")
        return {"scripted": "v0"}

    async def __aexit__(self, *_):
        self.closed += 1


class Endpoint:
    """An endpoint that runs in a thread: `url`, and openai's `client`."""

    def __init__(self, service: Service, access: Access = OPEN):
        self.service, self.keeper, self.media = service, service.keeper, service.media
        self.app = make_app(service, access)
        self.loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=access.key or "none", max_retries=0)

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            self._stopped = asyncio.Event()
            runner = web.AppRunner(self.app, handler_cancellation=True, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            started.set()
            await self._stopped.wait()
            await runner.cleanup()

        self.loop.run_until_complete(serve())
        self.loop.close()

    def ask(self, content, **options):
        """Return the completion of one user message, or of a list of messages."""
        is_history = isinstance(content, list) and "role" in content[0]
        messages = content if is_history else [{"role": "user", "content": content}]
        return self.client.chat.completions.create(**{"model": "policy", "messages": messages} | options)

    def close(self) -> None:
        self.client.close()
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(30)


class ChatServer(Endpoint):
    """Endpoint over a scripted `engine`; the settings are the conversation's."""

    def __init__(
        self,
        engine: ScriptedClient | None = None,
        *,
        access: Access = OPEN,
        media: Path | None = None,
        hosts: tuple[str, ...] = (),
        **settings,
    ):
        self.engine, self.connects = engine or ScriptedClient(), 0
        spec = ConversationSpec(ConversationConfig(**{"system": "s"} | settings), VIEW, tiny_codec())
        reader = PictureReader(VIEW, LIMITS, media, hosts)
        self.pools = ThreadPoolExecutor(2), ThreadPoolExecutor(2)
        super().__init__(Service(spec, "p", EngineKeeper(self.connect), Media(None), reader, *self.pools), access)

    async def connect(self):
        self.connects += 1
        if self.engine.gone:
            raise EngineUnavailable("it is still gone")
        return self.engine

    def close(self) -> None:
        super().close()
        for pool in self.pools:
            pool.shutdown()


def picture(seed: int = 0, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Random pixels; the model sees the usual ones at 56 x 28."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def show(text: str, *urls: str) -> list[dict]:
    """The content of a user's message, pictures first."""
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
