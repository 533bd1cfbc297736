"""Options of a question: read from its text, and without the letters that they carry."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from thinkimg.answers.choices import match_letter, match_text
from thinkimg.answers.text import normalise
from thinkimg.data.fields import is_empty
from thinkimg.data.texts.golds import read_list
from thinkimg.data.texts.literals import read_literal

MAX_TAIL = 20_000  # characters at a question's end in which its options stand
MAX_OPTION = 2_000  # characters of an option
MAX_OPTIONS = 10
STEM = "Which?\n"
"""Question put before options that stand alone, so that they are read as those of a question."""
LETTERED = re.compile(r"\s*(?:[(（\[]([A-Za-z])[)）\]]|([A-Za-z])[)）.．:：、])\s*(\S[\s\S]*)")
"""Option or answer with its letter: '(A) red', 'A. red'."""
LINE_MARK = re.compile(
    r"^[ \t]*+(?:[-*•][ \t]++)?(?:\*\*)?(?:(?:option|choice)[ \t]++(?=[A-J]))?"
    r"(?:(?P<open>[(（\[])(?P<enclosed>[A-Ja-j])[)）\]]"
    r"|(?P<bare>(?-i:[A-Ja-j])|[1-9]|10)(?:(?P<sign>[)）.．:：、])|[ \t](?P<spaced>[-–—])[ \t]))(?:\*\*)?[ \t]*",
    re.MULTILINE | re.IGNORECASE,
)
INLINE_MARK = re.compile(
    r"(?:(?<=[\s,;，；。?？:：.])|^|(?=（))(?:(?P<open>[(（\[])(?P<enclosed>[A-Ja-j])[)）\]][ \t]*"
    r"|(?P<bare>[A-J])(?:(?P<sign>[)）．：、])[ \t]*|(?P<spaced>[.:])[ \t]+))"
)
SIGNS = {"（": "(", "）": ")", "．": ".", "：": ":"}
LEAD_IN = re.compile(
    r"(?:\A|(?<=[\n.?!:。？！]))\s*(?:\*\*)?(?:(?:here|these|there)\s+are\s+)?(?:\w+\s+)?"
    r"(?:multiple[- ]choice\s+)?"
    r"(?:(?:answer|possible|available|candidate)\s+)?(?:choices|options|candidates|answers|选项)"
    r"(?:\s+are\s+(?:listed\s+|given\s+)?below\s*[.:]?|(?:\s+are)?(?:\s+(?:below|as\s+follows))?\s*[:：])"
    r"\s*(?:\*\*)?\s*\Z",
    re.IGNORECASE,
)
STEM_END = re.compile(r"[?:.!。？：！…=_)）\"”]\s*\Z|\n[ \t]*\Z")
EQUALS = re.compile(r"\b(?:is|are|be|equals)\s*\Z")
INSTRUCTION = re.compile(
    r"(?:please|answer|select|choose|provide|respond|give|think|output|note|hint|use|select|pick|your|first|only)\b",
    re.IGNORECASE,
)
SENTENCE_BREAK = re.compile(r"[.!?]\s+[A-Z]")


@dataclass(frozen=True)
class Options:
    """Options found in a question. stem: the question without them."""

    stem: str
    texts: tuple[str, ...]
    is_numbered: bool


@dataclass(frozen=True)
class _Mark:
    style: tuple[str, str]
    index: int
    start: int
    end: int


def read_options(question: str) -> Options | None:
    """Return the options at a question's end: 2 to 10, with consecutive letters from A. None where there are none.

    One per line or in one line; also with numbers from 1, one per line. Whatever may be read otherwise is left alone.
    """
    low = max(len(question) - MAX_TAIL, 0)
    tail, head = question[low:], question[:low]
    by_line, inline = (_last_series(_read_marks(mark.finditer(tail))) for mark in (LINE_MARK, INLINE_MARK))
    is_by_line = len(by_line) >= len(inline)  # else a line has several options
    series = by_line if is_by_line else inline
    options = _cut(tail, series, is_by_line) if series else None
    if options and (head or options.stem):
        return Options(head + options.stem, options.texts, options.is_numbered)
    return None


def read_choices(choices: Any, *, numbered: bool = True) -> Any:
    """Return choices as a list, where they are one written out, or map letters to texts; others as they are.

    None for an empty list. numbered: read "1. red" and "2. blue", too; of these an answer that is a number may be the
    option's own.
    """
    listed = choices
    if isinstance(choices, str):
        listed = read_list(choices)
        if listed is None and len(choices) <= MAX_TAIL:
            listed = read_literal(choices)
            listed = listed if isinstance(listed, Mapping | list | tuple) else _read_lines(choices, numbered)
    if isinstance(listed, list | tuple) and listed and all(isinstance(choice, Mapping) for choice in listed):
        listed = _read_pairs(listed) or choices
    if isinstance(listed, Mapping) and {"label", "text"} == listed.keys():
        labels, texts = listed["label"], listed["text"]  # as ARC has them
        is_paired = isinstance(labels, list | tuple) and isinstance(texts, list | tuple) and are_letters(labels)
        listed = texts if is_paired and len(labels) == len(texts) else choices
    elif isinstance(listed, Mapping):
        letters = [str(letter).strip().upper() for letter in listed]
        listed = list(listed.values()) if letters and letters == _letters(len(letters)) else choices
    if listed is None:
        return choices
    if isinstance(listed, list | tuple) and listed and _is_nothing(listed[-1]):  # columns of Parquet are filled up
        listed = list(listed)
        while listed and _is_nothing(listed[-1]):
            listed.pop()
    return None if isinstance(listed, list | tuple) and not listed else listed


def _is_nothing(choice: Any) -> bool:
    # A text of "nan" may be an option.
    return not choice.strip() if isinstance(choice, str) else is_empty(choice)


def _read_lines(choices: str, numbered: bool) -> list[str] | None:
    """Return the options of a text that lists them with their letters or numbers, and holds nothing else."""
    written = read_options(f"{STEM}{choices}")
    is_all = written is not None and written.stem == STEM.strip() and (numbered or not written.is_numbered)
    return list(written.texts) if written and is_all else None


def _read_pairs(choices: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """Return the texts of objects with a letter and a text each, [{"label": "A", "text": "red"}, …]; else None."""
    names = list(choices[0])
    if len(names) != 2 or any(choice.keys() != choices[0].keys() for choice in choices):
        return None
    for letter, text in (names, names[::-1]):
        marks, texts = ([choice[name] for choice in choices] for name in (letter, text))
        is_marked = all(isinstance(mark, str) for mark in marks) and are_letters([mark.upper() for mark in marks])
        if is_marked and all(isinstance(value, str | int | float) for value in texts):
            return texts
    return None


def strip_letters(choices: Any) -> Any:
    """Return choices without the letters in front, if all carry one, consecutively from A; else as they are."""
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        return choices
    matches = [LETTERED.fullmatch(choice) for choice in choices]
    texts = [match[3].strip() for match in matches if match]
    letters = [(match[1] or match[2]).upper() for match in matches if match]
    is_lettered = len(choices) > 1 and letters == _letters(len(choices)) and len(set(texts)) == len(choices)
    return texts if is_lettered else choices


def are_letters(choices: Sequence[Any]) -> bool:
    """Tell whether choices are nothing but the letters of options: A, B, C, or (A), (B), (C)."""
    bare = [choice.strip(" ()[].:") if isinstance(choice, str) else "" for choice in choices]
    return bare == _letters(len(bare))


def names_option(answer: Any, options: Options) -> bool:
    """Tell whether a right answer names one of the options by its letter, by its text, or by both."""
    if not isinstance(answer, str) or len(answer) > MAX_OPTION:
        return False
    if match_text(answer, options.texts) is not None or _read_both(answer, options.texts) is not None:
        return True
    return not options.is_numbered and match_letter(answer, options.texts) is not None


def name_choice(answer: str, choices: Sequence[str]) -> str:
    """Return the text of the choice that an answer names by letter and text, "（B）blue"; other answers as they are.

    Also as they are: answers that `match_text` or `match_letter` reads, and letters that contradict their text.
    """
    if len(answer) > MAX_OPTION or not LETTERED.fullmatch(answer):
        return answer
    if match_text(answer, choices) is not None or match_letter(answer, choices) is not None:
        return answer
    index = _read_both(answer, choices)
    return answer if index is None else choices[index]


def same_choices(first: Sequence[str], second: Sequence[str]) -> bool:
    """Tell whether two lists of choices say the same in the same order."""
    return list(map(normalise, first)) == list(map(normalise, second))


def _read_both(answer: str, choices: Sequence[str]) -> int | None:
    match = LETTERED.fullmatch(answer)
    index = ord((match[1] or match[2]).upper()) - ord("A") if match else len(choices)
    is_choice = match is not None and index < len(choices) and normalise(match[3]) == normalise(choices[index])
    return index if is_choice else None


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + index) for index in range(min(count, 26))]


def _read_marks(matches: Iterator[re.Match[str]]) -> list[_Mark]:
    marks = []
    for match in matches:
        groups = match.groupdict()
        name = groups["enclosed"] or groups["bare"]
        sign = groups["open"] or groups["sign"] or groups.get("spaced") or ""
        kind = "number" if name.isdigit() else "lower" if name.islower() else "upper"
        index = int(name) - 1 if name.isdigit() else ord(name.upper()) - ord("A")
        marks.append(_Mark((SIGNS.get(sign, sign), kind), index, match.start(), match.end()))
    return marks


def _last_series(marks: Sequence[_Mark]) -> list[_Mark]:
    """Return the marks from the last first one of its style to the end if they are consecutive, else none."""
    first = next((mark for mark in reversed(marks) if mark.index == 0), None)
    if first is None:
        return []
    series = [mark for mark in marks if mark.style == first.style and mark.start >= first.start]
    is_series = [mark.index for mark in series] == list(range(len(series)))
    return series if is_series and 2 <= len(series) <= MAX_OPTIONS else []


def _cut(tail: str, series: Sequence[_Mark], by_line: bool) -> Options | None:
    """Return the options of a series of marks; None where they may be something else."""
    stem = tail[: series[0].start]
    texts = [tail[mark.end : following.start] for mark, following in pairwise(series)]
    last, rest = _split_rest(tail[series[-1].end :])
    texts = [" ".join(text.split()) for text in (*texts, last)]
    if all(text.endswith((",", ";", "，", "；")) for text in texts[:-1]):
        texts = [text.rstrip(" ,;，；") for text in texts]
    lead_in = LEAD_IN.search(stem, max(len(stem) - 200, 0))
    is_cut = bool(lead_in) or by_line or bool(STEM_END.search(stem, max(len(stem) - 200, 0)))
    if not is_cut and series[0].style[0] in "([" and len(series) > 2:
        is_cut = bool(EQUALS.search(stem, max(len(stem) - 200, 0)))
    if not is_cut or rest is None or not _are_options(texts, by_line):
        return None
    if lead_in:
        stem = stem[: lead_in.start()]
    stem = f"{stem.rstrip()}\n{rest}".strip() if rest else stem.rstrip()
    return Options(stem, tuple(texts), series[0].style[1] == "number")


def _split_rest(text: str) -> tuple[str, str | None]:
    """Return the last option and the instructions after it; None for a text that may be either."""
    text = text.strip()
    option, _, rest = text.partition("\n")
    rest = rest.strip()
    if rest and not INSTRUCTION.match(rest):
        is_continued = rest[0].islower() and "\n" not in rest
        return (text, "") if is_continued else (option, None)
    return option, rest


def _are_options(texts: Sequence[str], by_line: bool) -> bool:
    if not all(0 < len(text) <= MAX_OPTION for text in texts) or len(set(map(str.casefold, texts))) < len(texts):
        return False
    breaks = [SENTENCE_BREAK.search(text) is not None for text in texts]
    if breaks[-1] and not any(breaks[:-1]):
        return False  # the last one goes on with another sentence
    if by_line:
        return True
    joined = any(text.casefold().endswith((" or", " and", ",or", ",and")) for text in texts[:-1])
    asks = texts[-1].endswith("?") and not any(text.endswith("?") for text in texts[:-1])
    return not joined and not asks
