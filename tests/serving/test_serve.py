"""Start of the endpoint: what it makes of the settings."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from chat_codecs import qwen_directory
from chat_server import LIMITS

from thinkimg.config.load import load_config
from thinkimg.engine.media import Media
from thinkimg.resources import Resources
from thinkimg.serving.keeper import EngineKeeper
from thinkimg.serving.serve import Sources, make_connect, make_service
from thinkimg.stages.rollout import settings_of


@pytest.mark.parametrize("urls", ["[]", "[http://127.0.0.1:1]"])
def test_encoded_pictures_have_the_room_of_the_settings(urls, tmp_path):
    """In files that an engine of its own reads, which go with the endpoint; in memory for those of others."""
    overrides = [f"where.store={tmp_path}", f"where.engine.urls={urls}", "where.engine.image_cache_gib=3"]
    config = load_config("tiny", overrides)
    policy, settings = SimpleNamespace(digest="d" * 64, vocabulary=qwen_directory()), settings_of(config)
    with Resources(config.where) as resources:
        with ExitStack() as stack:
            keeper = EngineKeeper(make_connect(policy, settings, resources))
            media: Media = make_service(policy, settings, resources, Sources(LIMITS, None, ()), keeper, stack).media
            assert media.cache_bytes == 3 * 2**30
            assert media.folder is None if urls != "[]" else media.folder.parent == resources.media
        assert media.folder is None or not media.folder.exists()
