"""Protocol `think`: <think>…</think>, then <tool>…</tool> or <answer>…</answer>."""

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


class Think(Protocol):
    """Protocol of <think>…</think>, then <tool>{"name": …, "args": {…}}</tool> or <answer>…</answer>.

    Between and around them there is white space only.
    """

    open_call, close_call, args_key = "<tool>", "</tool>", "args"
    call_form = '<tool>{"name": "…", "args": {…}}</tool>'
    turn_form = "<think>your thoughts</think>"

    def split(self, turn: str) -> tuple[str, str] | Malformed:
        thought, end, rest = turn.removeprefix(OPEN_THOUGHT).partition(CLOSE_THOUGHT)
        if not turn.startswith(OPEN_THOUGHT) or OPEN_THOUGHT in thought:
            return Malformed("Begin with one <think>…</think>.")
        if not end:
            return NO_END
        return thought, rest.lstrip()

    def render_thought(self, thought: str) -> str:
        return f"<think>{thought}</think>"

    def render_call(self, name: str, args: dict[str, Any]) -> str:
        return f"<tool>{render_json(name, self.args_key, args)}</tool>"

    def observation(self, value: str, *, image: bool) -> Content:
        return [IMAGE_PART] * image + [text_part(value)]


PROTOCOL = Think()
