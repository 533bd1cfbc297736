"""Values of records as public data sets write them, read for schemas: claims, boxes, tagged answers."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from thinkimg.answers.numbers import read_number
from thinkimg.data.fields import has_column, look_up
from thinkimg.data.refusal import Reason, RowRefused
from thinkimg.data.texts.instructions import remove_instructions
from thinkimg.data.texts.literals import read_literal
from thinkimg.data.texts.options import read_options

MAX_COORDINATE = 1e7
PLACEHOLDER = "<image>"
INSTRUCTION = "You FIRST think about the reasoning process"
SUFFIXES = (
    "Think first, call **image_zoom_in_tool**",
    "Think in the mind first, and then decide whether to call tools",
    INSTRUCTION,
    "# USER Bounding Box Info",
    "# USER IMAGE stored in",
    "# RESULT #",
    "### User Image Path",
)
"""Beginnings of what DeepEyes, Chain-of-Focus, verl, VTool-R1 and Thyme append to a question."""
REQUEST = re.compile(r"USER REQUEST[ #]*:")
"""End of the examples that VTool-R1 puts before a question."""
FOREIGN = ("<think>", "<tool_call>", "<answer>", "<tools>", "<code>")
"""Tags of another system's instructions: a sample must not ask for them."""
OPTION_LINE = re.compile(r"^[ \t]*(?:\([A-Z]\)|\uff08[A-Z]\uff09|[A-Z][.):：])[ \t]*\S", re.MULTILINE)
"""Line that begins with an option's letter: "(A) red", "B. blue", "C: green"."""


def refuse(detail: str) -> RowRefused:
    """Return the refusal of a record that is none of a schema's."""
    return RowRefused(Reason.SCHEMA, detail)


def has_values(record: Mapping[str, Any], columns: Sequence[Collection[str]], nullable: Collection[str] = ()) -> bool:
    """Tell whether all columns of one of the sets hold something; nullable ones may hold nothing.

    A table of two schemas has the columns of both, and those of the other one are empty.
    """
    return any(not _missing(record, names, nullable) for names in columns)


def claims(module: Any, record: Mapping[str, Any]) -> bool:
    """Tell whether a record is of the schema that a module defines."""
    complete = any(all(has_column(record, name) for name in names) for names in module.COLUMNS)
    return complete and bool(module.fits(record))


def require_schema(
    record: Mapping[str, Any], columns: Sequence[Collection[str]], fits: Callable[[Mapping[str, Any]], bool]
) -> None:
    """Raise RowRefused for a record that is not of a schema: a mixture of schemas, renamed columns, other values."""
    if has_values(record, columns, nullable=record) and fits(record):
        return
    missing = min((_missing(record, names) for names in columns), key=len)
    raise refuse(f"the record has no {', '.join(missing)}" if missing else "the record's values are of another form")


def _missing(record: Mapping[str, Any], names: Collection[str], nullable: Collection[str] = ()) -> list[str]:
    return [
        name
        for name in sorted(names)
        if look_up(record, name) is None and not (name in nullable and has_column(record, name))
    ]


def first_of(record: Mapping[str, Any], *columns: str) -> Any:
    """Return the value of the first of the columns that holds something; None where none does."""
    return next((record[name] for name in columns if record.get(name) is not None), None)


def read_boxes(value: Any, column: str) -> tuple[tuple[float, ...], ...]:
    """Return the boxes of a value, four numbers each: of one box, a list of boxes, or objects with one; also as a text.

    Raises RowRefused for anything else.
    """
    value = read_literal(value)
    if value is None:
        return ()
    if isinstance(value, Mapping) or _is_box(value):
        value = [value]
    if not isinstance(value, list | tuple):
        raise refuse(f"{column} is no list of boxes")
    boxes = [_box_of(box) for box in value]
    if not all(map(_is_box, boxes)):
        raise refuse(f"{column} holds something else than boxes of four numbers")
    return tuple(tuple(box) for box in boxes)


def _box_of(value: Any) -> Any:
    if isinstance(value, Mapping):
        corners = [value.get(name) for name in ("x1", "y1", "x2", "y2")]
        return next((value[name] for name in ("bbox", "bbox_2d", "box") if value.get(name) is not None), corners)
    return value


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 4
        and all(type(edge) in (int, float) and abs(edge) <= MAX_COORDINATE for edge in value)
    )


def final_answer(text: Any) -> Any:
    """Return what a response answers at its end: the content of its last `<answer>`, or what follows its thoughts."""
    if not isinstance(text, str):
        return text
    start = text.rfind("<answer>")
    end = text.find("</answer>", start) if start >= 0 else -1
    if end >= 0:
        return text[start + len("<answer>") : end].strip()
    return text.rpartition("</think>")[2].strip() or text


def is_letter(value: Any) -> bool:
    """Tell whether a value names an option by its letter alone: "B", "(B)", "B."."""
    return isinstance(value, str) and len(value) < 16 and bool(re.fullmatch(r"\(?[A-Za-z][.):]?", value.strip()))


def has_options(text: Any) -> bool:
    """Tell whether a text lists options, one per line."""
    return isinstance(text, str) and len(OPTION_LINE.findall(text)) >= 2


def choose_question(prompt: str, column: Any) -> tuple[str, tuple[str, ...]]:
    """Return the question of a prompt without a recipe's instructions, and the changes to it.

    column: the question as another column has it. It is taken where the prompt has more around it, which is no option.
    Raises RowRefused where the prompt holds another system's instructions.
    """
    question = strip_recipe(prompt).strip()
    changes = ("instructions of the recipe removed",) if len(question) < len(prompt.strip()) else ()
    bare = column.replace(PLACEHOLDER, " ").strip() if isinstance(column, str) else ""
    more, less = _squeeze(question), _squeeze(bare)
    if less and less != more and less in more and not (_lists_options(question) and not _lists_options(bare)):
        question = f"{PLACEHOLDER * question.count(PLACEHOLDER)}{bare}"
        changes = ("question read from its own column",)
    if any(tag in remove_instructions(question) for tag in FOREIGN):
        raise refuse("the question holds another system's instructions, which are not known")
    return question, changes


def strip_recipe(prompt: str) -> str:
    """Return a prompt without what the recipes of public sets put around each question."""
    text = prompt
    if requests := list(REQUEST.finditer(text)):
        text = text[requests[-1].end() :]
    if INSTRUCTION in text and "\nQuestion:" in text.partition(INSTRUCTION)[2]:
        text = text.partition(INSTRUCTION)[2].partition("\nQuestion:")[2]
    return text[: min((at for suffix in SUFFIXES if (at := text.find(suffix)) >= 0), default=None)]


def _squeeze(text: str) -> str:
    return " ".join(text.replace(PLACEHOLDER, " ").split())


def _lists_options(text: str) -> bool:
    return has_options(text) or read_options(text) is not None


def require_agreement(answer: Any, other: Any) -> None:
    """Raise RowRefused where two columns have different right answers: two letters, or two numbers."""
    if is_letter(answer) and is_letter(other):
        agree = answer.strip("(). \t\n:").upper() == other.strip("(). \t\n:").upper()
    elif isinstance(answer, str) and isinstance(other, str) and read_number(answer) and read_number(other):
        agree = read_number(answer) == read_number(other)
    else:
        return
    if not agree:
        raise refuse("two columns have different right answers")
