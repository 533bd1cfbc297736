"""Images on their way to the engine: bounded, and there for whoever needs them."""

import asyncio
import base64
import io
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkimg.engine.media import Media
from thinkimg.engine.request import ImageRef

SIDE = 8
PICTURES = [(f"picture {i}", Image.new("RGB", (SIDE + i, SIDE), (i, 2 * i, 255 - i))) for i in range(12)]


def read(media: Media, ref: ImageRef) -> Image.Image:
    """The picture as an engine finds it."""
    data = ref.path.read_bytes() if media.folder else base64.b64decode(ref.url("data").partition(",")[2])
    return Image.open(io.BytesIO(data)).convert("RGB")


def check_room(media: Media, held: list[list[str]]) -> None:
    """No more is kept than the room, and what requests under way hold."""
    needed = {uuid for uuids in held for uuid in uuids}
    sizes = {uuid: entry.size for uuid, entry in media._entries.items()}
    assert media.size == sum(sizes.values())
    assert media.size <= media.cache_bytes + sum(sizes.get(uuid, 0) for uuid in needed)
    if media.folder:
        assert sum(path.stat().st_size for path in media.folder.iterdir()) == media.size


conversations = st.lists(st.lists(st.integers(0, len(PICTURES) - 1), min_size=1, max_size=5), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(conversations, st.integers(0, 2000), st.booleans(), st.randoms(use_true_random=False))
def test_every_request_finds_its_images_and_no_more_are_kept_than_there_is_room(talks, room, files, random):
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        media, held = Media(Path(folder) if files else None, room), []

        async def converse(numbers: list[int]) -> None:
            for turn in range(1, len(numbers) + 1):  # a turn shows the images of those before it as well
                views = [PICTURES[number] for number in numbers[:turn]]
                async with media.lend(views, pool) as refs:
                    held.append([uuid for uuid, _ in views])
                    for _ in range(random.randrange(4)):
                        await asyncio.sleep(0)
                    assert [ref.uuid for ref in refs] == held[-1] or len(held) > 1
                    for ref, (uuid, image) in zip(refs, views, strict=True):
                        assert ref.uuid == uuid and read(media, ref).tobytes() == image.tobytes()
                    held.remove([uuid for uuid, _ in views])

        async def run() -> None:
            tasks = [asyncio.create_task(converse(numbers)) for numbers in talks]
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0)
            await asyncio.gather(*tasks)

        asyncio.run(run())
        check_room(media, [])


def test_room_is_kept_while_requests_are_under_way(tmp_path):
    sizes = [3 * (SIDE + i) * SIDE + len(f"P6\n{SIDE + i} {SIDE}\n255\n") for i in range(len(PICTURES))]
    media = Media(tmp_path, cache_bytes=sizes[0] + sizes[1])
    first = media.hold([PICTURES[0]])
    for number in (1, 2, 3):
        media.release(media.hold([PICTURES[number]]))
        check_room(media, [["picture 0"]])
    assert read(media, first[0]).tobytes() == PICTURES[0][1].tobytes()
    media.release(first)
    assert media.size <= media.cache_bytes and set(media._entries) == {"picture 0"}


def test_the_image_that_was_used_longest_ago_goes_first(tmp_path):
    media = Media(tmp_path, cache_bytes=3 * (SIDE + 3) * SIDE * 2)
    for number in (0, 1, 0, 2):
        media.release(media.hold([PICTURES[number]]))
    assert set(media._entries) == {"picture 0", "picture 2"}


def test_an_image_is_encoded_once_by_the_first_of_several_threads(tmp_path, monkeypatch):
    media, encoded, free = Media(tmp_path), [], threading.Event()
    encode = Media._encode

    def slow(self, uuid, image):
        encoded.append(uuid)
        assert free.wait(30)
        return encode(self, uuid, image)

    monkeypatch.setattr(Media, "_encode", slow)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(media.hold, PICTURES[:1]) for _ in range(4)]
        free.set()
        refs = [future.result() for future in waiting]
    assert encoded == ["picture 0"] and len({id(ref) for (ref,) in refs}) == 1


@pytest.mark.parametrize("fails", [True, False])
def test_a_hold_that_fails_or_is_given_up_holds_nothing(tmp_path, monkeypatch, fails):
    """Whoever is cancelled while the pool encodes has no context to leave: the thread gives back what it holds."""
    media, begun, free = Media(tmp_path, cache_bytes=0), threading.Event(), threading.Event()
    encode = Media._encode

    def slow(self, uuid, image):
        begun.set()
        assert free.wait(30)
        if fails and uuid == "picture 1":
            raise OSError("disk")
        return encode(self, uuid, image)

    monkeypatch.setattr(Media, "_encode", slow)

    async def lend(pool) -> None:
        async with media.lend(PICTURES[:2], pool):
            raise AssertionError("not reached")

    async def run(pool) -> None:
        task = asyncio.create_task(lend(pool))
        await asyncio.to_thread(begun.wait, 30)
        if not fails:
            task.cancel()
        free.set()
        with pytest.raises(OSError if fails else asyncio.CancelledError):
            await task

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(run(pool))
    assert media.size == 0 and not any(entry.users for entry in media._entries.values())
    media.release(media.hold(PICTURES[:1]))
