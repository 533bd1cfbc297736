"""Lists and objects that a text writes out, as JSON or as Python would: read, never evaluated."""

import ast
import json
import warnings
from typing import Any

MAX_LITERAL_LENGTH = 200_000
"""Characters of a list that is stored as a text; Python's parser takes about 200 bytes of memory for each."""


def read_literal(value: Any) -> Any:
    """Return the list or object that a text holds as JSON or as Python writes it; any other value as it is.

    Nothing is evaluated. A text that is neither, or longer than MAX_LITERAL_LENGTH, stays a text.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{", "(") or len(value) > MAX_LITERAL_LENGTH:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as "\d"
            return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value
