"""Ids, cards, and names of files of the Hub: which data set, which tables and which split are meant."""

import fnmatch
import re

import pytest
from hub_server import CARD
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.data.hub.card import choose_tables, group_by_split, matches, read_card
from thinkimg.data.hub.public_sets import is_id, read_remote
from thinkimg.errors import UserError

ID = "someone/a-set"
KEYS = ["config_name", "data_files", "split", "path", "data_dir", "default", "license"]


@pytest.mark.parametrize(
    ("path", "id"),
    [
        ("owner/name", "owner/name"), ("owner/name@validation", "owner/name"), ("a/b.c-d_e", "a/b.c-d_e"),
        ("data/train.jsonl", None), ("owner/pictures.ZIP", None), ("here/there", None), ("../up/x", None),
        ("/abs/x", None), ("a/b/c", None), ("owner", None), ("owner/", None), ("owner/a--b", None), ("a..b/c", None),
        ("owner/na me", None), ("owner/name\n", None), ("öwner/name", None), ("owner/x.git", None), ("", None),
    ],
)  # fmt: skip
def test_an_id_is_told_from_a_path(tmp_path, monkeypatch, path, id):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    remote = read_remote(path)
    assert (remote and remote.id) == id
    assert path != "here/there" or read_remote(path, is_explicit=True).id == path


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=80), st.sampled_from(["", "a/b@", "gqa@"]))
def test_any_text_is_a_remote_name_or_none_or_a_mistake(text, start):
    try:
        remote = read_remote(start + text)
    except UserError as error:
        assert "\n" not in str(error)
        return
    except (OSError, ValueError):
        raise AssertionError(ascii(text)) from None
    if remote is not None:
        assert is_id(remote.id) and re.fullmatch(r"[\w.-]+", remote.split or "x")


def test_a_split_is_what_the_card_says_and_else_what_the_files_are_called():
    names = ["README.md", "data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "more/x.json"]
    card = read_card(CARD)
    assert card.licence == "mit" and choose_tables(names, card, None, None, ID) == names[1:2]
    assert choose_tables(names, card, None, "validation", ID) == names[2:3]
    assert choose_tables(names, card, "more", None, ID) == names[3:]
    with pytest.raises(UserError, match="has no split 'test': it has train, validation") as error:
        choose_tables(names, card, None, "test", ID)
    assert f"{ID}@train" in error.value.hint
    bare = read_card("# Nothing")
    assert choose_tables(names, bare, None, None, ID) == names[1:2]
    assert choose_tables(names, bare, "more", None, ID) == names[3:]
    with pytest.raises(UserError, match="has no configuration 'mor'"):
        choose_tables(names, card, "mor", None, ID)
    two = read_card(CARD.replace("config_name: default", "config_name: one"))
    with pytest.raises(UserError, match="several configurations: more, one"):
        choose_tables(names, two, None, None, ID)
    with pytest.raises(UserError, match="several kinds: a.tsv, b.parquet"):
        choose_tables(["a.tsv", "b.parquet"], bare, None, None, ID)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["a.jsonl", "b.jsonl"], {"train": ["a.jsonl", "b.jsonl"]}),
        (["train.json", "val.json", "notes.json"], {"train": ["train.json"], "validation": ["val.json"]}),
        (["test/q.csv", "train/q.csv"], {"train": ["train/q.csv"], "test": ["test/q.csv"]}),
        (["constraints.json"], {"train": ["constraints.json"]}),
        (["data/testmini-00000-of-00001-ab12.parquet"], {"testmini": ["data/testmini-00000-of-00001-ab12.parquet"]}),
        (["latest.json"], {"train": ["latest.json"]}),
        (["a-00000-of-00001.parquet", "test.json"], {"a": ["a-00000-of-00001.parquet"]}),
    ],
)  # fmt: skip
def test_names_of_files_say_the_split(names, splits):
    assert group_by_split(names) == splits


@given(
    st.lists(st.text("ab.-", min_size=1, max_size=3), min_size=1, max_size=4),
    st.lists(st.sampled_from(["*", "**", "a", "a*", "*b", "?", "ab.-", "[ab]*"]), min_size=1, max_size=4),
)
def test_a_pattern_fits_as_a_glob_does(parts, wanted):
    def fits(parts, wanted):
        """The definition, without a thought of time."""
        if not wanted:
            return not parts
        if wanted[0] == "**":
            return fits(parts, wanted[1:]) or (bool(parts) and fits(parts[1:], wanted))
        return bool(parts) and fnmatch.fnmatchcase(parts[0], wanted[0]) and fits(parts[1:], wanted[1:])

    assert matches("/".join(parts), "/".join(wanted)) == fits(parts, wanted)


def test_a_pattern_of_many_stars_takes_no_time_to_speak_of():
    """A regular expression would need longer than the universe is old; the end of the test is the assertion."""
    assert not matches("/".join("a" * 300), "/".join(["**", "a"] * 150 + ["b"]))
    assert not matches("a" * 3000, "*a" * 200 + "b")


@given(st.text(max_size=200), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(KEYS), inner, max_size=4
    ),
    max_leaves=12,
))  # fmt: skip
def test_no_card_can_do_harm(text, value):
    import yaml

    read_card(text)
    card = read_card(f"---\n{yaml.safe_dump({'configs': value, 'license': value})}\n---\n")
    for config in card.configs.values():
        assert all(isinstance(pattern, str) for patterns in config.values() for pattern in patterns)
