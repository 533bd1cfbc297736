"""The loop against eight simulated servers (benchmarks/simulated_engine.py), which speak the engine's protocol."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from paths import REPOSITORY

from thinkimg.engine.client import EngineClient
from thinkimg.engine.media import Media
from thinkimg.engine.play import EpisodeSpec, Sampler, SamplingMode
from thinkimg.records import StopReason
from thinkimg.store.image_table import ImageTable

SAMPLES, GROUP = 6, 8


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """(a small world, the URLs of its servers)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        import rollouts_at_scale as scale

        world = scale.make_world(tmp_path_factory.mktemp("world"), SAMPLES, side=112)
        with scale.simulated(world, slots=4, speed=200.0) as urls:
            yield world, urls


async def converse(world, urls, folder: Path | None, cache_bytes: int, concurrency: int) -> dict:
    """Return the rows by name, and check that the media stays within its room."""
    specs = [EpisodeSpec(sample, index, SamplingMode(1.0)) for sample in world.samples for index in range(GROUP)]
    media, rows = Media(folder, cache_bytes), {}
    with ThreadPoolExecutor(2) as pool:
        async with EngineClient(urls, media="file" if folder else "data", concurrency=concurrency) as engine:
            sampler = Sampler(world.spec, ImageTable([world.dataset]), "policy", engine, media, pool)
            async for _, episode in sampler.sample(iter(specs)):
                row = episode.trajectory()
                rows[row.trajectory_id] = row
    assert media.size <= cache_bytes
    assert folder is None or sum(path.stat().st_size for path in folder.iterdir()) == media.size
    return rows


def test_rows_depend_on_no_place_bound_or_number_of_servers(servers, tmp_path):
    """Files or data, room for all images or for none, one conversation at a time on one server or all on eight."""
    world, urls = servers
    reference = asyncio.run(converse(world, urls, None, 2**30, 64))
    assert len(reference) == SAMPLES * GROUP
    assert {row.stop for row in reference.values()} == {StopReason.ANSWER}
    assert {len(row.images) for row in reference.values()} >= {2, 3, 4}
    assert asyncio.run(converse(world, urls, tmp_path, 0, 16)) == reference
    assert asyncio.run(converse(world, urls[:1], None, 0, 5)) == reference
