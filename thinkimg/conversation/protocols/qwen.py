"""Protocol `qwen`: a thought in prose, then Qwen's <tool_call>…</tool_call> or <answer>…</answer>."""

from typing import Any

from thinkimg.conversation.protocol import (
    CLOSE_THOUGHT,
    IMAGE_PART,
    NO_END,
    OPEN_THOUGHT,
    Content,
    Malformed,
    Protocol,
    render_json,
    text_part,
)


class Qwen(Protocol):
    """Protocol that Qwen models are trained on: <tool_call>{"name", "arguments"}</tool_call>, then <tool_response>.

    The thought is all that precedes the call or the answer, with <think> tags or without: the stock models write prose
    there. Qwen's template has no form for an answer, so that it is <answer>…</answer> here, too.
    """

    open_call, close_call, args_key = "<tool_call>", "</tool_call>", "arguments"
    call_form = '<tool_call>{"name": "…", "arguments": {…}}</tool_call>'
    turn_form = "your thoughts\n"

    def split(self, turn: str) -> tuple[str, str] | Malformed:
        if turn.startswith(OPEN_THOUGHT):
            if CLOSE_THOUGHT in turn:  # what it holds may quote the tags: models rehearse their answers
                _, _, turn = turn.partition(CLOSE_THOUGHT)
            elif self.open_call not in turn:  # a call ends a thought, as for vLLM's parser
                return NO_END
        starts = [start for tag in (self.open_call, "<answer>") if (start := turn.find(tag)) >= 0]
        start = min(starts, default=len(turn))
        return turn[:start], turn[start:]

    def render_thought(self, thought: str) -> str:
        return f"{thought}\n" if thought else ""

    def render_call(self, name: str, args: dict[str, Any]) -> str:
        return f"<tool_call>\n{render_json(name, self.args_key, args)}\n</tool_call>"

    def observation(self, value: str, *, image: bool) -> Content:
        return [text_part("<tool_response>\n"), *[IMAGE_PART] * image, text_part(f"{value}\n</tool_response>")]


PROTOCOL = Qwen()
