"""Columns of a data set by their role: named in the settings, or told by their names."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from thinkimg.data.fields import Fields, is_empty, look_up, split_columns
from thinkimg.data.refusal import short
from thinkimg.data.settings import Columns
from thinkimg.data.texts.options import read_choices
from thinkimg.errors import UserError

SEPARATED = re.compile(r"[^|;/,\n][|;/,\n][^|;/,\n]")
"""Texts with marks between them."""
ROLES = ("image", "question", "answer")
"""Roles that every row needs; their columns have their names by default."""
ALIASES = {
    "image": ("images", "picture", "image_path", "img", "file_name", "file_names", "photo", "path", "decoded_image",
              "image_filename", "image_file", "img_path"),
    "question": ("questions", "problem", "prompt", "query", "text", "instruction", "input"),
    "answer": ("answers", "solution", "label", "response", "output", "ground_truth", "gold", "target",
               "correct_answer", "answer_idx", "answer_index", "answerkey", "answer_key", "correct_choice_idx"),
    "choices": ("options", "candidates", "answer_choices"),
}  # fmt: skip
"""Names that public data sets give to the columns of a role."""
WORDS = {
    "image": ("image", "img", "picture", "photo"),
    "question": ("question", "problem", "query", "prompt"),
    "answer": ("answer", "correct", "solution", "label", "truth"),
}
"""Words in the name of a column that may have a role: for hints alone."""
NUMBERED = re.compile(r"(?:image|img|picture)[ _-]?(\d{1,2})", re.IGNORECASE)
"""Column of one of several pictures: image_1, image_2."""
LETTERED = re.compile(r"(?:(?:[Cc]hoice|[Oo]ption|[Oo]pt)s?[ _-]?\(?([A-Ja-j]|\d{1,2})\)?|([A-J]))")
"""Column of one option: A, option_a, choiceB, option1."""
SHOWN = 3  # columns in a hint


def fill_in(columns: Columns) -> Columns:
    """Return the columns with the roles' own names where none is set."""
    return columns.model_copy(update={role: getattr(columns, role) or role for role in ROLES})


def read_columns(columns: Columns) -> frozenset[str]:
    """Return the names of all columns that have a role."""
    return frozenset(part for _, name in columns if name for part in (name, *split_columns(name)))


def convert_columns(record: Mapping[str, Any], columns: Columns) -> Fields:
    """Return the fields of a record whose columns are named by their roles."""

    def value(column: str | None) -> Any:
        return look_up(record, column) if column else None

    return Fields(
        question=value(columns.question),
        images=value(columns.image),
        answer=value(columns.answer),
        answers=value(columns.answers),
        choices=value(columns.choices),
        group=value(columns.group),
    )


def guess_columns(
    columns: Columns, present: Collection[str], records: Sequence[Mapping[str, Any]]
) -> tuple[Columns, tuple[str, ...]]:
    """Return the columns with those roles filled in that a column's name tells, and these roles.

    records: some of the table's. Raises UserError where several columns may have a role, and where a column of options
    holds something else.
    """
    guesses: dict[str, str] = {}
    taken = read_columns(columns)
    for role in ROLES:
        if getattr(columns, role) is not None or (role in present and not _is_elsewhere(role, records)):
            continue
        names = ("decoded_image",) if role in present else ALIASES[role]
        near = [name for name in present if name.casefold() in names and name not in taken]
        if role == "image" and not near:
            near = _find_series(NUMBERED, present, "01")
        if guess := _choose(role, near):
            guesses[role] = guess
            taken |= {guess}
    if columns.choices is None:
        names = ("choices", *ALIASES["choices"])
        near = [name for name in present if name.casefold() in names and name not in taken]
        near = [name for name in near if _holds_choices(name, records)] or _find_series(LETTERED, present, "a01")
        if guess := _choose("choices", near):
            guesses["choices"] = guess
    return columns.model_copy(update=guesses), tuple(guesses)


def _choose(role: str, near: Sequence[str]) -> str | None:
    if len(near) > 1:
        raise UserError(
            f"The {role} may be in the columns {' and '.join(sorted(near))}.",
            hint=f"Set data.columns.{role} to one of them.",
        )
    return near[0] if near else None


