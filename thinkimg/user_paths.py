"""Paths as users write them."""

import os
import re
import unicodedata

from thinkimg.errors import UserError, shorten
from thinkimg.redaction import without_query

SCHEME, VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://"), re.compile(r"\$\{?[A-Za-z_]")
MAX_PATH, MAX_NAME = 4095, 255  # bytes of a path and of each part, as Linux has them


def expand_path(text: str) -> str:
    """Return a path as it is, with the home directory in place of a leading `~`. Raises UserError for none, such as
    s3://bucket/x and $HOME/x, which would be folders `s3:` and `$HOME` of the working directory.

    Every path of a user goes through here where it enters: settings, flags, preset files.
    """
    path = os.path.expanduser(text)
    if SCHEME.match(text):
        raise UserError(
            f"{shorten(without_query(text), 100)} is no path of this machine.",
            hint="Name a file or a folder here: download it, or mount what holds it.",
        )
    if VARIABLE.search(text):
        raise UserError(
            f"The path {shorten(text, 100)} has a variable in it, and nothing fills it in.",
            hint="Write it out, or let the shell do so: it does without quotes and within double ones.",
        )
    if not path or any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in path):
        raise UserError(f"{shorten(text)!a} is no path.", hint="A path has no control characters, and is not empty.")
    if path.startswith("~"):
        raise UserError(f"There is no home directory for {text}.", hint="A name that begins with ~ is written as ./~…")
    if len(encoded := os.fsencode(path)) > MAX_PATH or max(map(len, encoded.split(b"/"))) > MAX_NAME:
        raise UserError(f"The path {shorten(text, 60)} is too long: it has {len(encoded)} bytes.")
    return path
