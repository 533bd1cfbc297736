"""Paths as users write them."""

import os
import unicodedata

from thinkimg.errors import UserError, shorten

MAX_PATH, MAX_NAME = 4095, 255  # bytes of a path and of each part, as Linux has them


def expand_path(text: str) -> str:
    """Return a path as it is, with the home directory in place of a leading `~`. Raises UserError for none.

    Every path of a user goes through here where it enters: settings, flags, preset files.
    """
    path = os.path.expanduser(text)
    if not path or any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in path):
        raise UserError(f"{shorten(text)!a} is no path.", hint="A path has no control characters, and is not empty.")
    if path.startswith("~"):
        raise UserError(f"There is no home directory for {text}.", hint="A name that begins with ~ is written as ./~…")
    if len(encoded := os.fsencode(path)) > MAX_PATH or max(map(len, encoded.split(b"/"))) > MAX_NAME:
        raise UserError(f"The path {shorten(text, 60)} is too long: it has {len(encoded)} bytes.")
    return path
