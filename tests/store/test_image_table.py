"""Images in artifacts: stored so that every reader sees the same, found by hash, in bounded memory."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

from thinkimg.errors import UserError
from thinkimg.images.decode import decode, pixel_hash
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable, encode_lossless, image_writer, keep_or_encode
from thinkimg.store.manifest import Recipe


def noise(seed, width=40, height=30, mode="RGB"):
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), np.random.default_rng(seed).bytes(height * width * bands))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def publish(root, name, images):
    recipe = Recipe("toy", 1, 1, {"name": name})

    def produce(work):
        with work.part("images-00000.parquet") as path, image_writer(path) as add:
            for image in images:
                add(pixel_hash(image), encode_lossless(image), *image.size)

    return Store(root).build("toy", recipe, produce)[0]


def rotated_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(("data", "kept"), [
    (encoded(noise(0)), True),
    (encoded(noise(0), "JPEG"), True),
    (encoded(noise(0), "WEBP"), True),
    (encoded(noise(0), "JPEG", exif=rotated_exif()), False),
    (encoded(noise(0), "PNG", exif=rotated_exif()), False),
    (encoded(noise(0, mode="RGBA")), False),
    (encoded(noise(0, mode="L")), False),
    (encoded(noise(0, mode="CMYK"), "JPEG"), False),
    (encoded(noise(0).quantize(8)), False),
    (encoded(noise(0), transparency=(1, 2, 3)), False),
])  # fmt: skip
def test_a_file_is_kept_only_if_every_reader_sees_the_same_in_it(data, kept):
    image = decode(data)
    stored = keep_or_encode(data, image)
    assert (stored == data) is kept
    with Image.open(io.BytesIO(stored)) as plain:
        assert plain.mode == "RGB" and plain.size == image.size and plain.tobytes() == image.tobytes()
        assert not plain.getexif().get(0x0112)


@pytest.mark.parametrize("size", [(1, 1), (33, 7), (16384, 82)])
def test_encoding_is_lossless_up_to_any_side(size):
    image = noise(1, *size)
    assert decode(encode_lossless(image)).tobytes() == image.tobytes()


def test_images_are_found_across_artifacts_and_row_groups(tmp_path):
    images = [noise(seed) for seed in range(40)]
    one, two = publish(tmp_path, "one", images[:25]), publish(tmp_path, "two", images[20:])
    table = ImageTable([one])
    assert len(table) == 25 and pixel_hash(images[30]) not in table
    table.add(two)
    assert len(table) == 40
    for image in reversed(images):
        assert table.get(pixel_hash(image)) == encode_lossless(image)
        assert table.decoded(pixel_hash(image)).tobytes() == image.tobytes()
    with pytest.raises(KeyError, match="no image"):
        table.get("0" * 64)
    with pytest.raises(UserError, match="no table"):
        ImageTable([Store(tmp_path).build("toy", Recipe("toy", 1, 1, {}), lambda work: work.json("a.json", 1))[0]])


def test_the_cache_of_decoded_images_is_bounded_also_between_threads(tmp_path):
    images = [noise(seed) for seed in range(30)]
    table = ImageTable([publish(tmp_path, "one", images)], cache_bytes=3 * 40 * 30 * 5)
    wrong = []

    def read(offset):
        for i in range(60):
            image = images[(7 * i + offset) % len(images)]
            if table.decoded(pixel_hash(image)).tobytes() != image.tobytes():
                wrong.append(image)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(table._decoded) == 5 and table._room == 0


def test_a_row_group_holds_few_bytes(tmp_path):
    import pyarrow.parquet as pq

    with image_writer(tmp_path / "images.parquet") as add:
        for i in range(20):
            add(f"{i:064x}", bytes(2**20), 1, 1)
        add("f" * 64, bytes(10 * 2**20), 1, 1)
        for i in range(40):
            add(f"{i:063x}e", b"small", 1, 1)
    rows = pq.read_metadata(tmp_path / "images.parquet")
    sizes = [rows.row_group(i).total_byte_size for i in range(rows.num_row_groups)]
    assert rows.num_rows == 61 and max(sizes) < 15 * 2**20
    assert sorted(sizes)[-2] < 5 * 2**20 and all(rows.row_group(i).num_rows <= 16 for i in range(rows.num_row_groups))
