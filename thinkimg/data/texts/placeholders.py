"""Placeholders of images in texts: `<image>` and its kin, counted, and removed or put into words.

Pictures stand before the question in our prompt, so a placeholder that only marks their place means nothing there. One
inside a sentence is replaced by "the image", or by "image 1" as the prompt numbers several pictures, from 0.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from thinkimg.data.refusal import Reason, RowRefused

IMAGE = re.compile(
    r"[<\[](?:(?<=<)(?:"
    r"\|vision_start\|>(?:<\|image_pad\|>)++<\|vision_end\|>|\|image_pad\|>(?:<\|image_pad\|>)*+"
    r"|img>(?:<img_context>)++</img>|img_context>(?:<img_context>)*+|img>[^<>\n]{0,4096}</img>"
    r"|\|?(?:start_of_)?(?:image|img|picture)(?:here|_?placeholder|_?token|_soft_token)?[ _-]?(?P<angle>\d{1,3})?\|?>"
    r"(?:</(?:image|img)>)?)"
    r"|(?<=\[)(?<!!\[)(?:image|img)[ _-]?(?P<square>\d{1,3})?\](?!\())",
    re.IGNORECASE,
)
OTHER = re.compile(
    r"[<\[](?:(?<=<)\|?(?:video|audio|speech)(?:_pad|_?placeholder|_?token|here)?[ _-]?\d{0,3}\|?>"
    r"|(?<=\[)(?:video|audio)\])",
    re.IGNORECASE,
)
ARTICLES = frozenset([
    "the", "this", "that", "a", "an", "given", "following", "above", "below", "provided", "attached", "input",
    "each", "every",
])  # fmt: skip
BEFORE_A_NOUN = ARTICLES | frozenset([
    "in", "of", "on", "from", "to", "with", "at", "and", "or", "between", "vs", "versus", "for", "about",
    "by", "into", "than", "see", "inside", "within", "using", "does", "is", "are", "compare", "describe",
])  # fmt: skip
"""Words that want a noun behind them: a placeholder there belongs to the sentence."""
AFTER_A_NOUN = frozenset([
    "shows", "show", "depicts", "contains", "represents", "displays", "illustrates", "and", "or", "vs",
    "versus", "has", "with", "below", "above",
])  # fmt: skip
COPULAS = frozenset([
    "is", "are", "was", "were", "does", "do",
])  # fmt: skip
"""Verbs that begin a question, too: of one picture, "<image> is it red?"."""
OPTION = re.compile(r"(?:\A|\s)[(（\[]?[A-Ja-j][)）\].:：、]\Z")
"""Letter of an option, which the placeholder then is."""
SENTENCE_ENDS = ".?!:。？！：…"
MAX_CONTEXT = 80  # characters beside a placeholder that are looked at


@dataclass(frozen=True)
class Run:
    """Adjacent placeholders. indices: of their pictures, from 0."""

    start: int
    end: int
    indices: tuple[int, ...]


def read_placeholders(texts: Sequence[str], pictures: int) -> list[list[Run]]:
    """Return the placeholders of each text, adjacent ones together.

    Raises RowRefused (PLACEHOLDERS) where there are any and they do not name each of the pictures, or where one stands
    for a video or a sound. Those with numbers count once for each number, from 0 or from 1.
    """
    for text in texts:
        if other := OTHER.search(text):
            raise RowRefused(Reason.PLACEHOLDERS, f"the question is about a video or a sound: {other[0]}")
    matches = [list(IMAGE.finditer(text)) for text in texts]
    numbers = [_number(match) for found in matches for match in found]
    distinct = {number for number in numbers if number is not None}
    unnumbered = numbers.count(None)
    if numbers and len(distinct) + unnumbered != pictures:
        count = len(distinct) + unnumbered
        raise RowRefused(Reason.PLACEHOLDERS, f"{_count(count, 'placeholder')} for {_count(pictures, 'picture')}")
    if distinct and (unnumbered or max(distinct) - min(distinct) >= pictures or min(distinct) > 1):
        raise RowRefused(Reason.PLACEHOLDERS, f"the placeholders are not numbered from 0 or 1 to {pictures}")
    first, position = min(distinct, default=0), 0
    runs: list[list[Run]] = []
    for text, found in zip(texts, matches, strict=True):
        runs.append([])
        for match in found:
            number = _number(match)
            index = position if number is None else number - first
            position += 1
            last = runs[-1][-1] if runs[-1] else None
            if last and not text[last.end : match.start()].strip():
                runs[-1][-1] = Run(last.start, match.end(), (*last.indices, index))
            else:
                runs[-1].append(Run(match.start(), match.end(), (index,)))
    return runs


def has_placeholder(text: str) -> bool:
    """Tell whether a text has a placeholder of an image."""
    return IMAGE.search(text) is not None


def remove_placeholders(text: str, runs: Sequence[Run], pictures: int) -> tuple[str, bool, bool]:
    """Return a question without these placeholders; whether any was removed; whether any became words."""
    pieces: list[str] = []
    position = words = removed = 0
    for run in runs:
        before, after = text[max(run.start - MAX_CONTEXT, 0) : run.start], text[run.end : run.end + MAX_CONTEXT]
        if _belongs_to_sentence(before, after, pictures):
            pieces += [text[position : run.start], name_images(run.indices, before, after, pictures)]
            position, words = run.end, words + 1
            continue
        removed += 1
        pieces.append(text[position : run.start].rstrip(" \t"))
        position = run.end + len(after) - len(after.lstrip(" \t"))
        starts_line = not before.strip(" \t") or before.rstrip(" \t").endswith("\n")
        if starts_line and text[position : position + 1] == "\n":
            position += 1
        elif not starts_line and text[position : position + 1] != "\n":
            pieces.append(" ")
    return "".join([*pieces, text[position:]]).strip(), bool(removed), bool(words)


def name_images(indices: Sequence[int], before: str, after: str, pictures: int) -> str:
    """Return words for pictures between what stands before and after: "the image", "Image 0, image 1"."""
    previous = re.findall(r"[^\W_]+", before)[-1:]
    has_article = bool(previous) and previous[0].casefold() in ARTICLES and before[-1:].isspace()
    if pictures == 1:
        words = ", ".join(["image" if has_article else "the image"] * len(indices))
    else:
        words = ", ".join(f"image {index}" for index in indices)
    if not before.strip() or before.rstrip(" \t")[-1:] in "\n.?!。？！":
        words = words[0].upper() + words[1:]
    return " " * before[-1:].isalnum() + words + " " * after[:1].isalnum()


def replace_placeholders(text: str, runs: Sequence[Run], pictures: int) -> str:
    """Return a choice with all of these placeholders put into words."""
    pieces: list[str] = []
    position = 0
    for run in runs:
        before = text[max(run.start - MAX_CONTEXT, 0) : run.start]
        words = name_images(run.indices, before, text[run.end : run.end + 1], pictures)
        pieces += [text[position : run.start], words]
        position = run.end
    return "".join([*pieces, text[position:]])


def _belongs_to_sentence(before: str, after: str, pictures: int) -> bool:
    """Tell whether a placeholder is a word of its sentence, by the texts before and after it."""
    before, after = before.rstrip(" \t"), after.lstrip(" \t")
    starts_line, ends_line = not before or before.endswith("\n"), not after or after.startswith("\n")
    if starts_line and ends_line:
        return False
    if OPTION.search(before):
        return True
    last = re.findall(r"[^\W_]+", before)[-1:]
    first = re.match(r"[^\W_]+", after)
    if starts_line:
        words = AFTER_A_NOUN | COPULAS if pictures > 1 else AFTER_A_NOUN
        return after[0] in ",.;)'’?!" or (first is not None and first[0] in words)
    if ends_line:
        is_label = pictures > 1 and before[-1] in ":："
        is_wanted = bool(last) and before.endswith(last[0]) and last[0].casefold() in BEFORE_A_NOUN
        return is_label or is_wanted or before[-1] in ",("
    is_between = before[-1] in SENTENCE_ENDS and not after[0].islower() and after[0] not in ",.;)?!"
    return not is_between


def _number(match: re.Match[str]) -> int | None:
    digits = match["angle"] or match["square"]
    return int(digits) if digits else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
