"""Schema of OpenThinkIMG: questions on charts with an image's path, and for its SFT a conversation of actions."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.conversations import Turn, images_of, is_conversation, read_exchange, read_turns
from thinkimg.data.records.values import first_of, has_values, require_schema

VERSION = 1
TITLE = "OpenThinkIMG: RL and SFT"
QUESTIONS, ANSWERS, IMAGES = ("question", "query"), ("solution", "label"), ("images", "image", "image_path")
COLUMNS = (
    *({"image_path", question, answer} for question in QUESTIONS for answer in ANSWERS),
    *({"conversations", images} for images in IMAGES),
)
READS = {*QUESTIONS, *ANSWERS, *IMAGES, "conversations"}
SYSTEM = "You are a visual assistant capable of generating and solving steps"


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether the conversation ends with the action `Terminate`; without one, that the question is a text."""
    conversations = record.get("conversations")
    if not has_values(record, COLUMNS):
        return False
    if conversations is None:
        return isinstance(first_of(record, *QUESTIONS), str)
    if not is_conversation(conversations) or not isinstance(conversations, list | tuple):
        return False
    texts = [turn.get("value") for turn in conversations if isinstance(turn, Mapping)]
    return any(isinstance(text, str) and '"Terminate"' in text for text in texts)


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record; of a conversation, the answer is that of its last action."""
    require_schema(record, COLUMNS, fits)
    if record.get("conversations") is None:
        return Fields(first_of(record, *QUESTIONS), record.get("image_path"), first_of(record, *ANSWERS))
    exchange = read_exchange(tuple(map(_plain, read_turns(record.get("conversations")))))
    changes = ("question and last answer read from a conversation",)
    return Fields(exchange.question, images_of(exchange, first_of(record, *IMAGES)), exchange.answer, changes=changes)


def _plain(turn: Turn) -> Turn:
    """Return a turn without the system's prompt, and with the answer of its action `Terminate` in a tag."""
    if turn.role == "user" and SYSTEM in turn.text and "Question:" in turn.text:
        images = "<image>" * turn.text.count("<image>")
        question = turn.text.rpartition("Question:")[2].replace("<image>", "").strip()
        return replace(turn, text=f"{images}{question}")
    if turn.role != "assistant" or '"Terminate"' not in turn.text:
        return turn
    try:
        actions = json.loads(turn.text[turn.text.index("{") : turn.text.rindex("}") + 1])["actions"]
        answer = next(action["arguments"]["ans"] for action in actions if action["name"] == "Terminate")
        return replace(turn, text=f"<answer>{answer}</answer>")
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
        return turn
