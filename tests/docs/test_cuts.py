"""Cut texts: whatever shows the beginning of a text goes through `errors.shorten`, which says how long it was."""

import ast

from hypothesis import given
from hypothesis import strategies as st
from paths import REPOSITORY

from thinkimg.errors import shorten

DIGITS = 36
"""Characters of a hash or a date: a shorter beginning with a constant length is one of those, or of bytes."""
KNOWN = {
    "token_ids[:256]": "a key of what is alike, and nothing that anybody reads",
    "text[:64]": "bytes of a file, by which its form is known",
    "head[257:262]": "bytes of a file, by which a tar archive is known",
    "rest[:40]": "a digest, or a Hub's name, in a tree of one line each",
}


@given(st.text(max_size=400), st.integers(0, 300))
def test_a_cut_text_says_so_and_is_no_longer_than_asked(text, length):
    short, line = shorten(text, length), " ".join(text.split())
    assert "\n" not in short
    if len(line) <= length:
        assert short == line
    else:
        kept, end = short.rsplit("…", 1)
        assert line.startswith(kept) and end == f" ({len(line)} characters)"
        assert len(short) <= max(length, len(end) + 1)


def test_no_text_is_cut_without_a_count():
    found = {}
    for root in ("thinkimg", "flows"):
        for path in sorted((REPOSITORY / root).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
                    upper, text = node.slice.upper, ast.unparse(node)
                    if isinstance(upper, ast.Constant) and upper.value > DIGITS and text not in KNOWN:
                        found[text] = path.name
    assert found == {}, "cut it with thinkimg.errors.shorten"
