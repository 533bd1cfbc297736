"""Texts without secrets: passwords in addresses, keys, tokens."""

import os
import re

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH_STRING)$", re.IGNORECASE)
SECRET = re.compile(r"(?i)(\b(?:api[_-]?key|token|password|passwd|secret)[=:]\s?|\bbearer |\bsk-|\bhf_)[^\s&'\"]+")
SHORTEST = 6  # characters of a variable's value that is taken for a secret


def without_password(uri: str) -> str:
    """Return a URI, or a text with URIs in it, with *** in place of each password."""
    return re.sub(r"(://[^\s/@:]*):[^\s/]*@", r"\1:***@", uri)


def without_secrets(text: str, context: str = "") -> str:
    """Return a text with *** in place of passwords, keys and tokens, those in variables included.

    context: another text, such as the settings, that may name a variable as one with a key.
    """
    values = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and not value.startswith("/") and is_secret(name, text + context)
    }
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, f"***{values[value]}***")
    return SECRET.sub(r"\1***", without_password(text))


def is_secret(name: str, text: str) -> bool:
    """Tell whether a variable holds a secret: by its name, or as the text names it as one."""
    return bool(SECRET_NAME.search(name)) or re.search(rf"api_key_env\W+{re.escape(name)}\b", text) is not None
