"""Protocol `qwen_xml`: a thought in prose, then Qwen3.5's call in XML tags or <answer>…</answer>."""

import json
import re
from typing import Any

from thinkimg.conversation.protocol import Malformed, ToolCall, parse_json
from thinkimg.conversation.protocols.qwen import Qwen

FUNCTION, PARAMETER = "<function=", "<parameter="
END_FUNCTION, END_PARAMETER = "</function>", "</parameter>"
WORDS = {"True": True, "False": False, "None": None}
"""Values as the chat template of Qwen3.5 writes them: they are Python's there, JSON's from Qwen3.6 on."""
MARKS = ("</", FUNCTION, PARAMETER, "<tool_call>", "<answer>", "<think>")
"""Beginnings of tags, which no value may hold as it is: vLLM's parser also ends a value at a <parameter=."""
SPACE = re.compile(r"\s*")


class QwenXml(Qwen):
    """Protocol that Qwen3.5 is trained on: <tool_call>, <function=name>, and a <parameter=key> for each argument.

    A value stands between its tags, with one line break on either side. It is JSON if it reads as JSON, else the text
    itself. A text that would read as JSON (`true`, `12`) or that holds tags is a JSON string: `"true"`. So every value
    is read back, without a look at the tool's schema; a model that means the text 12 must write "12".
    """

    call_form = "<tool_call><function=…><parameter=…>…</parameter></function></tool_call>"

    @property
    def call_example(self) -> str:
        return self.render_call("name", {"argument": "value"})

    def parse_call(self, body: str) -> ToolCall | Malformed:
        name, named, rest = body.strip().removeprefix(FUNCTION).partition(">")
        if not body.strip().startswith(FUNCTION) or not named or not rest.endswith(END_FUNCTION) or "<" in name:
            return Malformed(f"The call must be one <function=…>…</function>; write {self.call_form}.")
        args, rest = {}, rest.removesuffix(END_FUNCTION)
        position = skip_space(rest, 0)
        while position < len(rest):
            start = rest.find(">", position)
            end = rest.find(END_PARAMETER, start)
            key = rest[position + len(PARAMETER) : start]
            if not rest.startswith(PARAMETER, position) or start < 0 or end < 0 or "<" in key:
                return Malformed(f"Between the function's tags write <parameter=…>…</parameter>: {self.call_form}.")
            if key in args:
                return Malformed("A parameter appears twice; write each once.")
            try:
                args[key] = read_value(trim(rest[start + 1 : end]))
            except ValueError as error:
                return Malformed(f"A parameter's value is not valid JSON ({error}); write {self.call_form}.")
            position = skip_space(rest, end + len(END_PARAMETER))
        return ToolCall(name, args)

    def render_call(self, name: str, args: dict[str, Any]) -> str:
        parameters = "".join(f"<parameter={key}>\n{render_value(value)}\n</parameter>\n" for key, value in args.items())
        return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def read_value(text: str) -> Any:
    """Return the value of a parameter's text. Raises ValueError, as parse_json, for JSON that is refused."""
    if (word := text.strip()) in WORDS:
        return WORDS[word]
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        return text


def render_value(value: Any) -> str:
    """Return the text of a value, in which nothing can be taken for a tag and which reads as the same value."""
    if isinstance(value, str) and not any(mark in value for mark in MARKS):
        try:
            if read_value(value) == value:
                return value
        except ValueError:
            pass  # refused as JSON: a text such as NaN
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")  # "<" occurs in strings only


def trim(text: str) -> str:
    """Return a text without one line break at its beginning and one at its end, which belong to the tags."""
    return text.removeprefix("\n").removesuffix("\n")


def skip_space(text: str, position: int) -> int:
    """Return the position of the first character from `position` on that is no white space."""
    space = SPACE.match(text, position)
    assert space is not None, "it matches nothing at least"
    return space.end()


PROTOCOL = QwenXml()
