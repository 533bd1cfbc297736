r"""Right answers out of their wrapping: `<answer>…</answer>`, `\boxed{…}`, `<|begin_of_box|>…`, lists of one."""

import json
import re
from typing import Any

from thinkimg.data.refusal import Reason, RowRefused, short

BOX_START, BOX_END = "<|begin_of_box|>", "<|end_of_box|>"
BOXED = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\[\s\S]|[{}]")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{")
LABEL = re.compile(
    r"(?P<bold>\*\*)?(?:the\s+)?(?:final\s+|correct\s+|right\s+)?answer(?:\s+is)?(?(bold)(?:\s*[:：]\*\*|\*\*\s*[:：])|\s*[:：])\s*",
    re.IGNORECASE,
)
"""Words before an answer: "Answer: 5", "**Final Answer:** 5"."""
SPOKEN = re.compile(
    r"(?:(?:so|therefore|thus),?\s+)?the\s+(?:(?:final|correct|right)\s+)?answer\s+is\s+", re.IGNORECASE
)
"""The same without a colon: "The answer is red."."""
CONCLUSION = re.compile(r"<CONCLUSION>([^<>]*)</CONCLUSION>\s*\Z")
"""End of LLaVA-CoT's answers."""
MARK = "\n#### "
"""Mark that GSM8K puts before an answer, after its reasons."""
BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
ITEM = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*+)"|'((?:[^'\\]|\\.)*+)'|(-?\d[\d.,]*(?<![.,])))\s*""", re.DOTALL)
"""An element of a list in a text: quoted, or a number."""
TURN = re.compile(
    r"""["'](?:role|from)["']\s*:\s*["'](?:user|human|assistant|gpt|system|tool|function)["']|<\|im_start\|>""",
)
"""A message's beginning, in JSON, in Python's notation, or in a chat template."""
MAX_TURN = 2000  # characters at a text's beginning in which a conversation shows itself
MAX_LIST = 100_000  # characters of a list in a text


def unwrap(answer: Any) -> Any:
    """Return an answer without its wrapping: a text, a list of several texts, or what it is if it has none of these.

    Raises RowRefused (ANSWER) for wrapping that is empty, open or contradictory, and for a whole conversation.
    """
    if isinstance(answer, list | tuple):
        return _unwrap_list(answer)
    if not isinstance(answer, str):
        return answer
    if is_conversation(answer):
        raise RowRefused(Reason.ANSWER, f"the answer is a whole conversation: {short(answer)}")
    text = _read_boxed(_read_box_tokens(_read_tags(_read_conclusion(answer.strip()))))
    return text if isinstance(text, list) else _read_label(text.strip())


def is_conversation(value: Any) -> bool:
    """Tell whether a value, or the text of it, is a list of messages."""
    if isinstance(value, list | tuple):
        return any(isinstance(turn, dict) and ({"role", "content"} <= set(turn) or "from" in turn) for turn in value)
    if not isinstance(value, str):
        return False
    return value.lstrip()[:1] in ("[", "{", "<") and TURN.search(value[:MAX_TURN]) is not None


def read_list(text: str) -> list[Any] | None:
    """Return the list of texts and numbers that a text writes out, as JSON or Python would; None if it does not."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > MAX_LIST:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = _read_python_list(text)
    return values if isinstance(values, list) else None


def read_names(images: Any) -> Any:
    """Return the paths or pictures in base64 that a text lists, as CSV has them; other images as they are.

    Longer lists than `read_list` takes are cut at their commas, for base64 has none.
    """
    if not isinstance(images, str) or not (images.startswith("[") and images.endswith("]")):
        return images
    names = read_list(images)
    if names is None and len(images) > MAX_LIST:
        names = [name.strip().strip("'\"") for name in images[1:-1].split(",")]
    return names if names and all(isinstance(name, str) for name in names) else images


def _unwrap_list(answers: list[Any] | tuple[Any, ...]) -> Any:
    """Return a list's answers unwrapped; the only one of a list of one."""
    if is_conversation(answers):
        raise RowRefused(Reason.ANSWER, f"the answer is a whole conversation: {short(answers)}")
    if len(answers) == 1:
        return unwrap(answers[0])
    if not all(isinstance(answer, str) for answer in answers):
        return answers
    flat: list[Any] = []
    for answer in map(unwrap, answers):
        flat += answer if isinstance(answer, list) else [answer]
    return answers if flat == list(answers) else flat


