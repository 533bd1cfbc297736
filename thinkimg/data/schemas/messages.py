"""Schema of conversations: TRL's prompts, ms-swift's messages and objects, LLaMA-Factory's sharegpt and alpaca."""

from collections.abc import Mapping
from typing import Any

from thinkimg.data.fields import Fields
from thinkimg.data.records.conversations import Exchange, images_of, is_conversation, read_exchange, read_turns
from thinkimg.data.records.grounding import PLACES, fill_in_objects
from thinkimg.data.records.values import (
    choose_question,
    claims,
    final_answer,
    first_of,
    has_values,
    refuse,
    require_schema,
)
from thinkimg.data.schemas import mini_o3, openthinkimg, thyme, verl, viscot
from thinkimg.data.texts.literals import read_literal

VERSION = 2
TITLE = "messages: TRL, ms-swift, LLaMA-Factory, LLaVA, The Cauldron, MM-Eureka"
TURNS = ("messages", "conversations", "prompt", "texts")
IMAGES = ("images", "image", "image_path", "image_paths", "image_urls")
TEXTS = ({"query", "response"}, {"instruction", "output"})
COLUMNS = (
    *({column, images} for column in TURNS[:2] for images in IMAGES),
    {"messages"},
    {"texts", "images"},
    *({"prompt", images, answer} for images in IMAGES[:2] for answer in ("solution", "answer", "completion")),
    *({*texts, images} for texts in TEXTS for images in IMAGES[:2]),
)
ANSWERS = ("solution", "answer", "ground_truth")
READS = {*TURNS, *IMAGES, *ANSWERS, "query", "response", "instruction", "input", "output", "completion", "objects"}
SPECIAL = (mini_o3, openthinkimg, thyme, verl, viscot)
"""Schemas that have conversations, too, and more beside them."""


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether there is a conversation, or a pair of texts, that no other schema claims."""
    if not has_values(record, COLUMNS) or any(claims(schema, record) for schema in SPECIAL):
        return False
    if (turns := first_of(record, *TURNS)) is not None:
        return is_conversation(turns)
    return any(all(isinstance(record.get(text), str) for text in texts) for texts in TEXTS)


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record. Raises RowRefused for several questions in one, and for videos."""
    require_schema(record, COLUMNS, fits)
    if first_of(record, "videos", "video", "audios"):
        raise refuse("the record has a video or sound")
    exchange = _exchange(record)
    answer = exchange.answer if (column := first_of(record, *ANSWERS)) is None else column
    question, changes = choose_question(exchange.question, None)
    fields = Fields(question, images_of(exchange, first_of(record, *IMAGES)), answer, changes=changes)
    if record.get("objects") is not None:
        return fill_in_objects(fields, read_literal(record.get("objects")))
    if any(place in text for text in (question, answer) if isinstance(text, str) for place in PLACES):
        raise refuse("the conversation has places of objects, and the record has none")
    return fields


def _exchange(record: Mapping[str, Any]) -> Exchange:
    """Return question and answer, wherever the record has them."""
    if first_of(record, "history"):
        raise refuse("the record has a history of further questions")
    if (turns := first_of(record, *TURNS)) is None:
        question, answer = first_of(record, "query", "instruction"), first_of(record, "response", "output")
        more = record.get("input")
        question = f"{question}\n{more}" if isinstance(more, str) and more.strip() else question
        return Exchange(question, final_answer(answer))
    exchange, completion = read_exchange(read_turns(turns)), record.get("completion")
    if completion is None or exchange.answer is not None:
        return exchange
    replies = [turn.text for turn in read_turns(completion)]
    if len(replies) != 1:
        raise refuse(f"the completion has {len(replies)} turns, not one")
    return Exchange(exchange.question, final_answer(replies[0]), exchange.images)
