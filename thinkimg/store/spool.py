"""Rows and images that wait for their part to be closed, small in memory however many they are."""

import asyncio
import os
import tempfile
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from PIL import Image

from thinkimg.store import files
from thinkimg.store.image_table import encode_lossless

PENDING = 16  # images whose pixels wait for a thread that encodes them, at most
ROWS = 64  # of one conversion to Arrow, where a row takes a sixth of its Python objects


class RowSpool:
    """Rows of a table, added in any order and read in one that is given."""

    def __init__(self, schema: pa.Schema):
        self.schema = schema
        self._places: dict[Hashable, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []

    def add(self, key: Hashable, row: dict[str, Any]) -> None:
        """Add a row under a key of its own."""
        assert key not in self._places, f"there is a row {key}"
        self._places[key] = len(self._places)
        self._rows.append(row)
        if len(self._rows) == ROWS:
            self._convert()

    def table(self, keys: Sequence[Hashable]) -> pa.Table:
        """Return the rows of these keys, in this order."""
        self._convert()
        places = pa.array([self._places[key] for key in keys], pa.int64())
        return pa.Table.from_batches(self._batches, self.schema).take(places)

    def _convert(self) -> None:
        if self._rows:
            self._batches.append(pa.RecordBatch.from_pylist(self._rows, self.schema))
            self._rows = []


class ImageSpool:
    """Async context manager that encodes images as they come, and keeps them in a file without a name.

    directory: on the disk on which they will be stored. pool: threads that encode.
    """

    def __init__(self, directory: Path, pool: Executor):
        self._directory, self._pool = directory, pool
        self._places: dict[str, tuple[int, int, int, int]] = {}  # hash -> offset, bytes, width, height
        self._hashes: set[str] = set()
        self._pending: set[asyncio.Future[None]] = set()
        self._end, self._lock = 0, threading.Lock()

    async def __aenter__(self) -> Self:
        with files.op("write", self._directory):
            self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115  `close` closes it
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._pending:  # their threads write to the file
            await asyncio.wait(self._pending)
        self.close()

    def close(self) -> None:
        """Give the disk's room back, once `rows` have been read."""
        self._file.close()

    async def add(self, images: Mapping[str, Image.Image]) -> None:
        """Have images by content hash encoded, each once; wait while too many are under way. Raises as `done`."""
        loop = asyncio.get_running_loop()
        for sha256, image in images.items():
            if sha256 not in self._hashes:
                self._hashes.add(sha256)
                self._pending.add(loop.run_in_executor(self._pool, self._encode, sha256, image))
        await self._wait(PENDING)

    async def done(self) -> None:
        """Wait until all are in the file. Raises UserError for a full disk."""
        await self._wait(0)

    def rows(self) -> Iterator[tuple[str, bytes, int, int]]:
        """Yield (content hash, encoded, width, height) by hash, once `done`."""
        for sha256 in sorted(self._places):
            offset, size, width, height = self._places[sha256]
            yield sha256, os.pread(self._file.fileno(), size, offset), width, height

    async def _wait(self, limit: int) -> None:
        while len(self._pending) > limit:
            ended, self._pending = await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED)
            for future in ended:
                future.result()

    def _encode(self, sha256: str, image: Image.Image) -> None:
        data = encode_lossless(image)
        with self._lock:
            offset, self._end = self._end, self._end + len(data)
        with files.op("write", self._directory):
            written = 0
            while written < len(data):  # a full disk takes a part, and refuses the rest
                written += os.pwrite(self._file.fileno(), data[written:], offset + written)
        self._places[sha256] = offset, len(data), *image.size
