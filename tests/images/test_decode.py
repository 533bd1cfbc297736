"""Decoding: images as people have them, and bytes as attackers have them."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits, ImageRefused, RefusalReason, decode, encode_png, pixel_hash

GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6  # PNG colour types


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width, height, bits, colour, rows, transparent=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    extra = chunk(b"tRNS", transparent) if transparent else b""
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + chunk(b"IEND", b"")


def gradient(width=48, height=32):
    xs, ys = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([xs * 5, ys * 7, (xs + ys) * 3], axis=-1).astype(np.uint8))


def pixels(image):
    return [tuple(pixel) for row in np.asarray(image).tolist() for pixel in row]


def refusal(data, limits=None):
    with pytest.raises(ImageRefused) as caught:
        decode(data, limits or ImageLimits())
    assert caught.value.detail
    return caught.value.reason


def test_user_error_tells_its_hint():
    assert str(UserError("It is wrong.", hint="Do it right.")) == "It is wrong. Hint: Do it right."
    assert str(UserError("It is wrong.")) == "It is wrong."


# ---- images as people have them


@given(st.integers(1, 40), st.integers(1, 40), st.randoms(use_true_random=False))
def test_png_round_trip_is_lossless(width, height, rng):
    image = Image.frombytes("RGB", (width, height), rng.randbytes(width * height * 3))
    again = decode(encode_png(image))
    assert (again.mode, again.size, again.tobytes()) == ("RGB", image.size, image.tobytes())
    assert pixel_hash(again) == pixel_hash(image)


def test_pixel_hash_depends_on_pixels_size_and_mode_alone():
    image = Image.new("RGB", (6, 2), (1, 2, 3))
    hashes = [pixel_hash(image), pixel_hash(image.resize((2, 6))), pixel_hash(Image.new("RGB", (6, 2), (1, 2, 4)))]
    hashes.append(pixel_hash(Image.frombytes("L", (6, 6), image.tobytes())))
    assert len(set(hashes)) == 4
    assert pixel_hash(decode(encoded(image, "WEBP", lossless=True))) == hashes[0]


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing: upright
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(gradient(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = decode(data)
    assert image.size == ((32, 48) if 5 <= orientation <= 8 else (48, 32))
    assert image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_unreadable_exif_means_upright(kind):
    data = encoded(gradient(), kind, exif=b"Exif\0\0no TIFF header here")
    assert decode(data).tobytes() == decode(encoded(gradient(), kind)).tobytes()


def test_cmyk_jpeg():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow make red
    (red, green, blue), *_ = pixels(decode(encoded(ink, "JPEG", quality=100)))
    assert red > 245 and green < 10 and blue < 10


def test_palette_and_its_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    assert pixels(decode(encoded(image))) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert pixels(decode(encoded(image, transparency=1))) == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
    half = decode(encoded(image, transparency=bytes([255, 0, 128])))
    assert pixels(half) == [(255, 0, 0), (255, 255, 255), (127, 127, 255)]


def test_bilevel_and_grey():
    assert pixels(decode(raw_png(4, 1, 1, GREY, [b"\x50"]))) == [(v,) * 3 for v in (0, 255, 0, 255)]
    assert pixels(decode(raw_png(2, 1, 8, GREY, [b"\x07\xc8"]))) == [(7,) * 3, (200,) * 3]


@pytest.mark.parametrize(
    "bits, row, levels", [(1, 0b01000000, (0, 255)), (2, 0b01110000, (85, 255)), (4, 0x1F, (17, 255))]
)
def test_low_bit_grey_with_a_transparent_level(bits, row, levels):
    assert pixels(decode(raw_png(2, 1, bits, GREY, [bytes([row])]))) == [(levels[0],) * 3, (levels[1],) * 3]
    first_is_white = raw_png(2, 1, bits, GREY, [bytes([row])], struct.pack(">H", row >> (8 - bits)))
    assert pixels(decode(first_is_white)) == [(255,) * 3, (levels[1],) * 3]


def test_16_bit_is_scaled_not_clipped():
    levels = np.array([0, 1000, 32768, 65535], dtype=">u2")
    expected = [(v,) * 3 for v in (0, 3, 128, 255)]
    assert pixels(decode(raw_png(4, 1, 16, GREY, [levels.tobytes()]))) == expected
    assert pixels(decode(raw_png(4, 1, 16, RGB, [np.repeat(levels, 3).tobytes()]))) == expected
    masked = raw_png(4, 1, 16, GREY, [levels.tobytes()], struct.pack(">H", 1000))
    assert pixels(decode(masked)) == [(0,) * 3, (255,) * 3, (128,) * 3, (255,) * 3]


@given(st.integers(0, 255))
def test_8_bit_levels_survive_16_bit_files(level):
    assert pixels(decode(raw_png(1, 1, 16, GREY, [bytes([level, level])]))) == [(level,) * 3]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(kind):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 100, 0, 255), (200, 100, 0, 128), (200, 100, 0, 0)])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert pixels(decode(encoded(image, kind, **options))) == [(200, 100, 0), (227, 177, 127), (255, 255, 255)]


def test_grey_alpha_and_transparent_colours():
    grey_alpha = raw_png(2, 1, 8, GREY_ALPHA, [bytes([0, 255, 0, 0])])
    assert pixels(decode(grey_alpha)) == [(0, 0, 0), (255, 255, 255)]
    colour = raw_png(2, 1, 8, RGB, [bytes([5, 6, 7, 9, 9, 9])], struct.pack(">HHH", 5, 6, 7))
    assert pixels(decode(colour)) == [(255, 255, 255), (9, 9, 9)]
    assert pixels(decode(raw_png(1, 1, 16, RGBA, [struct.pack(">4H", 65535, 0, 0, 0)]))) == [(255, 255, 255)]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    image = decode(data)
    assert image.size == (20, 10) and set(pixels(image)) == {(255, 0, 0)}


def test_a_phones_multi_picture_file_is_a_jpeg():
    data = encoded(gradient(), "MPO", save_all=True, append_images=[Image.new("RGB", (48, 32))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert decode(data).tobytes() == decode(encoded(gradient(), "JPEG")).tobytes()


def test_no_metadata_is_left():
    exif, notes = Image.Exif(), PngImagePlugin.PngInfo()
    exif[ExifTags.Base.Artist] = "somebody"
    notes.add_text("Comment", "secret")
    for data in (
        encoded(gradient(), "PNG", pnginfo=notes, exif=exif, icc_profile=b"profile" * 30, dpi=(72, 72)),
        encoded(gradient(), "JPEG", exif=exif, icc_profile=b"profile" * 30, comment=b"secret", dpi=(72, 72)),
        encoded(gradient(), "WEBP", exif=exif, icc_profile=b"profile" * 30, xmp=b"<x/>"),
    ):
        image = decode(data)
        assert type(image) is Image.Image and image.info == {} and not image.getexif()
        png, kinds, at = encode_png(image), set(), 8
        while at < len(png):
            kinds.add(png[at + 4 : at + 8])
            at += 12 + int.from_bytes(png[at : at + 4], "big")
        assert kinds == {b"IHDR", b"IDAT", b"IEND"}


# ---- limits, and bytes as attackers have them


def test_limits_are_inclusive():
    data = encoded(Image.new("RGB", (200, 1)))
    assert decode(data, ImageLimits(max_bytes=len(data), max_pixels=200)).size == (200, 1)
    assert refusal(data, ImageLimits(max_bytes=len(data) - 1)) is RefusalReason.BYTES
    assert refusal(data, ImageLimits(max_pixels=199)) is RefusalReason.PIXELS
    assert refusal(encoded(Image.new("RGB", (1, 201)))) is RefusalReason.ASPECT
    assert decode(encoded(Image.new("RGB", (1, 1), "red"))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "side", [7072, 12_000, 60_000]
)  # above our limit, above Pillow's warning, above Pillow's error
def test_a_bomb_is_refused_before_it_is_decoded(side, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert refusal(raw_png(side, side, 8, RGB, [b""])) is RefusalReason.PIXELS


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(kind):
    assert refusal(encoded(gradient(), kind)) is RefusalReason.FORMAT


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"not an image", raw_png(0, 1, 8, GREY, [b""])])
def test_what_has_no_readable_header(data):
    assert refusal(data) is RefusalReason.FORMAT


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_refused(kind):
    data = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
    for tenths in range(10):
        assert refusal(data[: len(data) * tenths // 10]) in (RefusalReason.FORMAT, RefusalReason.BROKEN)


def seeds():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "somebody"
    image, alpha = gradient(), gradient().convert("RGBA")
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "c" * 50, zip=True)
    yield encoded(image, "PNG", exif=exif, pnginfo=notes, icc_profile=b"profile" * 9)
    yield encoded(image.quantize(16), "PNG", transparency=3)
    yield raw_png(8, 8, 16, GREY, [bytes(range(16))] * 8, struct.pack(">H", 1))
    yield raw_png(8, 8, 2, GREY, [bytes([27, 228])] * 8, struct.pack(">H", 1))
    yield encoded(alpha, "PNG", save_all=True, append_images=[alpha.transpose(Image.Transpose.ROTATE_180)])
    yield encoded(image, "JPEG", exif=exif, comment=b"hello", icc_profile=b"profile" * 9)
    yield encoded(image, "JPEG", progressive=True)
    yield encoded(image.convert("CMYK"), "JPEG")
    yield encoded(image, "MPO", save_all=True, append_images=[image])
    yield encoded(image, "WEBP", exif=exif, xmp=b'<x tiff:Orientation="6"/>')
    yield encoded(alpha, "WEBP", lossless=True)
    yield encoded(alpha, "WEBP", save_all=True, append_images=[alpha.transpose(Image.Transpose.ROTATE_180)])


def fix_png_checksums(data):
    """Pillow refuses most damage to a PNG by its checksums: with them right, the mutation gets further in."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        out += chunk(bytes(data[at + 4 : at + 8]), bytes(data[at + 8 : at + 8 + length]))
        at += 12 + length
    return bytes(out)


