"""First values of a Parquet column chunk, read without decoding its pages as a whole.

Arrow's writers make one page of up to 1,024 values: of pictures it has gigabytes. Layout: the specification at
https://parquet.apache.org/docs/file-format, the encodings PLAIN, RLE and RLE_DICTIONARY, pages of version 1.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from thinkimg.data.tables.snappy_head import SnappyHead

HEAVY = 16 * 2**20
"""Bytes of a column chunk above which its first values are read alone."""
DATA_PAGE, DICTIONARY_PAGE = 0, 2
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8
MAX_HEADER = 2**16
CODECS = {"ZSTD": "zstd", "GZIP": "gzip"}


class Unsupported(Exception):
    """Reason for which the first values can't be read alone: another layout than those above."""


@dataclass(frozen=True)
class Chunk:
    """Column chunk of one row group, of texts or bytes. start: of its first page. size: of all, in bytes."""

    start: int
    size: int
    values: int
    """Number of its values, nulls included."""
    codec: str
    max_definition: int
    max_repetition: int


def read_rows(content: mmap.mmap, chunk: Chunk, rows: int, room: int) -> list[list[bytes | None]]:
    """Return the values of the first rows, at most: one per row, or several of a list; None where there is none.

    room: bytes after which no further row is read. Raises Unsupported.
    """
    found: list[list[bytes | None]] = []
    entries = _entries(content, chunk)
    try:
        for repetition, value in entries:
            if repetition == 0:
                if len(found) == rows or room < 0:
                    break
                found.append([])
            if not found:
                raise Unsupported("a page begins within a row")
            found[-1].append(value)
            room -= len(value or b"")
    except (ValueError, LookupError, TypeError, OverflowError, OSError, RuntimeError) as error:  # a damaged page
        raise Unsupported(str(error)) from error
    return found


def _entries(content: mmap.mmap, chunk: Chunk) -> Iterator[tuple[int, bytes | None]]:
    """Yield (repetition level, value) of a chunk, page by page."""
    position, dictionary = chunk.start, None
    while position < chunk.start + chunk.size:
        header, start = read_struct(content[position : position + MAX_HEADER], 0)
        body = _open(content, position + start, header[3], header[2], chunk.codec)
        position += start + header[3]
        if header[1] == DICTIONARY_PAGE:
            dictionary = _Values(body)
        elif header[1] == DATA_PAGE:
            yield from _page_entries(body, header[5], chunk, dictionary)
        else:
            raise Unsupported(f"a page of type {header[1]}")


def _page_entries(
    body: Any, header: dict[int, Any], chunk: Chunk, dictionary: "_Values | None"
) -> Iterator[tuple[int, bytes | None]]:
    count, encoding = header[1], header[2]
    if not 0 <= count <= chunk.values:
        raise Unsupported(f"a page of {count} values")
    levels = [
        list(
            islice(decode_runs(_exactly(body, int.from_bytes(_exactly(body, 4), "little")), limit.bit_length()), count)
        )
        if limit
        else [0] * count
        for limit in (chunk.max_repetition, chunk.max_definition)
    ]
    if encoding == PLAIN:
        plain, indices = _Values(body), None
    elif encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY) and dictionary is not None:
        width = _exactly(body, 1)[0]
        plain, indices = dictionary, decode_runs(body.read(), width)
    else:
        raise Unsupported(f"the encoding {encoding}")
    number = 0
    for repetition, definition in zip(*levels, strict=True):
        if definition < chunk.max_definition:
            yield repetition, None
            continue
        yield repetition, plain.get(number if indices is None else next(indices))
        number += 1


class _Values:
    """Values of a stream in the encoding PLAIN, read as far as they are asked for, and kept."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._kept: list[bytes] = []

    def get(self, index: int) -> bytes:
        while len(self._kept) <= index:
            self._kept.append(_exactly(self._stream, int.from_bytes(_exactly(self._stream, 4), "little")))
        return self._kept[index]


def _open(content: mmap.mmap, start: int, compressed: int, size: int, codec: str) -> Any:
    """Return a stream of a page's decoded bytes."""
    if min(start, compressed, size) < 0 or start + compressed > len(content):
        raise Unsupported("a page beyond the file")
    if codec == "SNAPPY":
        return SnappyHead(content, start, start + compressed)
    reader = pa.BufferReader(pa.py_buffer(content).slice(start, compressed))
    if codec == "UNCOMPRESSED":
        return reader
    if codec not in CODECS:
        raise Unsupported(f"the codec {codec}")
    return pa.CompressedInputStream(reader, CODECS[codec])


def _exactly(stream: Any, size: int) -> bytes:
    data: bytes = stream.read(size)
    if len(data) != size:
        raise Unsupported("a page that ends early")
    return data


def decode_runs(data: bytes, width: int) -> Iterator[int]:
    """Yield the integers of `width` bits in the hybrid of run lengths and packed bits."""
    position, size = 0, (width + 7) // 8
    while position < len(data):
        head, position = read_varint(data, position)
        if head & 1:
            length = (head >> 1) * width
            mask = (1 << width) - 1
            for start in range(position, position + length, width) if width else ():
                packed = int.from_bytes(data[start : start + width], "little")  # eight at a time: time is linear
                yield from (packed >> shift & mask for shift in range(0, 8 * width, width))
            yield from (0 for _ in range(0 if width else (head >> 1) * 8))
            position += length
        else:
            value = int.from_bytes(data[position : position + size], "little")
            position += size
            for _ in range(head >> 1):
                yield value


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Return (integer, position behind it). Raises IndexError at the end of the data."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position


def read_struct(data: bytes, position: int) -> tuple[dict[int, Any], int]:
    """Return (field number -> value, position behind it) of a struct in Thrift's compact protocol; texts are skipped.

    Raises Unsupported for kinds of fields that no page header has.
    """
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[position]) != 0:
        position += 1
        kind, delta = head & 15, head >> 4
        if delta:
            number += delta
        else:
            number, position = _read_integer(data, position)
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (3, 4, 5, 6):
            fields[number], position = _read_integer(data, position)
        elif kind == 8:
            length, position = read_varint(data, position)
            position += length
        elif kind == 12:
            fields[number], position = read_struct(data, position)
        else:
            raise Unsupported(f"a field of kind {kind}")
    return fields, position + 1


def _read_integer(data: bytes, position: int) -> tuple[int, int]:
    value, position = read_varint(data, position)
    return (value >> 1) ^ -(value & 1), position
