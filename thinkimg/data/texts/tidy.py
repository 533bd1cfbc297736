"""Texts of a record without what public data sets put around them, for the records of all schemas alike.

    row.make_row ──► tidy ──► golds          <answer>D</answer>, \\boxed{5}
                         ├──► placeholders   <image>
                         ├──► instructions   Answer with the option's letter …
                         └──► options        (A) red (B) blue

What may be read in two ways stays as it is; `checks` asks about it.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeGuard

from thinkimg.answers.choices import match_text
from thinkimg.answers.text import normalise
from thinkimg.data.fields import Fields
from thinkimg.data.refusal import Reason, RowRefused, short
from thinkimg.data.texts.golds import is_conversation, read_list, read_names, unwrap
from thinkimg.data.texts.instructions import remove_instructions
from thinkimg.data.texts.options import (
    are_letters,
    name_choice,
    names_option,
    read_choices,
    read_options,
    same_choices,
    strip_letters,
)
from thinkimg.data.texts.placeholders import (
    has_placeholder,
    read_placeholders,
    remove_placeholders,
    replace_placeholders,
)
from thinkimg.records import AnswerType

QUOTED = re.compile(r"\s*\[\s*[\"']")
"""Beginning of a list of texts: numbers may be one answer, [1, 2]."""
MAX_ROUNDS = 8
"""Wrappings inside wrappings: a record with more of them stays as it is."""


def tidy(fields: Fields) -> Fields:
    """Return the fields without placeholders of images, options in the question, and wrapping around answers.

    Tidy fields are returned as they are. Raises RowRefused: PLACEHOLDERS where these do not name each picture, ANSWER
    for wrapping that holds no answer, CHOICES where the letters of the question contradict the order of the choices.
    """
    tidied = fields
    for _ in range(MAX_ROUNDS):
        before, tidied = tidied, _tidy_once(tidied)
        if _texts(tidied) == _texts(before):
            return tidied
    return fields


def _texts(fields: Fields) -> tuple[Any, ...]:
    return fields.question, fields.answer, fields.answers, fields.choices


def _tidy_once(fields: Fields) -> Fields:
    if is_conversation(fields.question):
        raise RowRefused(Reason.TEXT, f"the question is a whole conversation: {short(fields.question)}")
    fields = replace(fields, images=read_names(fields.images))
    answer, answers = unwrap(fields.answer), fields.answers
    if isinstance(answers, list | tuple):
        answers = _listed(unwrap(answers))
    fields = _change(fields, "answers unwrapped", answer=answer, answers=answers)
    # An answer of digits may be an option's own number, and no index.
    fields = replace(fields, choices=read_choices(fields.choices, numbered=not any(map(_is_digits, _answers(fields)))))
    fields = _change(fields, "letters of the choices removed", choices=strip_letters(fields.choices))
    if _is_text(fields.question):
        fields = _tidy_placeholders(fields, fields.question)
        question = remove_instructions(fields.question)
        fields = _change(fields, "instructions on the answer's form removed", question=question)
        fields = _tidy_options(fields, question)
    return _name_choices(fields)


def _tidy_placeholders(fields: Fields, question: str) -> Fields:
    """Return fields whose question and choices have no placeholders of images."""
    pictures = len(fields.images) if isinstance(fields.images, list | tuple) else int(fields.images is not None)
    if not pictures:  # refused for that
        return fields
    choices = fields.choices if isinstance(fields.choices, list | tuple) else ()
    runs = read_placeholders([question, *filter(_is_text, choices)], pictures)
    if any(runs[1:]):
        further = iter(runs[1:])
        worded = [
            replace_placeholders(choice, next(further), pictures) if _is_text(choice) else choice for choice in choices
        ]
        names = dict(zip(filter(_is_text, choices), filter(_is_text, worded), strict=True))
        fields = _map_answers(fields, lambda answer: names.get(answer, answer))
        fields = _change(fields, "placeholders of images put into words", choices=worded)
    _map_answers(fields, _refuse_placeholder)
    text, is_removed, is_worded = remove_placeholders(question, runs[0], pictures)
    if is_removed:
        fields = _change(fields, "placeholders of images removed", question=text)
    return _change(fields, "placeholders of images put into words", question=text, is_change=is_worded)


def _tidy_options(fields: Fields, question: str) -> Fields:
    """Return fields with the options as choices, which the question holds, too, or alone."""
    options = read_options(question)
    if options is None or fields.answer_type is AnswerType.BOX:
        return fields
    if not fields.choices or (_are_texts(fields.choices) and are_letters(fields.choices)):
        answers = _answers(fields)
        is_known = bool(answers) and all(names_option(answer, options) for answer in answers)
        has_letters = not fields.choices or len(fields.choices) == len(options.texts)
        if not is_known or not has_letters:
            return fields
        texts = strip_letters(options.texts)
        return _change(
            replace(fields, answer_type=AnswerType.CHOICE),
            "options read from the question",
            question=options.stem,
            choices=list(texts),
        )
    if not _are_texts(fields.choices) or sorted(map(normalise, options.texts)) != sorted(
        map(normalise, fields.choices)
    ):
        return fields
    if not same_choices(options.texts, fields.choices) and any(
        isinstance(answer, str) and match_text(answer, fields.choices) is None for answer in _answers(fields)
    ):
        raise RowRefused(Reason.CHOICES, "the question has the choices in another order, and the answer is a letter")
    return _change(fields, "options removed from the question, which are the choices", question=options.stem)


def _name_choices(fields: Fields) -> Fields:
    """Return fields whose answers name a choice as `read_choice` reads it."""
    choices = fields.choices
    if isinstance(fields.answer, bool) and not choices:
        words = ["Yes", "True"] if fields.answer else ["No", "False"]
        return _change(fields, "true and false put into words", answer=words)
    if not choices and fields.answer_type is None and (texts := _read_texts(fields.answer)):
        return _change(fields, "several right answers read from a text", answer=texts)
    if not choices or not _are_texts(choices):
        return fields
    named = _map_answers(fields, lambda answer: name_choice(answer, choices))
    return _change(fields, "answers' letters read", answer=named.answer, answers=named.answers)


def _read_texts(answer: Any) -> list[str] | None:
    """Return the texts of a list that a text writes out, as CSV has it; None for another text."""
    values = read_list(answer) if _is_text(answer) and QUOTED.match(answer) else None
    return values if values and _are_texts(values) else None


def _map_answers(fields: Fields, function: Callable[[str], str]) -> Fields:
    """Return fields with a function applied to each answer that is a text."""

    def apply(answers: Any) -> Any:
        if not isinstance(answers, list | tuple):
            return function(answers) if _is_text(answers) else answers
        mapped = [function(answer) if _is_text(answer) else answer for answer in answers]
        is_same = all(new is old for new, old in zip(mapped, answers, strict=True))
        return answers if is_same else mapped

    answer, answers = apply(fields.answer), fields.answers
    return replace(fields, answer=answer, answers=apply(answers) if isinstance(answers, list | tuple) else answers)


def _refuse_placeholder(answer: str) -> str:
    if has_placeholder(answer):
        raise RowRefused(Reason.PLACEHOLDERS, f"the answer has a placeholder of an image: {short(answer)}")
    return answer


def _change(fields: Fields, change: str, *, is_change: bool = True, **values: Any) -> Fields:
    """Return fields with these values, and with a change noted if one of them is new."""
    is_new = is_change and any(
        getattr(fields, name) is not value and getattr(fields, name) != value for name, value in values.items()
    )
    changes = (*fields.changes, change) if is_new and change not in fields.changes else fields.changes
    return replace(fields, **values, changes=changes)


def _answers(fields: Fields) -> list[Any]:
    return [*_listed(fields.answer), *_listed(fields.answers)]


def _listed(answers: Any) -> list[Any]:
    if answers is None:
        return []
    return list(answers) if isinstance(answers, list | tuple) else [answers]


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str)


def _is_digits(value: Any) -> bool:
    return not isinstance(value, str) or (len(value) < 30 and re.fullmatch(r"-?[0-9.]+", value) is not None)


def _are_texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list | tuple) and all(map(_is_text, values))
