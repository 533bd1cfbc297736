"""Schema of verl's recipes: a prompt of messages, images, and a reward model with the ground truth."""

from collections.abc import Mapping
from typing import Any

from thinkimg.answers.kinds import is_mathematical
from thinkimg.data.fields import Fields, look_up
from thinkimg.data.records.conversations import is_conversation, read_exchange, read_turns
from thinkimg.data.records.values import (
    choose_question,
    has_values,
    is_letter,
    refuse,
    require_agreement,
    require_schema,
)
from thinkimg.records import AnswerType

VERSION = 2
TITLE = "verl: DeepEyes, Chain-of-Focus, VTool-R1, geo3k"
COLUMNS = ({"prompt", "images", "reward_model.ground_truth"}, {"prompt", "image", "reward_model.ground_truth"})
READS = {"prompt", "images", "image", "reward_model", "extra_info"}


def fits(record: Mapping[str, Any]) -> bool:
    """Tell whether the prompt is a conversation or a text."""
    if not has_values(record, COLUMNS):
        return False
    return isinstance(record.get("prompt"), str) or is_conversation(record.get("prompt"))


def convert(record: Mapping[str, Any]) -> Fields:
    """Return the fields of a record; the question is freed from the recipe's instructions."""
    require_schema(record, COLUMNS, fits)
    exchange = read_exchange(read_turns(record.get("prompt")))
    gold = look_up(record, "reward_model.ground_truth")
    if exchange.answer is not None:
        raise refuse("the prompt holds an answer")
    if isinstance(gold, str) and "|||" in gold:
        raise refuse(f"the answer has {gold.count('|||') + 1} parts")
    require_agreement(gold, look_up(record, "extra_info.answer"))
    question, changes = choose_question(exchange.question, look_up(record, "extra_info.question"))
    images = record.get("images") if record.get("images") is not None else record.get("image")
    return Fields(question, _local(images), gold, answer_type=_type_of(record, gold), changes=changes)


def _type_of(record: Mapping[str, Any], gold: Any) -> AnswerType | None:
    """Return the comparison of the source's own scorer; None where the answer itself tells.

    Mathematics is compared by math-verify, numbers included; plain words and letters of such sources are no formulas.
    """
    match record.get("data_source"):
        case "vstar" if isinstance(gold, str) and len(gold.split()) > 2:
            return AnswerType.JUDGE
        case "chart" if is_letter(gold):
            return AnswerType.CHOICE
        case "hiyouga/geometry3k":
            return AnswerType.MATHS
    is_maths = record.get("ability") == "math" or record.get("data_source") == "thinklite_eureka"
    return AnswerType.MATHS if is_maths and isinstance(gold, str) and is_mathematical(gold) else None


def _local(images: Any) -> Any:
    """Return the images; paths in objects and file: URLs as paths."""
    if isinstance(images, list | tuple):
        return [_path_of(image) for image in images]
    return _path_of(images)


def _path_of(image: Any) -> Any:
    image = image["image"] if isinstance(image, Mapping) and image.keys() == {"image"} else image
    return image.removeprefix("file://") if isinstance(image, str) else image
