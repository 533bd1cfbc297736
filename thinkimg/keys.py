"""Keys of servers, which come from variables of the environment alone."""

import os

from thinkimg.errors import UserError
from thinkimg.redaction import READ_AS_KEYS, may_be_key


def check_variable(name: str) -> str:
    """Return the name of a variable that is to hold a key. Raises UserError, which does not show what may be the key.

    Each setting and flag that names such a variable goes through here.
    """
    if not isinstance(name, str) or may_be_key(name):
        raise UserError(
            "api_key_env names no environment variable; what it has is not shown, as it may be a key.",
            hint="Put the key into a variable, and name that: api_key_env=MY_KEY.",
        )
    return name


def read_key(variable: str) -> str:
    """Return the key in a variable, without blanks around it, and hide it in logs and reports from now on.

    Raises UserError, which names the variable and shows no value, where it is empty or no key.
    """
    READ_AS_KEYS.add(check_variable(variable))
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"The environment variable {variable} is not set, and is to hold a key.",
            hint="Set it, or name another one by api_key_env.",
        )
    if not all("!" <= character <= "~" for character in key):  # no header takes it
        raise UserError(
            f"The environment variable {variable} holds no key: it has blanks, or characters that are no ASCII.",
            hint="Copy the key again.",
        )
    return key
