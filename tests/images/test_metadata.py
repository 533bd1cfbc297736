"""A good picture with bad metadata is good: whatever stands in a metadata block, the pixels are those without it."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from thinkimg.images.decode import ImageRefused, decode
from thinkimg.images.metadata import JPEG, PNG, without_metadata
from thinkimg.store.image_table import keep_or_encode

KINDS = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
BROKEN_EXIF = [
    b"II*\0\x08\0\0\0\xff\xff",  # more entries than there are
    b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08",
    b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\xff\0\0\0\0",
    b"no TIFF", b"", b"\0", b"II+\0\x08\0\0\0\0\0\0\0\0\0\0\0",
]  # fmt: skip


def picture(mode="RGB"):
    levels = np.random.default_rng(1).integers(256, size=(24, 36, 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def encoded(kind, image=None, **options):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **KINDS[kind], **options)
    return buffer.getvalue()


def png_chunk(kind, data, crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc & 0xFFFFFFFF)


def insert(kind, data, name, block, *, crc=None, last=False):
    """Return a file with one more metadata block: a PNG chunk, a JPEG segment, or a WebP chunk."""
    if kind == "PNG":
        at = len(data) - 12 if last else 33  # before IEND, or behind IHDR
        return data[:at] + png_chunk(name, block, crc) + data[at:]
    if kind == "JPEG":
        return JPEG + b"\xff" + name + struct.pack(">H", len(block) + 2) + block + data[2:]
    if data[12:16] != b"VP8X":
        flags = {b"EXIF": 0x08, b"XMP ": 0x04, b"ICCP": 0x20}[name]
        extended = bytes([flags, 0, 0, 0]) + struct.pack("<I", 35)[:3] + struct.pack("<I", 23)[:3]
        data = data[:12] + b"VP8X" + struct.pack("<I", 10) + extended + data[12:]
    piece = name + struct.pack("<I", len(block)) + block + bytes(len(block) % 2)
    body = data[8:30] + piece + data[30:] if name == b"ICCP" else data[8:] + piece
    return b"RIFF" + struct.pack("<I", len(body)) + body


def blocks():
    """Yield (format, block's name, content, wrong CRC, at the end)."""
    for exif in BROKEN_EXIF:
        yield "PNG", b"eXIf", exif, None, False
        yield "PNG", b"eXIf", b"Exif\0\0" + exif, None, True
        yield "JPEG", b"\xe1", b"Exif\0\0" + exif, None, False
        yield "WEBP", b"EXIF", exif, None, False
        yield "WEBP", b"EXIF", b"Exif\0\0" + exif, None, False
    profile = b"name\0\0" + zlib.compress(b"profile" * 99)
    for name, content in [
        (b"iCCP", profile[:-9]), (b"iCCP", b"no profile"), (b"iCCP", b"n\0\1" + profile), (b"iCCP", b""),
        (b"zTXt", b"Comment\0\0broken"), (b"zTXt", b"Comment\0\7"), (b"zTXt", b""), (b"tEXt", b""),
        (b"tEXt", b"\xff" * 90),
        (b"iTXt", b"k\0\1\0\0\0broken"), (b"iTXt", b"k"), (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x"),
        (b"tEXt", b"Raw profile type exif\0\nexif\n  9\nzz"), (b"pHYs", b"\0"), (b"gAMA", b""), (b"cHRM", b"\0\1"),
        (b"sRGB", b""), (b"tIME", b""), (b"eXIf", b""), (b"bKGD", b"\0"), (b"sBIT", b""),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 * 2**20))),
    ]:  # fmt: skip
        for last in (False, True):
            yield "PNG", name, content, None, last
            yield "PNG", name, content, 12345, last  # another CRC than the content's
    for marker in (b"\xe0", b"\xe1", b"\xe2", b"\xed", b"\xef", b"\xfe"):
        for content in (b"", b"\0", b"JFIF\0", b"Exif\0\0", b"ICC_PROFILE\0\1", b"ICC_PROFILE\0\9\1x", b"MPF\0",
                        b"MPF\0II*\0\x08\0\0\0\xff\xff", b"Photoshop 3.0\0" + b"8BIM\4\x04\0\0\0\0\xff\xff",
                        b"\xff" * 400,
                        b"http://ns.adobe.com/xap/1.0/\0<x"):  # fmt: skip
            yield "JPEG", marker, content, None, False
    for name in (b"XMP ", b"ICCP"):
        for content in (b"", b"\0", b"<x", b"\xff" * 301):
            yield "WEBP", name, content, None, False


