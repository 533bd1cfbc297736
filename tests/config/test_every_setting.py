"""Every setting with odd values: taken exactly or refused in one sentence, the same from a flag and from a file."""

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from thinkimg.config.load import load_config
from thinkimg.config.tree import Config
from thinkimg.config.values import MAX_LENGTH, is_text
from thinkimg.errors import UserError
from thinkimg.settings import Composite, FilePath, Settings, Variant, find_kinds

TEXTS = [
    "photos #2/q.jsonl", "a: b", "- a", "{a}", "[a]", "!tag", "&a", "*a", "@x", "`x`", "%41", "a?b=c&d", "x, y", "|",
    ">", "~", "~/x #3", "./~", "~nobody-here/x", "null", "Null", "no", "on", "yes", "true", "010", "1e5", "1:30",
    "12_3",
    "2001-01-01", "'q'", '"q"', "\"", "it's", "", " ", " lead", "trail ", "a\tb", "a\nb", "a\\nb", "–é—日本",
    "a\u2028b", "\0", "\x1b[31m", "x\udcff", "x" * 300, "ab/" * 600, "=", "a=b", "..", "$HOME",
    "http://[::1", "http://h:99999/v1",
    "http://h/v1?key=1", "http://user:pass#word@h/v1", "sqlite:////tmp/a?b.db", "sqlite:///~/x.db", "file.with.dots:f",
]  # fmt: skip
NUMBERS = [
    "-1", "0", "1", "1.5", "0.5", "1e-5", "1e400", ".inf", "-.inf", ".nan", "nan", "inf", "true", "false", "yes",
    "1:30", "0x10", "010", "1_000", "", "null", "~", "9" * 40, "9" * 1900, "[1]", "{a: 1}", "abc", "--1", "2001-01-01",
]  # fmt: skip
OTHERS = ["", "x", "[x]", "[1]", "[true]", "[x, x]", "{x: 1}", "{x: true}", "{x: .inf}", "{x: -1}", "[[x]]", "maybe",
          "2", "null", "[", "&a [*a]", "!!binary c3B5", "!!python/object:os.system x", "{a: 1, a: 2}",
          "[" * 1500]  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """One setting that holds a value: its dotted name, its type, and the overrides that bring it into being."""

    name: str
    kind: Any
    base: tuple[str, ...]
    is_path: bool

    def value(self, config: Config) -> Any:
        value: Any = config
        for part in self.name.split("."):
            value = getattr(value, part)
        return value