def _is_elsewhere(role: str, records: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the column `image` holds names alone, and `decoded_image` the pictures, as in MathVision."""
    if role != "image" or not records:
        return False
    return all(
        isinstance(record.get("image"), str) and isinstance(record.get("decoded_image"), Mapping | bytes)
        for record in records
    )


def _find_series(form: re.Pattern[str], present: Collection[str], first: str) -> list[str]:
    """Return the columns of a series as one name, `A,B,C`: in order from one of the first marks, without gaps."""
    marks: dict[int, str] = {}
    for name in present:
        if match := form.fullmatch(name):
            mark = next(group for group in match.groups() if group).lower()
            marks.setdefault(int(mark) if mark.isdigit() else ord(mark), name)
    order = sorted(marks)
    starts = [int(mark) if mark.isdigit() else ord(mark) for mark in first]
    is_series = order and order[0] in starts and all(after == before + 1 for before, after in pairwise(order))
    is_long = is_series and (len(order) > 1 or form is NUMBERED)
    return [",".join(marks[place] for place in order)] if is_long else []


def _holds_choices(name: str, records: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a column holds lists of options. Raises UserError where it holds texts that may be such lists."""
    values = [record.get(name) for record in records]
    filled = [value for value in values if not is_empty(value) and value not in ([], "[]", {})]
    if not filled:
        return False
    others = [value for value in filled if not _are_choices(read_choices(value))]
    if 2 * len(others) < len(filled):
        return True
    if 2 * sum(_may_be_choices(value) for value in others) < len(filled):
        return False  # the user's own, whatever its name
    raise UserError(
        f"The column '{name}' holds no list of options, but {short(others[0])}.",
        hint=f"Write a JSON list there, or leave it out with data.schema=none and the columns of {', '.join(ROLES)}.",
    )


def _may_be_choices(value: Any) -> bool:
    """Tell whether a text or an object may be a list of options in a form of its own, such as red|blue."""
    return isinstance(value, list | Mapping) or (isinstance(value, str) and bool(SEPARATED.search(value)))


def _are_choices(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(one, str | int | float) for one in value)
    )


def require_columns(
    columns: Columns, present: Collection[str], what: str, records: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Check that the mapped columns are among those present in `what`. Raises UserError for a missing one.

    Of a dotted name its first part has to be there. records: some of the table's, for hints.
    """
    mapped = read_columns(columns)
    for role, name in columns:
        if name is not None and list(present).count(name) > 1:
            raise UserError(f"{what} has the column '{name}' twice.", hint=f"Rename one of them; the {role} is one.")
        if name is None or name in present or all(part.partition(".")[0] in present for part in split_columns(name)):
            continue
        near = _find_near(role, name, sorted(set(present) - mapped), records)
        named = f"Set data.columns.{role}, perhaps to {' or '.join(near[:SHOWN])}."
        hint = named if near else f"Set data.columns.{role} to that column."
        listed = (", ".join(sorted(present)) or "no columns").encode(errors="replace").decode()
        raise UserError(f"{what} has no column '{name}' for the {role}; it has {listed}.", hint=hint)


def _find_near(role: str, name: str, free: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return columns that may be meant, the likeliest first: by their names, or inside another column."""
    names = (role, *ALIASES.get(role, ()))
    near = [other for alias in names for other in free if other.casefold() == alias]
    near += difflib.get_close_matches(name, free, 1, cutoff=0.8)
    near += [other for word in WORDS.get(role, ()) for other in free if word in other.casefold()]
    near += _find_series(NUMBERED, free, "01") if role == "image" else []
    if role == "image":
        near += [top for record in records[:1] for top in free if _is_picture(record.get(top))]
    if not near:
        objects = [(top, record[top]) for record in records[:1] for top in free if isinstance(record.get(top), Mapping)]
        near = [f"{top}.{inner}" for top, value in objects for alias in names for inner in value if inner == alias]
    return list(dict.fromkeys(near))


def _is_picture(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, Mapping) and value.keys() == {"bytes", "path"})
