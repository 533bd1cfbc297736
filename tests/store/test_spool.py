"""Rows and images that wait for their part: the table does not depend on the order in which they came."""

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkimg.errors import UserError
from thinkimg.images.decode import pixel_hash
from thinkimg.store import spool
from thinkimg.store.image_table import encode_lossless
from thinkimg.store.spool import ImageSpool, RowSpool
from thinkimg.store.tables import write_table

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("turns", pa.list_(pa.struct([("text", pa.string()), ("status", pa.string())]))),
    ]
)
rows = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.text(max_size=5),
            "tokens": st.lists(st.integers(0, 2**31 - 1), max_size=4),
            "turns": st.lists(
                st.fixed_dictionaries({"text": st.text(max_size=5), "status": st.none() | st.just("ok")}), max_size=3
            ),
        }
    ),
    max_size=2 * spool.ROWS + 3,
)


@settings(max_examples=40, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_rows_make_the_bytes_of_the_table_that_is_made_at_once(tmp_path_factory, rows, random):
    folder, order, spooled = tmp_path_factory.mktemp("rows"), list(range(len(rows))), RowSpool(SCHEMA)
    random.shuffle(order)
    for number in order:
        spooled.add(number, rows[number])
    write_table(folder / "spooled", spooled.table(range(len(rows))))
    write_table(folder / "at once", pa.Table.from_pylist(rows, SCHEMA))
    assert (folder / "spooled").read_bytes() == (folder / "at once").read_bytes()


def picture(number: int) -> tuple[str, Image.Image]:
    image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7 + number, 3), dtype=np.uint8))
    return pixel_hash(image), image


@pytest.mark.parametrize("pending", [0, 1, 16])
def test_images_come_back_by_hash_each_once(tmp_path, monkeypatch, pending):
    encoded: list[Image.Image] = []

    def encode(image: Image.Image) -> bytes:
        encoded.append(image)
        return encode_lossless(image)

    monkeypatch.setattr(spool, "PENDING", pending)
    monkeypatch.setattr(spool, "encode_lossless", encode)
    images = dict(map(picture, range(30)))

    async def run(pool) -> list:
        async with ImageSpool(tmp_path, pool) as spooled:
            for first in range(0, 30, 3):
                await spooled.add(dict(list(images.items())[first : first + 5]))  # some of them come twice
                assert len(spooled._pending) <= pending
            await spooled.done()
            assert not any(tmp_path.iterdir())
            return list(spooled.rows())

    with ThreadPoolExecutor(3) as pool:
        found = asyncio.run(run(pool))
    assert len(encoded) == len(images)
    assert found == [(sha, encode_lossless(images[sha]), *images[sha].size) for sha in sorted(images)]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    async def run(pool) -> None:
        async with ImageSpool(tmp_path, pool) as spooled:
            await spooled.add(dict([picture(1)]))
            await spooled.done()

    monkeypatch.setattr(os, "pwrite", full)
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="No space left"):
        asyncio.run(run(pool))
