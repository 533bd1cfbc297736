"""Service: plays a question to its answer, with the settings of one policy."""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass

from thinkimg.conversation.chat import Chat, Message
from thinkimg.conversation.episode import ConversationSpec, Episode
from thinkimg.conversation.picture import Picture
from thinkimg.engine import play
from thinkimg.engine.media import Media
from thinkimg.engine.play import SamplingMode, name_group
from thinkimg.records import StopReason, Turn
from thinkimg.serving.body import TOO_LONG, Question
from thinkimg.serving.keeper import EngineKeeper
from thinkimg.serving.pictures import PictureReader
from thinkimg.serving.refusal import Refusal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """All that requests share.

    policy: its digest. pool: threads for pictures and tools. network: threads that wait for pictures of other hosts.
    """

    spec: ConversationSpec
    policy: str
    keeper: EngineKeeper
    media: Media
    reader: PictureReader
    pool: Executor
    network: Executor

    async def prepare(self, question: Question) -> Episode:
        """Return the episode of a question. Raises Refusal for a picture that can't be used, or a prompt too long."""
        urls = [url for message in question.messages for url in message.images]
        if len(urls) > (limit := self.spec.conversation.max_images):
            raise Refusal(f"{len(urls)} pictures are more than {limit}.", param="messages", code=TOO_LONG)
        pictures = [await self._load(url) for url in urls]
        messages = tuple(Message(message.text, len(message.images)) for message in question.messages)
        hashes = tuple(picture.sha256 for picture in pictures)
        content = [[[message.text, message.images] for message in messages], question.replies, hashes]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        chat = Chat(name, hashes, messages, question.replies)
        loop = asyncio.get_running_loop()
        episode = await loop.run_in_executor(self.pool, self._begin, chat, pictures, question.seed)
        if episode.stop is not None:
            raise Refusal(f"{episode.error}", param="messages", code=TOO_LONG)
        return episode

    def _begin(self, chat: Chat, pictures: list[Picture], index: int) -> Episode:
        group = name_group(self.policy, chat.sample_id)
        return Episode(chat, pictures, self.spec, policy=self.policy, group_id=group, index=index)

    async def _load(self, url: str) -> Picture:
        loop = asyncio.get_running_loop()
        fetching = self.network if self.reader.is_remote(url) else self.pool
        data = await loop.run_in_executor(fetching, self.reader.fetch, url)
        return await loop.run_in_executor(self.pool, self.reader.load, data)

    async def play(self, episode: Episode, question: Question) -> AsyncIterator[Turn]:
        """Yield the turns of an episode as they end. Raises Refusal where the engine is gone or refuses it."""
        mode = SamplingMode(question.temperature, max_tokens=question.sampled_tokens)
        async with (
            self.keeper.use() as engine,
            aclosing(play.play_episode(episode, engine, self.media, mode, self.pool)) as turns,
        ):
            async for turn in turns:
                yield turn
        if episode.stop is StopReason.FAILED:
            log.error("a conversation failed: %s", episode.error)
            raise Refusal("The conversation failed; the server's log says why.", status=502, code="failed")
