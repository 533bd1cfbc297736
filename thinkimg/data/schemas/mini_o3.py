"""Schema of Mini-o3: VisualProbe and DeepEyes_train_4K (problem, images, solution), and its cold start."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.conversations import images_of, is_conversation, read_exchange, read_turns
from thinkimg.data.records.values import has_values, require_schema

VERSION = 1
TITLE = "Mini-o3: VisualProbe, DeepEyes 4K, cold start"
COLUMNS = ({"problem", "images", "solution", "doc_id"}, {"conversations", "images", "image_names"})
READS = {"problem", "images", "solution", "conversations"}


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether the problem is a text, or the conversation one that Python wrote."""
    conversations = record.get("conversations")
    if not has_values(record, COLUMNS):
        return False
    return isinstance(record.get("problem"), str) if conversations is None else is_conversation(conversations)


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record; of a cold start, those of its question and its last answer."""
    require_schema(record, COLUMNS, fits)
    if record.get("conversations") is None:
        return Fields(record.get("problem"), record.get("images"), record.get("solution"))
    exchange = read_exchange(read_turns(record.get("conversations")))
    changes = ("question and last answer read from a conversation",)
    return Fields(exchange.question, images_of(exchange, record.get("images")), exchange.answer, changes=changes)
