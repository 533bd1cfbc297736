"""Conversations with a family's tiny model on a real server, and what the trainer computes of them."""

import asyncio
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from chat_codecs import CORPUS
from PIL import Image

from thinkimg.conversation.codec import Codec
from thinkimg.conversation.picture import Picture, make_picture
from thinkimg.conversation.protocol import IMAGE_PART, Content, text_part
from thinkimg.conversation.tokens import TokenStream
from thinkimg.engine.client import EngineClient
from thinkimg.engine.media import Media
from thinkimg.engine.request import Sampling
from thinkimg.engine.server import Server, ServerSettings
from thinkimg.engine.settings import EngineConfig, EngineSettings
from thinkimg.images.settings import ViewLimits
from thinkimg.models.family import Family, load_family
from thinkimg.models.settings import ModelConfig, TinyModel
from thinkimg.models.tiny import create_tiny
from thinkimg.records import Role
from thinkimg.trainer.forward.logprobs import Scorer
from thinkimg.trainer.forward.packing import Conversation, ImageToken

FAMILIES = ("qwen3_vl", "qwen3_5")
"""Those beside the default, whose server is conftest's `engine`."""
TURNS = 3
TEMPERATURE = 0.8


@dataclass
class Talk:
    """A conversation that was played: its tokens, and the pictures in them."""

    stream: TokenStream
    pictures: list[Picture]

    @property
    def sampled(self) -> list[int]:
        pairs = zip(self.stream.ids, self.stream.roles, strict=True)
        return [token for token, role in pairs if role is Role.SAMPLED]

    @property
    def logps(self) -> np.ndarray:
        return np.asarray(self.stream.logprobs)


class Served:
    """Two tiny models of a family, and a server with the first of them, version "v0"."""

    def __init__(self, name: str, models: tuple[Path, Path], url: str, media: Path):
        self.family: Family = load_family(name)
        self.config = ModelConfig(tiny=TinyModel(family=name), adaptation="full")
        self.models, self.url, self.media = models, url, Media(media)
        self.codec = Codec.load(models[0])
        processor = self.family.processor
        token = processor.token_side**2
        self.limits = ViewLimits(
            min_pixels=2 * token, max_pixels=24 * token, patch=processor.patch, merge=processor.merge
        )

    def draw(self, seed: int, count: int) -> list[Picture]:
        """Return pictures of random pixels and sizes, some below and some above the limits."""
        rng = np.random.default_rng(seed)
        shapes = [(*rng.integers(20, 260, 2), 3) for _ in range(count)]
        return [make_picture(Image.fromarray(rng.integers(0, 256, s, dtype=np.uint8)), self.limits) for s in shapes]

    async def converse(self, client: EngineClient, seed: int) -> Talk:
        """Play turns of several lengths, with observations of no image, one or two between them."""
        rng = random.Random(seed)
        pictures = self.draw(100 * seed, rng.choice((1, 1, 2)))
        prompt = self.codec.prompt("Use a tool.", say("Which way do the stripes run? " * rng.choice((1, 4)), pictures))
        talk = Talk(TokenStream(self.codec, prompt, [picture.slot for picture in pictures]), pictures)
        for turn in range(TURNS):
            length = rng.choice((2, 8, 20))
            sampling = Sampling(TEMPERATURE, length, 100 * seed + turn, (self.codec.end,), self.codec.banned)
            refs = [self.media.ref(picture.uuid, picture.view) for picture in talk.pictures]
            answer = await client.generate(talk.stream.ids, refs, sampling)
            talk.stream.check(answer.prompt_token_ids)
            talk.stream.append_sampled(answer.token_ids, answer.logprobs)
            shown = self.draw(100 * seed + turn + 1, rng.choice((0, 1, 1, 2)))
            ids = [] if answer.finish_reason == "stop" else [self.codec.end]  # which an untrained policy seldom samples
            ids += self.codec.observation(say(f"Observation {turn}", shown))
            talk.stream._append(ids, Role.OBSERVATION, [picture.slot for picture in shown])
            talk.pictures = talk.pictures + shown
        return talk

    def play(self, seeds: Iterable[int], **options) -> dict[int, Talk]:
        """Return the conversation of each seed, all of them played at once."""

        async def run(seeds: list[int]):
            async with EngineClient([self.url], **{"media": "file"} | options) as client:
                talks = await asyncio.gather(*(self.converse(client, seed) for seed in seeds))
            return dict(zip(seeds, talks, strict=True))

        return asyncio.run(run(list(seeds)))

    def load(self, model: Path, version: str) -> None:
        async def run():
            async with EngineClient([self.url], media="file") as client:
                await client.load_weights(model, version)

        asyncio.run(run())

    def score(self, talks: Iterable[Talk], model, precision: str | None = None) -> np.ndarray:
        """Return the trainer's log-probabilities of every sampled token. precision: None for the family's."""
        talks = list(talks)
        patches = {p.sha256: self.family.processor.extract_patches(p.view) for talk in talks for p in talk.pictures}
        scorer = Scorer(model, patches.__getitem__, temperature=TEMPERATURE, banned=self.codec.banned, features={})
        narrow = (precision or self.config.precision) == "bfloat16"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            return np.concatenate([scorer([self.row(talk.stream)])[0].numpy() for talk in talks])

    def row(self, stream: TokenStream) -> Conversation:
        token = ImageToken(self.codec.image, self.family.processor.merge)
        counts = np.ones(len(stream.ids), dtype=np.int64)
        counts[np.asarray(stream.ids) == token.id] = [token.count(grid) for grid in stream.grids]
        scored = np.repeat([role is Role.SAMPLED for role in stream.roles], counts)
        return Conversation(np.asarray(stream.expanded()), scored, tuple(stream.images), np.asarray(stream.grids))


def say(text: str, pictures: list[Picture]) -> Content:
    return [*[IMAGE_PART] * len(pictures), text_part(text)]


@contextmanager
def serve(root: Path, names: Iterable[str] = FAMILIES):
    """Serve families as the tiny preset has them, by name; the servers start side by side, one on each core."""
    root.mkdir(exist_ok=True)
    (media := root / "media").mkdir()
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(core: int, name: str) -> Served:
            tiny = TinyModel(family=name, vocab_size=512)
            models = root / name / "0", root / name / "1"
            for seed, directory in enumerate(models):
                create_tiny(directory, tiny, CORPUS, seed=seed)
            precision = ModelConfig(tiny=tiny, adaptation="full").precision
            limits = EngineSettings(dtype=precision, max_tokens=2048, max_images=16, max_pixels=10**6)
            place = EngineConfig(cpu_kvcache_gib=1, max_num_seqs=8, cpu_threads_bind=str(core % 2))
            settings = ServerSettings(limits, place, media_dir=media)
            server = Server(models[0], log_path=root / f"{name}.log", version="v0", settings=settings)
            stack.callback(server.stop)
            server.start()
            return Served(name, models, server.url, media)

        yield dict(zip(names, pool.map(start, range(len(FAMILIES)), names), strict=True))