def _read_tags(text: str) -> str:
    """Return what the last `<answer>` holds at a text's end, or what follows `</think>`."""
    if "<answer>" in text or "</answer>" in text:
        end = text.rfind("</answer>")
        start = text.rfind("<answer>", 0, max(end, 0))
        if start < 0 or text.find("<answer>", end) >= 0:
            raise RowRefused(Reason.ANSWER, f"the answer's tag is not closed, or not opened: {short(text)}")
        return _require(text[start + len("<answer>") : end].strip(), text)
    if text.startswith("<think>"):
        return _require(text.rpartition("</think>")[2].strip() if "</think>" in text else "", text)
    return text


def _read_box_tokens(text: str) -> str:
    start = text.rfind(BOX_START)
    if start < 0:
        return text
    content, closed, _ = text[start + len(BOX_START) :].partition(BOX_END)
    return _require(content.strip() if closed else "", text)


def _read_boxed(text: str) -> str | list[str]:
    r"""Return what `\boxed{…}` holds: of the text, or of the solution that it is. Two must hold the same."""
    contents: list[str] = []
    position = 0
    while start := BOXED.search(text, position):
        end = _closing_brace(text, start.end())
        if end is None:
            raise RowRefused(Reason.ANSWER, f"the braces of \\boxed are not closed: {short(text)}")
        contents.append(text[start.end() : end].strip())
        position = end + 1
    if not contents:
        return text
    if len(set(contents)) > 1:
        raise RowRefused(Reason.ANSWER, f"several \\boxed hold different answers: {short(contents)}")
    content = contents[0]
    command = TEXT_COMMAND.match(content)
    if command and _closing_brace(content, command.end()) == len(content) - 1:
        content = content[command.end() : -1].strip()
    several = read_list(_require(content, text))
    if several and all(isinstance(answer, str) for answer in several):
        return several
    return content


def _read_conclusion(text: str) -> str:
    """Return what follows the reasons of an answer, where it has LLaVA-CoT's tags or GSM8K's mark."""
    conclusion = CONCLUSION.search(text, max(len(text) - MAX_TURN, 0))
    rest = conclusion[1].strip() if conclusion else text.rpartition(MARK)[2].strip()
    return rest or text


def _read_label(text: str) -> str:
    """Return a text of one line without the words that announce an answer, and without asterisks for bold letters."""
    if (spoken := SPOKEN.match(text)) and "\n" not in text:
        text = text[spoken.end() :].removesuffix(".").strip() or text
    label = LABEL.match(text)
    rest = text[label.end() :] if label and text[label.end() :].strip() and "\n" not in text else text
    bold = BOLD.fullmatch(rest)
    return bold[1].strip() or text if bold else rest


def _closing_brace(text: str, position: int) -> int | None:
    """Return the position of the brace that closes the one before a position. None if it is not closed."""
    depth = 1
    for brace in BRACE.finditer(text, position):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
        if not depth:
            return brace.start()
    return None


def _require(content: str, text: str) -> str:
    if not content:
        raise RowRefused(Reason.ANSWER, f"the answer's wrapping holds nothing: {short(text)}")
    return content


def _read_python_list(text: str) -> list[Any] | None:
    """Return a flat list that Python's repr wrote: of texts, and of numbers as texts."""
    values: list[Any] = []
    position, end = 1, len(text) - 1
    while position < end:
        item = ITEM.match(text, position, end)
        if item is None:
            return None
        quoted = item[1] if item[1] is not None else item[2]
        values.append(item[3] if quoted is None else re.sub(r"\\(['\"\\])", r"\1", quoted))
        position = item.end()
        if position < end and text[position] != ",":
            return None
        position += 1
    return values