def test_every_format_with_every_broken_block_decodes_to_the_pixels_without_it():
    plain = {kind: decode(encoded(kind)).tobytes() for kind in KINDS}
    wrong = []
    for kind, name, content, crc, last in blocks():
        data = insert(kind, encoded(kind), name, content, crc=crc, last=last)
        image = decode(data)
        if image.tobytes() != plain[kind]:
            wrong.append((kind, name, content[:40]))
        kept = decode(keep_or_encode(data, image))  # and what is stored of it can be read by anybody
        assert kept.tobytes() == image.tobytes()
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_orientation_counts_beside_a_broken_block(kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(kind, exif=exif)
    name, content = {"PNG": (b"zTXt", b"x\0\0broken"), "JPEG": (b"\xe2", b"MPF\0II"), "WEBP": (b"XMP ", b"<x")}[kind]
    assert decode(insert(kind, data, name, content)).tobytes() == decode(data).tobytes()
    assert decode(data).size == (24, 36)


def test_a_webp_with_damage_elsewhere_keeps_its_orientation():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded("WEBP", exif=exif)
    upright = decode(data)
    assert upright.size == (24, 36)
    wrong_size = data[:4] + struct.pack("<I", 10**6) + data[8:]
    cut_xmp = data[:4] + struct.pack("<I", len(data) + 100) + data[8:] + b"XMP " + struct.pack("<I", 100) + b"abc"
    for damaged in (wrong_size, cut_xmp):
        assert decode(damaged).tobytes() == upright.tobytes() and decode(damaged).size == upright.size


def test_a_jpeg_with_a_short_adobe_segment_is_good():
    data = encoded("JPEG")
    assert decode(data[:2] + b"\xff\xee\x00\x07Adobe" + data[2:]).tobytes() == decode(data).tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_colours_and_transparency_are_no_metadata(kind):
    broken = {"PNG": (b"zTXt", b"x\0\0broken"), "JPEG": (b"\xe1", b"Exif\0\0II"), "WEBP": (b"EXIF", b"II")}[kind]
    for mode in {"PNG": ("P", "L", "LA", "RGBA", "1", "I;16"), "JPEG": ("L", "CMYK"), "WEBP": ("RGBA",)}[kind]:
        image = picture("L" if mode == "I;16" else mode)
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image
        data = encoded(kind, image)
        name, content = broken
        damaged = insert(kind, data, name, content) if data[12:16] != b"VP8X" else data
        assert decode(damaged).tobytes() == decode(data).tobytes(), mode
        assert decode(without_metadata(data)).tobytes() == decode(data).tobytes(), mode


@given(st.integers(0, 2**32), st.sampled_from(sorted(KINDS)), st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_damage_inside_a_metadata_block_never_changes_a_pixel(seed, kind, count):
    rng = random.Random(seed)
    exif = Image.Exif()
    exif[ExifTags.Base.Artist], exif[ExifTags.Base.Make] = "somebody", "camera"
    data = encoded(kind, exif=exif)
    at = data.index(b"somebody") - rng.randrange(40)
    changed = bytearray(data)
    for _ in range(count):
        place = at + rng.randrange(40)
        if data.index(b"somebody") - 30 <= place < data.index(b"somebody") + 8:
            changed[place] = rng.randrange(256)
    image = decode(bytes(changed))
    # The same pixels: the damage may have made an orientation, which turns them.
    assert sorted(image.tobytes()) == sorted(decode(data).tobytes())


@given(st.binary(max_size=200), st.sampled_from([b"", PNG, JPEG, b"RIFF\0\0\0\0WEBP", JPEG + b"\xff\xe1\0\x08"]))
def test_any_bytes_are_stripped_once_and_for_all(tail, head):
    bare = without_metadata(head + tail)
    assert without_metadata(bare) == bare
    with pytest.raises(ImageRefused):
        decode(head + tail)