def leaves(kind: type[Settings] = Config, prefix: str = "", base: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yield every setting, those of each registry's entries included."""
    for name, field in kind.model_fields.items():
        path = f"{prefix}{name}"
        section = next(
            (part for part in find_kinds(field.annotation) if isinstance(part, type) and issubclass(part, Settings)),
            None,
        )
        if section is None:
            parts = [*field.metadata, *find_kinds(field.annotation)]
            is_path = any(item in parts for item in (*FilePath.__metadata__, FilePath))
            yield Leaf(path, field.annotation, base, is_path)
            continue
        added = ("model.tiny={}", "model.adaptation=full") if path == "model.tiny" else ()
        added = ("model.adaptation=full",) if path == "warmstart" else added
        if issubclass(section, Variant):
            for entry in section.registry.shipped:
                own = section.choose({section.chooser: entry})
                more = ("data.path=here",) if "path" in own.model_fields else ()
                more += (f"{path}.vllm_importance_sampling_mode=token_mask",) if entry == "vespo" else ()
                yield from leaves(own, f"{path}.", (*base, f"{path}.{section.chooser}={entry}", *more))
        else:
            yield from leaves(section, f"{path}.", base + added)
        if issubclass(section, Composite):
            for entry in section.registry.shipped:
                if own := getattr(section.registry[entry], "Settings", None):
                    more = () if entry in section.always else (f"{path}.{section.chooser}=[{entry}]",)
                    yield from leaves(own, f"{path}.{entry}.", base + more)


LEAVES = list({(leaf.name, leaf.kind): leaf for leaf in leaves() if leaf.name != "preset"}.values())
TEXT_LEAVES = [leaf for leaf in LEAVES if is_text(leaf.kind)]
NUMBER_LEAVES = [
    leaf for leaf in LEAVES
    if {int, float} & set(find_kinds(leaf.kind)) and not {bool, dict, str} & set(find_kinds(leaf.kind))
]  # fmt: skip
OTHER_LEAVES = [leaf for leaf in LEAVES if leaf not in TEXT_LEAVES and leaf not in NUMBER_LEAVES]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(overrides, tree): the config of a preset file with that tree, or the sentence that refuses it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def load(overrides: tuple[str, ...], tree: dict[str, Any] | None = None) -> Config | str:
        Path("my.yaml").write_text(yaml.safe_dump(tree or {}, allow_unicode=True), encoding="utf-8")
        try:
            return load_config("my.yaml", list(overrides))
        except UserError as error:
            sentence = str(error)
            assert sentence and "\n" not in sentence and len(sentence) < 1200, sentence
            return sentence

    return load


def file(leaf: Leaf, value: Any) -> dict[str, Any]:
    """The tree of a preset file that sets one setting."""
    tree: dict[str, Any] = {}
    for name, item in [*((name, yaml.safe_load(text)) for name, _, text in (o.partition("=") for o in leaf.base)),
                       (leaf.name, value)]:  # fmt: skip
        *above, last = name.split(".")
        section = tree
        for part in above:
            section = section.setdefault(part, {})
        section[last] = item
    return tree


def check_text(load, leaf: Leaf, text: str) -> bool:
    """A text is taken as it is, from a flag as from a file, or refused by both. True if it is taken."""
    plain = load(leaf.base)
    assert isinstance(plain, Config), plain
    by_flag = load((*leaf.base, f"{leaf.name}={text}"))
    try:
        by_file = load((), file(leaf, text))
    except UnicodeEncodeError:  # half a character can't be written to a file
        assert isinstance(by_flag, str)
        return False
    taken = [leaf.value(config) if isinstance(config, Config) else None for config in (by_flag, by_file)]
    exact = os.path.expanduser(text) if leaf.is_path else text
    if leaf.name == "where.tracking.uri" and text.startswith(("sqlite", "~")):
        exact = os.path.expanduser(text.replace("///~", f"///{os.environ['HOME']}"))
    chooses = f"{leaf.name}=" in "".join(leaf.base)
    if isinstance(by_flag, Config):
        assert taken[0] == (None if text == "null" and type(None) in find_kinds(leaf.kind) else exact), (
            leaf,
            text,
            taken,
        )
    if isinstance(by_file, Config) and not chooses:
        assert taken[1] == exact, (leaf, text, taken)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if not (quoted or text == "null" or chooses or len(text) > MAX_LENGTH - 100):
        assert isinstance(by_flag, Config) == isinstance(by_file, Config), (leaf, text, by_flag, by_file)
    return isinstance(by_flag, Config)


def check_number(load, leaf: Leaf, text: str) -> None:
    """A number is taken as Python reads it, and is finite; everything else is refused."""
    by_flag = load((*leaf.base, f"{leaf.name}={text}"))
    by_file = load((), file(leaf, yaml.safe_load(text) if text[:1] in "0123456789-.tf" else text))
    if isinstance(by_flag, str):
        return
    value = leaf.value(by_flag)
    if value is None:
        assert text in ("null", "~") and type(None) in find_kinds(leaf.kind)
        return
    assert not isinstance(value, bool) and math.isfinite(value) and value == float(text) and value < 2**63, (
        leaf,
        text,
        value,
    )
    assert not isinstance(by_file, Config) or text in ("010", "1_000") or leaf.value(by_file) == value, (leaf, text)


def check_other(load, leaf: Leaf, text: str) -> None:
    """A list, a mapping or a switch is what YAML says, or refused."""
    config = load((*leaf.base, f"{leaf.name}={text}"))
    if isinstance(config, str):
        return
    value = leaf.value(config)
    written = load((), file(leaf, yaml.safe_load(text)))
    assert isinstance(written, Config) and leaf.value(written) == value, (leaf, text, value, written)


CHECKS = (
    (check_text, TEXT_LEAVES, TEXTS),
    (check_number, NUMBER_LEAVES, NUMBERS),
    (check_other, OTHER_LEAVES, OTHERS),
)


def test_all_settings_are_looked_at():
    assert len(TEXT_LEAVES) > 35 and len(NUMBER_LEAVES) > 80 and len(OTHER_LEAVES) > 15
    assert sum(leaf.is_path for leaf in TEXT_LEAVES) >= 7


def test_each_odd_value_meets_some_of_the_settings(load):
    """Each setting gets a few of them in turn, each value a few settings; all with all takes a minute."""
    for check, settings, values in CHECKS:
        for position, leaf in enumerate(settings):
            for value in itertools.islice(itertools.cycle(values), position * 5, position * 5 + 5):
                check(load, leaf, value)


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_every_odd_value_meets_every_setting(load, number):
    check, settings, values = CHECKS[number]
    for leaf, value in itertools.product(settings, values):
        check(load, leaf, value)


def test_a_text_is_taken_as_it_is(load):
    """F09: behind ` #` hours of results went to another directory."""
    for name, text in (("where.store", "/data/run #3"), ("model.path", "a: b #c"), ("model.revision", "0123456")):
        config = load((f"{name}={text}",))
        assert Leaf(name, str, (), False).value(config) == text
    assert load(("model.revision=null",)).model.revision is None
    assert "in quotes" in load(('where.store="/data/run"',))
    for text in ("photos #2/q.jsonl", "null #"):
        assert load(("data.source=jsonl", f"data.path={text}")).data.path == text


@pytest.mark.parametrize("leaf", [leaf for leaf in TEXT_LEAVES if leaf.is_path], ids=lambda leaf: leaf.name)
def test_a_path_begins_in_the_home_directory(load, tmp_path, leaf):
    """F10: a directory called ~ was made in the working directory."""
    (tmp_path / "x").touch()
    for config in (load((*leaf.base, f"{leaf.name}=~/x")), load((), file(leaf, "~/x"))):
        assert leaf.value(config) == str(tmp_path / "x")
    assert not Path("~").exists()
    refused = ["~nobody-here/x", "", "a\0b", "x" * 256, "x/" * 3000, "s3://b/x", "file:///x", "$HOME/x", "a/run-${ID}"]
    for text in refused:
        assert isinstance(load((), file(leaf, text)), str)


def test_preset_files_are_paths_too(load, tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 5\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.yaml").write_text("extends: ~/base.yaml\n")
    assert load_config("~/folder/mine.yaml").seed == 5
    (tmp_path / "base.yaml").write_text(f"extends: ../{tmp_path.name}/base.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        load_config("base.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [("data.seed", "-1"), ("seed", "-1"), ("seed", "4294967296"), ("train.learning_rate", ".inf"), ("seed", "true"),
     ("images.min_pixels", "99999999"), ("mix", "{answer: .nan}"), ("where.trainer.address", "host"),
     ("iterations", "yes"), ("where.engine.urls", "[localhost]"), ("model.tiny", "{rope_theta: 0}")],
)  # fmt: skip
def test_an_odd_number_is_refused(load, name, value):
    """F33: some ended in a traceback, others were taken."""
    assert isinstance(load((f"{name}={value}",)), str)
    assert isinstance(load((), file(Leaf(name, None, (), False), yaml.safe_load(value))), str)


def test_a_short_override_stands_for_no_gigabytes(load):
    """Whoever reaches Prefect's API may send one."""
    levels = (f", &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in itertools.pairwise("abcdefghijk"))
    bomb = "[&a [x]" + "".join(levels)
    for name in ("rewards.functions", "no.such.setting"):
        assert isinstance(load((f"{name}={bomb}]",)), str)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed: 1\nseed: 2\n", "has 'seed' twice"),
        ("seed: 1\n".encode("utf-16"), "no text in UTF-8"),
        ("\ufeffseed: 1\n".encode(), None),
        (b"seed: " + b"9" * 5000, "is no YAML"),
        (b"[" * 5000, "is no YAML"),
        (b"a: &a [*a]", "is no YAML"),
        (b'model: {path: "\\udcff"}', "is no YAML"),
        (b"1: 2", "Keys should be strings"),
        (b"? [a]\n: 1", "is no YAML"),
        (b"data: {source: hub, path: a/b, hub_split: no, revision: 2024-01-01}", None),
    ],
)
def test_a_preset_file_is_read_or_refused_in_a_sentence(tmp_path, content, said):
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    if said is None:
        load_config(str(path))
        return
    with pytest.raises(UserError, match=said) as error:
        load_config(str(path))
    assert "\n" not in str(error.value)
