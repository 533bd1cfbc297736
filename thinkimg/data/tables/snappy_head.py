"""Beginning of a block that Snappy has compressed, decoded no further than it is read.

Format: https://github.com/google/snappy/blob/main/format_description.txt. Arrow's codec decodes whole blocks alone.
"""

import mmap


class SnappyHead:
    """Stream of a block's decoded bytes. Raises ValueError or IndexError for a damaged block."""

    def __init__(self, content: mmap.mmap | bytes, start: int, end: int) -> None:
        self._content, self._position, self._end = content, start, end
        self._decoded = bytearray()
        self._read = 0
        while content[self._position] >= 128:  # the length of the whole
            self._position += 1
        self._position += 1

    def read(self, size: int | None = None) -> bytes:
        """Return the next bytes: `size` of them, at most, or all."""
        while self._position < self._end and (size is None or len(self._decoded) < self._read + size):
            self._decode_element()
        end = len(self._decoded) if size is None else self._read + size
        data = bytes(memoryview(self._decoded)[self._read : end])
        self._read += len(data)
        return data

    def _decode_element(self) -> None:
        content, position = self._content, self._position
        tag = content[position]
        position += 1
        if tag & 3 == 0:
            length = tag >> 2
            if length >= 60:
                count = length - 59
                length = int.from_bytes(content[position : position + count], "little")
                position += count
            length += 1
            if position + length > self._end:
                raise ValueError("a literal beyond its block")
            self._decoded += content[position : position + length]
            self._position = position + length
            return
        if tag & 3 == 1:
            length, size = 4 + (tag >> 2 & 7), 1
            offset = (tag >> 5) << 8 | content[position]
        else:
            length, size = 1 + (tag >> 2), 2 if tag & 3 == 2 else 4
            offset = int.from_bytes(content[position : position + size], "little")
        self._position = position + size
        start = len(self._decoded) - offset
        if offset == 0 or start < 0:
            raise ValueError("a copy from before its block")
        piece = self._decoded[start : start + length]
        while len(piece) < length:  # a copy may overlap with itself
            piece += piece[: length - len(piece)]
        self._decoded += piece