def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        # Headers are where parsers branch: half of the damage goes there.
        at = rng.randrange(min(len(data), rng.choice([200, len(data)])))
        match rng.randrange(5):
            case 0:
                data[at] = rng.choice([0, 1, 127, 128, 255])
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at : at + rng.randrange(1, 30)] = b""
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                data[at : at + 4] = rng.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"eXIf", b"fdAT"]
                )
        data = data or bytearray(b"\0")
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:
        return fix_png_checksums(bytes(data))
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow comments on damaged metadata that it gets over
def test_mutated_files_decode_to_rgb_or_are_refused():
    rng = random.Random(0)
    files = list(seeds())
    outcomes = {"decoded": 0, **{reason: 0 for reason in RefusalReason}}
    for _ in range(6000):
        try:
            image = decode(mutate(rng.choice(files), rng), ImageLimits(max_pixels=1_000_000))
        except ImageRefused as refused:
            outcomes[refused.reason] += 1
        else:
            assert image.mode == "RGB" and image.info == {} and min(image.size) >= 1
            assert len(image.tobytes()) == image.width * image.height * 3
            outcomes["decoded"] += 1
    # The mutations reach every branch but that of BYTES.
    assert outcomes["decoded"] > 500 and outcomes[RefusalReason.BROKEN] > 500
    assert [reason for reason, count in outcomes.items() if count == 0] == [RefusalReason.BYTES]


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\0\0\0WEBPVP8X"])
)
def test_arbitrary_bytes_are_refused(data, magic):
    assert refusal(magic + data) in RefusalReason
