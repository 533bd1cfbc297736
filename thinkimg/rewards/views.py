"""Views of images on their way to a judge's server: encoded when a pair is asked about, kept while there is room.

judge ──► Views.lend(pair) ──► a thread of the pool ──► see, Media.hold ──► two references, until they are given back
"""

import asyncio
import functools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from PIL import Image

from thinkimg.engine.media import Media
from thinkimg.engine.request import ImageRef
from thinkimg.rewards.context import JudgeContext
from thinkimg.rewards.judgement import Pair

CACHE_BYTES = 256 * 2**20  # an original is in pairs that follow each other
SEEN = 64  # views that are kept: an original is not decoded again for the next pair


class Views:
    """Lender of the images of `slots` pairs at a time, as the model sees them: files of `folder`, or data without one.

    Memory: CACHE_BYTES of encoded images and those that are lent, SEEN views, and an image for each of where.workers
    threads, which end with the context.
    """

    def __init__(self, context: JudgeContext, folder: Path | None, slots: int):
        self._slots, self._media = asyncio.Semaphore(slots), Media(folder, CACHE_BYTES)
        self._pool = ThreadPoolExecutor(context.resources.where.workers)

        @functools.lru_cache(SEEN)
        def see(sha256: str) -> tuple[str, Image.Image]:
            picture = context.picture(sha256)
            return picture.uuid, picture.view  # without the full resolution

        self._see = see

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    @asynccontextmanager
    async def lend(self, pair: Pair) -> AsyncIterator[list[ImageRef]]:
        """Yield the references to the original and to the processed image, which are good within the context."""
        async with self._slots:
            refs = await asyncio.get_running_loop().run_in_executor(self._pool, self._hold, pair)
            try:
                yield refs
            finally:
                self._media.release(refs)

    def _hold(self, pair: Pair) -> list[ImageRef]:
        return self._media.hold([self._see(pair.original), self._see(pair.processed)])
