"""The rollout stage: parts are written while the conversations go on, one at a time, and no error is lost."""

import asyncio
import threading

import pytest

from thinkimg.stages import rollout
from thinkimg.stages.rollout import Writer


class Disk:
    """In place of write_part: holds each part until it is let go."""

    def __init__(self):
        self.begun, self.ended, self.error = [], [], None
        self.free = threading.Event()

    def __call__(self, part: int) -> None:
        self.begun.append(part)
        assert self.free.wait(30)
        if self.error is not None:
            raise self.error
        self.ended.append(part)


@pytest.fixture
def disk(monkeypatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(rollout, "write_part", disk)
    return disk


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def test_conversations_go_on_while_a_part_is_written_and_the_next_part_waits_for_it(disk):
    async def run() -> None:
        async with Writer() as writer:
            await writer.write(0)
            await until(lambda: disk.begun == [0])
            second = asyncio.create_task(writer.write(1))
            await asyncio.sleep(0.05)
            assert disk.begun == [0] and not second.done()
            disk.free.set()
            await second
        assert disk.ended == [0, 1]

    asyncio.run(run())


@pytest.mark.parametrize("at", ["the next part", "the end"])
def test_a_part_that_can_not_be_written_ends_the_stage(disk, at):
    async def run() -> None:
        async with Writer() as writer:
            await writer.write(0)
            if at == "the next part":
                await writer.write(1)
                raise AssertionError("not reached")

    disk.error = OSError("disk full")
    disk.free.set()
    with pytest.raises(OSError, match="disk full"):
        asyncio.run(run())
    assert disk.begun == [0]


def test_what_has_ended_the_conversations_is_told_first(disk, caplog):
    async def run() -> None:
        async with Writer() as writer:
            await writer.write(0)
            raise ConnectionError("the engine is gone")

    disk.error = OSError("disk full")
    disk.free.set()
    with pytest.raises(ConnectionError):
        asyncio.run(run())
    assert "disk full" in caplog.text


def test_a_part_is_written_to_its_end_though_the_run_is_cancelled(disk):
    async def stage() -> None:
        async with Writer() as writer:
            await writer.write(0)

    async def run() -> None:
        task = asyncio.create_task(stage())
        await until(lambda: disk.begun == [0])
        await asyncio.sleep(0.01)  # it waits for the part by now
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        disk.free.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert disk.ended == [0]

    asyncio.run(run())
