"""Texts without secrets: passwords in addresses, keys, tokens."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

SECRET_NAME = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|_PWD|CREDENTIALS?|AUTH_STRING|DATABASE_URL|CONNECTION_URL|CONNECTION_STRING|"
    r"_DSN|_HEADERS)$",
    re.IGNORECASE,
)
NAMES = (
    r"(?<![\w-])[\w-]*(?:(?:api|access|account|private|shared|secret)[_-]?key|token|password|passwd|pwd|secret|credentials?|"
    r"auth[_-]string|connection[_-]string|odbc_connect|authorization)"
)
# password=x, password: x, 'password': 'x', ("password", "x"), {\"password\": \"x\"}, PWD%3Dx, Authorization: Basic x
NAMED = re.compile(
    rf"""(?i)({NAMES}(?:\\*["']?\s*(?:=>|=|:|%3D)|\\*["']\s*,)\s*)"""
    r"""(?:[\[({]*\s*b?(?P<quote>\\*["'])(?:(?!(?P=quote))(?:\\.|.))*(?P=quote)?|"""
    r"""(?:(?:basic|bearer|digest|token)\s+)?[^\s&'"]+)"""
)
MARKED = re.compile(r"(?i)(\bbearer |\bsk-|\bhf_)[^\s&'\"]+")
USERINFO = re.compile(r"://([^\s/@:?]*:)?(?:(?!://)[^\s?])*@")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# api_key_env=x, 'api_key_env': 'x', --api-key-env x: a key itself may stand there in place of its variable's name
NAMED_VARIABLE = re.compile(
    r"""(api_key_env\\*["']?\s*[=:]|--api-key-env[=\s])(\s*)(?:(["'\\]+)([^"'\\]*)|([^\s"'\\,;()]+))"""
)
QUERY = re.compile(rf"(?i)([?&;]{NAMES}=)[^\s&'\"]+")
SHORTEST = 6  # characters of a variable's value that is taken for a secret
LONGEST_NAME = 20  # characters of a variable's name, beyond which it may be a key
READ_AS_KEYS: set[str] = set()
"""Names of the variables that this process has read keys from (keys.py), whatever they are called."""


def without_password(uri: str) -> str:
    """Return a URI, or a text with URIs in it, with *** in place of each password, and of a user without one.

    A user alone may be a token. What follows the first @ may still be of a password, so that the last one counts.
    """
    return QUERY.sub(r"\1***", USERINFO.sub(lambda match: f"://{match[1] or ''}***@", uri))


def without_query(uri: str) -> str:
    """Return `without_password` of a single URI, with *** in place of each value of its query, too.

    Drivers of databases take passwords there, under names of their own.
    """
    address, mark, query = uri.partition("?")
    parts = [f"{name}{equals}***" for name, equals, _ in (part.partition("=") for part in query.split("&"))]
    return without_password(address) + (mark and "?" + "&".join(parts))


def without_secrets(text: str, context: str = "") -> str:
    """Return a text with *** in place of passwords, keys and tokens, those in variables included.

    context: another text, such as the settings, that may name a variable as one with a key.
    """
    values = {
        secret: name
        for name, value in os.environ.items()
        if is_secret(name, text + context)
        for secret in list_secrets(value)
        if len(secret) >= SHORTEST and not (secret.startswith("/") and os.path.exists(secret))
    }
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, f"***{values[value]}***")
    text = NAMED_VARIABLE.sub(_hide_key, text)
    return MARKED.sub(r"\1***", NAMED.sub(r"\1***", without_password(text)))


def redact_logs() -> None:
    """Let all that this process logs go through `without_secrets`, tracebacks included."""
    factory = logging.getLogRecordFactory()
    if getattr(factory, "redacts", False):
        return

    def make(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = factory(*arguments, **options)
        with contextlib.suppress(Exception):  # of arguments that don't fit the message, which logging reports itself
            message = record.getMessage()
            if (shown := without_secrets(message)) != message:
                record.msg, record.args = shown, ()
            if record.exc_info and record.exc_info[0]:
                record.exc_text = without_secrets(logging.Formatter().formatException(record.exc_info))
        return record

    make.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make)


def may_be_key(name: str) -> bool:
    """Tell whether what should name a variable may be a key itself: it is no such name, or reads like a key.

    A key is long, and mixes lower-case letters with digits or capitals. A variable that is set is none.
    """
    if not VARIABLE.fullmatch(name):
        return True
    mixed = re.search(r"[a-z]", name) and re.search(r"[A-Z0-9]", name)
    return bool(mixed) and len(name) > LONGEST_NAME and name not in os.environ


def _hide_key(named: re.Match[str]) -> str:
    name = named[4] or named[5] or ""
    bare = name.rstrip(".…")  # of a sentence
    shown = "***" + name[len(bare) :] if bare and may_be_key(bare) else name
    return f"{named[1]}{named[2]}{named[3] or ''}{shown}"


def is_secret(name: str, text: str) -> bool:
    """Tell whether a variable holds a secret: by its name, as it was read for one, or as the text names it as one."""
    if name in READ_AS_KEYS or SECRET_NAME.search(name):
        return True
    return re.search(rf"api_key_env\W+{re.escape(name)}\b", text) is not None


def list_secrets(value: str) -> Iterator[str]:
    """Yield what of a variable's value is a secret: all of it, the values of a JSON object, the password of a URI."""
    yield value
    yield value.strip()  # as a client sends it, or shows it with \\n for the line's end
    if password := re.search(r"://[^\s/@:?]*:([^\s?]*)@", value):
        yield password[1]
        yield unquote(password[1])
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(value)
        for part in content.values() if isinstance(content, dict) else ():
            if isinstance(part, str):
                yield part
                yield part.rpartition(" ")[2]  # without "Basic"
