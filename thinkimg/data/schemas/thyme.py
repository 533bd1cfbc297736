"""Schema of Thyme: questions with images in base64, and for its SFT a response with code."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.conversations import images_of, is_conversation, read_exchange, read_turns
from thinkimg.data.records.values import PLACEHOLDER, choose_question, final_answer, has_values, require_schema

VERSION = 1
TITLE = "Thyme: RL and SFT"
COLUMNS = ({"messages", "images", "solution", "question"}, {"image", "question", "response"})
READS = {"messages", "images", "solution", "question", "image", "response"}
LAST = "answer read from the end of a response"


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether there are messages (RL), or a response that thinks or answers in tags (SFT)."""
    if not has_values(record, COLUMNS):
        return False
    if record.get("messages") is not None:
        return is_conversation(record.get("messages"))
    response = record.get("response")
    return isinstance(response, str) and isinstance(record.get("question"), str) and "<answer>" in response


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record; of a response its last answer, and only the images of the question."""
    require_schema(record, COLUMNS, fits)
    column = record["question"]
    if record.get("messages") is not None:
        exchange = read_exchange(read_turns(record["messages"]))
        question, changes = choose_question(exchange.question, column)
        return Fields(question, images_of(exchange, record.get("images")), record.get("solution"), changes=changes)
    question, changes = choose_question(column, None)
    images = record.get("image")
    if isinstance(images, list | tuple):  # further ones are what the code showed
        images = list(images[: max(question.count(PLACEHOLDER), 1)])
    return Fields(question, images, final_answer(record["response"]), changes=(*changes, LAST))
