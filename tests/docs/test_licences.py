"""docs/licences.md names each photograph of the puzzles and each model that a preset names by default."""

import re

from paths import REPOSITORY

from thinkimg.config.load import list_presets, load_config
from thinkimg.puzzles.scenes import photographs

PAGE = (REPOSITORY / "docs" / "licences.md").read_text(encoding="utf-8")


def first_column(title: str) -> list[str]:
    """The names in the first column of the table below a headline."""
    rows = re.findall(r"^\| (.+?) \|", PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0], re.MULTILINE)
    return [name for row in rows[1:] for name in row.split(", ")]


def test_every_photograph_is_listed():
    assert sorted(first_column("Photographs of the puzzles")) == sorted(photographs())


def test_every_model_of_a_preset_is_listed_with_the_presets_that_use_it():
    for preset in list_presets():
        if (config := load_config(preset)).model.tiny is None:
            (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {config.model.path} |")]
            assert f"`{preset}`" in row
        elif preset != "tiny":
            raise AssertionError(preset)
    clip = load_config("development").image.embedding
    assert f"({clip.model}, {clip.pretrained})" in PAGE
