"""The page docs/configuration.md: what `thinkimg schema --markdown` prints, with a sentence for each setting."""

import re

from paths import REPOSITORY

from thinkimg.cli.configuration import page


def test_page_is_the_settings():
    written = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == page(), "run: thinkimg schema --markdown > docs/configuration.md"


def test_each_setting_has_a_sentence():
    tables = re.findall(r"^\| setting .+\n\| ---.+\n((?:\|.+\n)+)", page(), re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 120
    assert not [row for row in rows if row.endswith("|  |")]
