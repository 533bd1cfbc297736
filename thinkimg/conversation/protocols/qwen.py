"""Qwen's <tool_call>…</tool_call>, or <answer>…</answer>, after a thought in prose."""

from typing import Any

from thinkimg.conversation.protocol import IMAGE, Content, Malformed, Protocol, call_json, text


class Qwen(Protocol):
    """What Qwen models are trained on: <tool_call>{"name", "arguments"}</tool_call>, results in <tool_response>.

    The thought is whatever precedes the call or the answer, with <think> tags or without: the stock models write prose
    there. An answer has no form of its own in Qwen's template, so that it is <answer>…</answer> here, too.
    """

    open_call, close_call, args_key = "<tool_call>", "</tool_call>", "arguments"
    call_form = '<tool_call>{"name": "…", "arguments": {…}}</tool_call>'
    turn_form = "your thoughts\n"

    def split(self, turn: str) -> tuple[str, str] | Malformed:
        starts = [start for tag in (self.open_call, "<answer>") if (start := turn.find(tag)) >= 0]
        start = min(starts, default=len(turn))
        return turn[:start], turn[start:]

    def render_thought(self, thought: str) -> str:
        return f"{thought}\n" if thought else ""

    def render_call(self, name: str, args: dict[str, Any]) -> str:
        return f"<tool_call>\n{call_json(name, self.args_key, args)}\n</tool_call>"

    def observation(self, value: str, *, image: bool) -> Content:
        return [text("<tool_response>\n"), *[IMAGE] * image, text(f"{value}\n</tool_response>")]


PROTOCOL = Qwen()
