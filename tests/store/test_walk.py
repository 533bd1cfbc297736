"""Digest of a directory that is no artifact: links count by what they lead to."""

import pytest

from thinkimg.errors import UserError
from thinkimg.store.manifest import directory_digest


def test_a_model_of_links_has_the_digest_of_its_files(tmp_path):
    plain, linked = tmp_path / "plain", tmp_path / "linked"
    (plain / "tokenizer").mkdir(parents=True)
    (plain / "config.json").write_text("{}")
    (plain / "tokenizer" / "vocabulary.txt").write_text("a b")
    linked.mkdir()
    (linked / "config.json").symlink_to(plain / "config.json")
    (linked / "tokenizer").symlink_to(plain / "tokenizer")
    assert directory_digest(linked) == directory_digest(plain)
    (linked / "again").symlink_to(linked)  # a loop
    assert directory_digest(linked) == directory_digest(plain)
    (linked / "weights.safetensors").symlink_to(tmp_path / "blobs" / "lost")
    with pytest.raises(UserError, match=r"weights.safetensors is a broken link: it leads to .*lost"):
        directory_digest(linked)
