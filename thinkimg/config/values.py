"""Values of settings as text: YAML, and a text as it is where the setting is a text."""

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from thinkimg.errors import UserError, shorten

NAME = r"[A-Za-z_][\w.]*"
"""Form of a dotted name."""
MAX_LENGTH = 2000
"""Characters of an override; a preset file may have longer texts."""
QUOTED = re.compile(r"""(?s)"([^"\\]|\\.)*"|'([^']|'')*'""")


class _Loader(yaml.SafeLoader):
    """YAML whose plain words are those of version 1.2: `no`, `1:30` and dates are texts, and 010 is ten.

    A key that stands twice in a mapping is a mistake: the first value would be lost without a word.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(problem=f"it has '{twice[0]}' twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


for tag, pattern, first in (
    ("null", r"(~|null|Null|NULL|)", "~nN\0"),
    ("bool", r"(true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))",
        "-+0123456789.",
    ),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"{pattern}$"), [c.strip("\0") for c in first])


def _construct_int(loader: _Loader, node: Any) -> int:
    return int(str(loader.construct_scalar(node)))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises UserError, whose message has the place, for what is none."""
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
        # It raises for a list that holds itself, and for half of a character.
        json.dumps(value, default=str, skipkeys=True, ensure_ascii=False).encode()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"no YAML ({shorten(str(error))})") from None
    return value


def read_yaml_file(path: Path) -> Any:
    """Return the value of a YAML file. Raises UserError, which names it."""
    try:
        return read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8.", hint="Save it as UTF-8.") from None
    except UserError as error:
        raise UserError(f"{path} is {error.message}.") from None


def split_override(override: str) -> tuple[str, str]:
    """Return (dotted name, text of the value). Raises UserError if it is no override."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"The override '{shown(override)}' has no value.", hint="Write it as a.b=value.")
    if not re.fullmatch(NAME, key):
        raise UserError(
            f"The override '{shown(override)}' does not begin with the name of a setting.",
            hint="Write it as a.b=value, without blanks around the name.",
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"The value of '{shown(override)}' is no text in UTF-8.")
    if len(override) > MAX_LENGTH:
        raise UserError(
            f"The override of {shown(key)} has {len(override)} characters, and {MAX_LENGTH} are the limit.",
            hint="Put it into a preset file.",
        )
    return key, text


def read_value(key: str, text: str, kind: Any) -> Any:
    """Return the value that a text is for a setting.

    kind: type of the setting, None where it is unknown. A setting that is a text takes the text as it is, except for
    `null`. Raises UserError for a text in quotes, for nothing, and for what is no YAML.
    """
    if kind is None or not is_text(kind):
        if not text.strip():
            raise UserError(f"The override '{key}=' has no value.", hint="Write null where there is none.")
        try:
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _Loader)):
                raise UserError("no YAML without references")  # short ones can stand for gigabytes
            if has_comment(text):
                raise UserError("no YAML without comments")  # '/data/run #3' would lose its end without a word
            return read_yaml(text)
        except (yaml.YAMLError, UserError, RecursionError) as error:
            if kind is None:
                return text
            hint = "Quote texts with special characters within lists and mappings."
            reason = error.message if isinstance(error, UserError) else "no YAML"
            raise UserError(f"The value of '{shown(f'{key}={text}')}' is {reason}.", hint=hint) from None
    if text == "null" and type(None) in get_args(kind):
        return None
    if QUOTED.fullmatch(text):
        raise UserError(
            f"The value of '{shown(f'{key}={text}')}' is in quotes.",
            hint="A text is taken as it is: leave the quotes out. One that has them goes into a preset file.",
        )
    return text


def has_comment(text: str) -> bool:
    """Tell whether a YAML text has comments, which lie between its tokens, or in the first line of a block."""
    end = 0
    for token in yaml.scan(text, _Loader):
        gap = text[end : token.start_mark.index]
        if isinstance(token, yaml.ScalarToken) and token.style in ("|", ">"):
            gap += text[token.start_mark.index :].partition("\n")[0]
        if "#" in gap:
            return True
        end = max(end, token.end_mark.index)
    return False


def is_text(kind: Any) -> bool:
    """Tell whether a type takes texts and nothing else but null."""
    if get_origin(kind) is Literal:
        return all(isinstance(value, str) for value in get_args(kind))
    if kind is str:
        return True
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) in (list, tuple, dict, set, frozenset) or not parts:
        return False
    if hasattr(kind, "__metadata__"):
        return is_text(parts[0])
    return all(is_text(part) for part in parts)


def shown(text: str) -> str:
    """Return a text for a message: one line, printable, not long."""
    return shorten("".join(character if character.isprintable() else " " for character in text), 80)
