"""Images on their way to the engine: encoded once, named by the hash of their pixels, kept while there is room.

play ──► lend ──► hold (a thread of the pool) ──► encode ──► a file of `folder`, or a data: URL
             └──► release ──► what was used longest ago goes, where `cache_bytes` are exceeded
"""

import asyncio
import io
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from PIL import Image

from thinkimg.disk import writing
from thinkimg.engine.request import ImageRef
from thinkimg.store.image_table import encode_lossless

CACHE_BYTES = 2**30


@dataclass
class _Entry:
    """Encoded image, and the number of those that need it now."""

    ref: ImageRef | None = None  # None until the first of them has encoded it
    size: int = 0
    users: int = 0
    lock: Lock = field(default_factory=Lock)


class Media:
    """Encoder of images for the engine, for any number of threads: into files of `folder`, or into data without one.

    Bytes: at most `cache_bytes`, and beyond these only what is held by a request under way.
    """

    def __init__(self, folder: Path | None, cache_bytes: int = CACHE_BYTES):
        self.folder, self.cache_bytes = folder, cache_bytes
        self._entries: dict[str, _Entry] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # those without users, the longest unused first
        self._size = 0
        self._lock = Lock()

    @property
    def size(self) -> int:
        """Bytes of all encoded images that are kept."""
        return self._size

    @asynccontextmanager
    async def lend(self, images: Sequence[tuple[str, Image.Image]], pool: Executor) -> AsyncIterator[list[ImageRef]]:
        """Yield a reference to each (uuid, image), which is good within the context; they are encoded in `pool`."""
        refs = self._hold_encoded([uuid for uuid, _ in images])
        if refs is None:
            encoding = pool.submit(self.hold, images)
            try:
                refs = await asyncio.wrap_future(encoding)
            except asyncio.CancelledError:  # its thread may go on, and hold them for nobody
                encoding.add_done_callback(self._release_result)
                raise
        try:
            yield refs
        finally:
            self.release(refs)

    def ref(self, uuid: str, image: Image.Image) -> ImageRef:
        """Return the reference to an image, good as long as this object."""
        return self.hold([(uuid, image)])[0]

    def hold(self, images: Sequence[tuple[str, Image.Image]]) -> list[ImageRef]:
        """Return a reference to each (uuid, image), good until `release`; of several threads the first encodes it."""
        refs: list[ImageRef] = []
        try:
            for uuid, image in images:
                refs.append(self._hold(uuid, image))
        except BaseException:
            self.release(refs)
            raise
        return refs

    def release(self, refs: Sequence[ImageRef]) -> None:
        """Give references back, once for each time that they were held."""
        with self._lock:
            for ref in refs:
                self._leave(ref.uuid)
            self._evict()

    def _hold_encoded(self, uuids: Sequence[str]) -> list[ImageRef] | None:
        """Hold the images if all of them are encoded, without a wait; None if one is not."""
        with self._lock:
            refs = [entry.ref for uuid in uuids if (entry := self._entries.get(uuid)) and entry.ref]
            if len(refs) < len(uuids):
                return None
            for uuid in uuids:
                self._enter(uuid)
            return refs

    def _hold(self, uuid: str, image: Image.Image) -> ImageRef:
        with self._lock:
            entry = self._enter(uuid)
        try:
            with entry.lock:
                if entry.ref is None:
                    ref, size = self._encode(uuid, image)
                    with self._lock:
                        entry.ref, entry.size = ref, size
                        self._size += size
                        self._evict()
                return entry.ref
        except BaseException:
            with self._lock:
                self._leave(uuid)
            raise

    def _enter(self, uuid: str) -> _Entry:
        entry = self._entries.setdefault(uuid, _Entry())
        entry.users += 1
        self._idle.pop(uuid, None)
        return entry

    def _leave(self, uuid: str) -> None:
        entry = self._entries[uuid]
        entry.users -= 1
        if entry.users == 0:
            self._idle[uuid] = None

    def _evict(self) -> None:
        while self._size > self.cache_bytes and self._idle:
            uuid, _ = self._idle.popitem(last=False)
            entry = self._entries.pop(uuid)
            self._size -= entry.size
            if entry.ref is not None and entry.ref.path is not None:
                entry.ref.path.unlink(missing_ok=True)

    def _encode(self, uuid: str, image: Image.Image) -> tuple[ImageRef, int]:
        """Return the reference to an encoded image, and its bytes.

        A file is read on this machine, so that it is not compressed: writing WebP takes 40 times as long
        (docs/design.md). What travels is a third smaller as WebP.
        """
        if self.folder is None:
            ref = ImageRef(uuid, data=encode_lossless(image))
            return ref, ref.memory
        buffer = io.BytesIO()
        image.save(buffer, "PPM")
        data = buffer.getvalue()
        path = self.folder / f"{uuid}.ppm"
        with writing(path):  # scratch, which goes with the sampler: nothing for the file layer
            path.write_bytes(data)
        return ImageRef(uuid, path=path), len(data)

    def _release_result(self, encoding: Future[list[ImageRef]]) -> None:
        if not encoding.cancelled() and encoding.exception() is None:
            self.release(encoding.result())
