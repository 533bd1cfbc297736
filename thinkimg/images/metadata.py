"""Removal of metadata from encoded images: what does not change a pixel may be damaged without harm.

PNG: https://www.w3.org/TR/png-3/ 5.3; JPEG: ITU-T T.81, B.1.1; WebP: RFC 9649, 2.
"""

import struct
import zlib
from collections.abc import Iterator

PNG, JPEG, RIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"RIFF"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"IEND")
WEBP_METADATA = (b"ICCP", b"EXIF", b"XMP ")
WEBP_FLAGS = 0x20 | 0x08 | 0x04
"""Bits of a VP8X chunk that announce these."""
WEBP_EXIF = 0x08
TIFF = (b"II*\0", b"MM\0*")
"""Beginnings of what an EXIF block holds."""
JFIF, EXIF, ADOBE = 0xE0, 0xE1, 0xEE
START_OF_SCAN = 0xDA
ADOBE_LENGTH = 14
"""Least length of an Adobe segment, with the two bytes of the length itself."""


def without_metadata(data: bytes) -> bytes:
    """Return a PNG, JPEG or WebP file without the parts that no pixel depends on; other bytes as they are.

    An EXIF block stays where it is whole, since it holds the orientation. So does JPEG's Adobe segment, which names the
    colours. Raises nothing, whatever the bytes are.
    """
    if data.startswith(PNG):
        return PNG + b"".join(_png_chunks(data))
    if data.startswith(JPEG):
        return JPEG + b"".join(_jpeg_segments(data))
    if data.startswith(RIFF) and data[8:12] == b"WEBP":
        body = b"".join(_webp_chunks(data))
        return RIFF + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    return data


def _png_chunks(data: bytes) -> Iterator[bytes]:
    at = len(PNG)
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        chunk = data[at : at + 12 + length]
        is_whole = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if kind in PNG_PIXELS or (kind == b"eXIf" and is_whole):
            yield chunk
        at += 12 + length


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    at = len(JPEG)
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == START_OF_SCAN or length < 2:
            break
        segment = data[at : at + 2 + length]
        is_metadata = JFIF <= marker <= 0xEF or marker == 0xFE  # APP0 to APP15, and comments
        is_adobe = marker == ADOBE and len(segment) - 2 >= ADOBE_LENGTH
        if not is_metadata or is_adobe or (marker == EXIF and segment[4:10] == b"Exif\0\0"):
            yield segment
        at += 2 + length
    yield data[at:]


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    chunks, at = [], 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + length + length % 2
        is_exif = data[at : at + 4] == b"EXIF"
        is_whole = end <= len(data) and data[at + 8 : end].removeprefix(b"Exif\0\0").startswith(TIFF)
        if data[at : at + 4] not in WEBP_METADATA or (is_exif and is_whole):
            chunks.append(data[at:end])
        at = end
    flags = WEBP_EXIF if any(chunk.startswith(b"EXIF") for chunk in chunks) else 0
    for chunk in chunks:
        if chunk.startswith(b"VP8X") and len(chunk) > 8:
            chunk = chunk[:8] + bytes([chunk[8] & ~WEBP_FLAGS | chunk[8] & flags]) + chunk[9:]
        yield chunk
