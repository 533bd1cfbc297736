"""Views of judged images: as many encoded as are asked about, each once, whichever way they go to the server."""

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from thinkimg.conversation.picture import make_picture
from thinkimg.engine import media
from thinkimg.images.settings import ViewLimits
from thinkimg.rewards import views
from thinkimg.rewards.judgement import Pair

GROUPS, MEMBERS, SLOTS, SIDE = 30, 8, 4, 112
LIMITS = ViewLimits(min_pixels=56 * 56, max_pixels=SIDE * SIDE)


class Context:
    """A context whose images are noise; it notes which are asked for."""

    def __init__(self, workers: int = 3):
        self.seen, self.lock = [], threading.Lock()
        self.resources = SimpleNamespace(where=SimpleNamespace(workers=workers))

    def picture(self, sha256: str):
        with self.lock:
            self.seen.append(sha256)
        rng = np.random.default_rng(int(sha256, 16))
        pixels = rng.integers(0, 256, (2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
        return make_picture(Image.fromarray(pixels), LIMITS)


def pairs() -> list[Pair]:
    """Groups that share an original, in the order in which judges see them."""
    return [
        Pair("?", f"{group:x}", f"{1000 * (group + 1) + member:x}")
        for group in range(GROUPS)
        for member in range(MEMBERS)
    ]


@pytest.mark.parametrize("to_file", [True, False])
def test_what_is_encoded_at_a_time_is_bounded_and_nothing_is_encoded_twice(tmp_path, monkeypatch, to_file):
    """However many pairs there are: a chunk of 4,096 conversations would fill a disk, or the memory."""
    context, encoded, sizes, lent = Context(), [], [], 0
    encode = media.Media._encode

    def count(self, uuid, image):
        encoded.append(uuid)
        return encode(self, uuid, image)

    monkeypatch.setattr(media.Media, "_encode", count)
    room = 40 * 3 * SIDE**2
    monkeypatch.setattr(views, "CACHE_BYTES", room)

    async def judge() -> None:
        with views.Views(context, tmp_path if to_file else None, SLOTS) as lender:

            async def ask(pair: Pair) -> None:
                nonlocal lent
                async with lender.lend(pair) as images:
                    lent += 1
                    assert lent <= SLOTS
                    for image, sha256 in zip(images, (pair.original, pair.processed), strict=True):
                        assert image.uuid == context.picture(sha256).uuid
                        assert image.path.is_file() if to_file else image.data
                    sizes.append(lender._media.size)
                    await asyncio.sleep(0.001)
                    lent -= 1

            await asyncio.gather(*map(ask, pairs()))

    asyncio.run(judge())
    assert len(encoded) == len(set(encoded)) == GROUPS * (MEMBERS + 1)
    each = 3 * SIDE**2 + 100 if to_file else 3 * 3 * SIDE**2  # bytes: noise in WebP, and in base64
    assert max(sizes) <= room + 2 * SLOTS * each
    if to_file:
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= room


def test_an_image_that_several_pairs_share_is_seen_once(tmp_path):
    context = Context(workers=1)

    async def judge() -> None:
        with views.Views(context, None, SLOTS) as lender:
            for pair in pairs():
                async with lender.lend(pair):
                    pass

    asyncio.run(judge())
    assert sorted(context.seen) == sorted({sha for pair in pairs() for sha in (pair.original, pair.processed)})
