"""Checks of a data set's rows before anything is stored: rows that are surely wrong are refused, the rest is told.

prepared.survey ──► Checker.add(row) ──► Refused, or None
inspect         ──► find_oddities(rows)  ──► Oddity: a warning, or a question that a setting answers
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from thinkimg.answers.boxes import read_stated_box
from thinkimg.answers.choices import OWN_LETTER, is_lettered
from thinkimg.answers.kinds import is_sentence
from thinkimg.answers.right import can_be_right
from thinkimg.data.refusal import Reason, Refused, short
from thinkimg.data.row import RawRow
from thinkimg.data.settings import RowsConfig
from thinkimg.data.survey.advice import common_kind, kind_of
from thinkimg.data.survey.box_checks import find_box_oddity, list_boxes
from thinkimg.data.survey.box_forms import Size
from thinkimg.data.survey.oddity import Level, Oddity
from thinkimg.data.texts.options import MAX_OPTIONS, read_options
from thinkimg.data.texts.placeholders import has_placeholder
from thinkimg.errors import name_some
from thinkimg.records import AnswerType

OTHER_KIND = 0.03
"""Share of right answers of another kind than the type above which it is said."""
SMALL_SIDE = 28
"""Pixels of the smallest token of all families of models: a shorter side is enlarged for each of them."""
ONE_PLACE = 8
"""Rows with choices from which on it is no chance that the right one is always at one place."""
NEVER_FIRST = 24
"""Rows with choices from which on it is no chance that the first one is never right: of four choices 1 in 1,000."""
TEST = re.compile(
    r"(?<![a-z])(?:tests?|testing|test-?mini|mini-?test|dev-?test|test-?dev|dev|val|valid|validation|eval|evaluation"
    r"|mini-?val)(?![a-z])"
)
"""Names of splits that are held out by their makers, in lower case with hyphens."""
OPTIONS = re.compile(
    r"^[ \t]*[(\[]?A[)\].:][ \t]*\S.*\n\s*[(\[]?B[)\].:][ \t]*\S|\b(?:options|choices)\s*:\s*[(\[]?A[)\].:]",
    re.IGNORECASE | re.MULTILINE,
)
BOX = re.compile(
    r"\bbbox|<\|?(?:box|quad|obj)|^\s*[(\[]\s*-?[\d.]{1,20}(?:\s*,\s*-?[\d.]{1,20}){3}\s*[)\]]\s*$"
    r"|^\s*\(\s*[\d.]{1,20}\s*,\s*[\d.]{1,20}\s*\)\s*,?\s*\(\s*[\d.]{1,20}\s*,\s*[\d.]{1,20}\s*\)\s*$"
    r"|\A\s*+(?:\[\s*+)?\{[^\n]*\[\s*-?[\d.]{1,20}(?:\s*,\s*-?[\d.]{1,20}){3}\s*\]",
    re.IGNORECASE,
)
"""Right answer that is a box, in a form that models write."""
HEAVY = re.compile(r"column .* left out: above .*", re.DOTALL)
"""Change of a row (data/row.py) whose column is too long to be kept."""
LETTER = re.compile(r"[(\[]?[A-Za-z][)\].:]?")
LOWER = re.compile(r"[(\[]?[a-j][)\].:]?")
DIGIT = re.compile(r"[0-9]")
"""Right answer that may be the number of an option."""
SHOWN = 3  # names in a sentence
ROLES = {
    "answers": "answers",
    "target": "target",
    "bbox": "target",
    "bboxes": "target",
    "boxes": "target",
    "box": "target",
}
"""Column that a row keeps as the user's own -> the role that it may have."""
LONG = 200
"""Characters above which a text is compared letter by letter in vain."""
SOME = 0.2
"""Share of right answers that are letters of options which nobody knows, or four numbers, above which it is asked."""


class Checker:
    """Checks of rows, one after the other, in memory of a hash per row."""

    def __init__(self, data: RowsConfig):
        self._data = data
        self._rows = 0
        self._refused: Counter[str] = Counter()
        self._boxes = self._numbers = 0
        """Right answers that are boxes, and that are four numbers without brackets; they are compared otherwise."""
        self._texts: list[str] = []
        """Right answers that are compared as texts."""
        self._columns: Counter[str] = Counter()
        self._listed: Counter[str] = Counter()
        """Columns of lists that hold the right answer."""
        self._tables: Counter[str] = Counter()
        self._places: dict[str, Counter[int]] = {}
        self._options = self._letters = self._repeated = self._contradicting = self._heavy = 0
        self._optionless = self._several = 0
        """Right answers that are letters of options, without any options; rows of which several options are right."""
        self._lower: Counter[str] = Counter()
        """Right answers that are small letters, without any options."""
        self._asked: dict[bytes, bytes] = {}

    def add(self, row: RawRow, keys: Sequence[str] = ()) -> Refused | None:
        """Check a row; return its refusal if it is surely wrong. keys: of its images, equal for equal ones."""
        self._rows += 1
        self._tables[table_of(row.where)] += 1
        if refusal := _find_fault(row, is_guessed=self._data.answer_type == "auto"):
            name, reason, detail = refusal
            self._refused[name] += 1
            return Refused(row.where, reason, detail)
        self._columns.update(name for name in ROLES if name in row.columns and not row.targets)
        if not row.choices and row.answer_type is not AnswerType.MATHS:  # geometry3k's choices are left out on purpose
            others = [(name, value) for name, value in row.columns.items() if name not in ROLES]
            self._listed.update(name for name, value in others if _lists(value, row.answers))
        # [1, 2, 3, 4] may be the solution of a system of equations, too.
        if row.answer_type not in (AnswerType.BOX, AnswerType.MATHS):
            is_box = any(map(BOX.search, row.answers))
            self._boxes += is_box
            self._numbers += not is_box and not row.choices and any(map(read_stated_box, row.answers))
        if row.answer_type is AnswerType.TEXT:
            self._texts += row.answers[:1]
        self._optionless += not row.choices and all(map(is_lettered, row.answers))
        if not row.choices and all(map(LOWER.fullmatch, row.answers)):
            self._lower[row.answers[0]] += 1
        self._several += len(row.answers) > 1 and bool(row.choices)
        if not row.choices and OPTIONS.search(row.question):
            self._options += 1
        self._heavy += any(HEAVY.fullmatch(change) is not None for change in row.changes)
        if _are_lettered(row.choices):
            self._letters += 1
        if row.choices and not row.order and row.answers[0] in row.choices:
            index = row.choices.index(row.answers[0])
            self._places.setdefault(table_of(row.where), Counter())[index] += 1
        question, answer = _digest([row.question, *keys], row.choices), _digest(row.answers, ())
        if keys and (earlier := self._asked.setdefault(question, answer)) is not answer:
            self._repeated += 1
            self._contradicting += earlier != answer
        return None

    def oddities(self) -> list[Oddity]:
        """Return what stands out of the rows so far: refusals, then questions, then warnings."""
        refused = [
            Oddity(name, count, f"{_rows(count)} {FAULTS[name]}.", Level.REFUSE)
            for name, count in self._refused.items()
        ]
        others = [*self._find_split(), *self._find_place(), *self._find_never_first(), *self._find_kinds()]
        others += [*self._find_sentences(), *self._find_rest()]
        return refused + sorted(others, key=lambda oddity: oddity.level is not Level.ASK)

    def _find_split(self) -> Iterable[Oddity]:
        data = self._data
        split = getattr(data, "hub_split", "")
        if data.role == "benchmark" or TEST.search(_words(data.files or "")):
            return
        names = [name for name in self._tables if TEST.search(_words(name))]
        if TEST.search(_words(split)):
            names = [split]
        if names:
            count = sum(self._tables[name] for name in names) or self._rows
            yield Oddity(
                "test_split", count,
                f"The name of {name_some(names, SHOWN)} says that {_rows(count)} are for testing.", Level.ASK,
                "Set data.role=benchmark to hold all of it out, or name it in data.files to train on it.",
            )  # fmt: skip

    def _find_place(self) -> Iterable[Oddity]:
        if self._data.shuffle_choices:
            return
        places = {table: places for table, places in self._places.items() if places.total() >= ONE_PLACE}
        fixed = {table: next(iter(counts)) for table, counts in places.items() if len(counts) == 1}
        if fixed:
            count = sum(self._places[table].total() for table in fixed)
            letters = " and ".join(sorted({chr(ord("A") + place) for place in fixed.values()}))
            sentence = f"In all {count} rows with options of {_join(fixed)} option {letters} is right."
            level = Level.ASK if self._data.shuffle_choices is None else Level.WARN
            hint = "Set data.shuffle_choices=true to put the options in a random order, or false to keep theirs."
            yield Oddity("one_place", count, sentence, level, hint)

    def _find_never_first(self) -> Iterable[Oddity]:
        for table, places in self._places.items():
            if places.total() >= NEVER_FIRST and not places[0] and len(places) > 1:
                sentence = (
                    f"In none of the {places.total()} rows with options of {_join([table])} option A is right: "
                    "answers that are numbers may count from 1, and are read as if 0 were the first."
                )
                yield Oddity("never_first", places.total(), sentence, Level.WARN)

    def _find_kinds(self) -> Iterable[Oddity]:
        """Yield a warning where many answers are compared as texts by the user's own setting, and are none.

        Boxes that are compared otherwise are a question.
        """
        boxes = self._boxes + (self._numbers if self._numbers > SOME * self._rows else 0)
        if boxes:
            sentence = f"The right answers of {_rows(boxes)} look like boxes and are not compared as such."
            level = Level.ASK if self._data.answer_type == "auto" else Level.WARN
            hint = (
                "Set data.answer_type=box to read them as boxes, or data.answer_type=text to compare them as they are."
            )
            yield Oddity("other_kind", boxes, sentence, level, hint)
        if self._data.answer_type != "text" or not self._texts:
            return
        total = len(self._texts)
        if kind := common_kind(self._texts):
            count, name, better = kind
            comparison = (
                "compares them as they are written. Set data.answer_type=number to compare their values: whole "
                "numbers exactly, others within rewards.answer.number_tolerance."
                if better == "number"
                else f"also pays for answers that are only similar. Set data.answer_type={better} to compare them "
                "exactly."
            )
            sentence = f"{count} of {total} right answers are {name}, but data.answer_type is text, which {comparison}"
            yield Oddity("other_kind", count, sentence, Level.WARN)
            return
        kinds = Counter(kind for kind in map(kind_of, self._texts) if kind)
        if kinds.total() > OTHER_KIND * total:
            counts = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
            yield Oddity(
                "other_kind", kinds.total(),
                f"Of {total} right answers that are compared as texts some are of another kind: {counts}. "
                "Set data.answer_type=auto to compare each by its own kind.", Level.WARN,
            )  # fmt: skip

    def _find_sentences(self) -> Iterable[Oddity]:
        count = sum(is_sentence(text) or len(text) > LONG for text in self._texts)
        if count:
            many = count > OTHER_KIND * len(self._texts)
            sentence = (
                f"{count} of {len(self._texts)} right answers are sentences, or long, compared letter by letter: "
                "another sentence is paid for, and the same in other words is not."
            )
            level = Level.ASK if many and self._data.answer_type != "text" else Level.WARN
            hint = "Set data.answer_type=judge to ask a model, or data.answer_type=text to compare them all the same."
            yield Oddity("sentences", count, sentence, level, hint)

    def _find_rest(self) -> Iterable[Oddity]:
        mapped = {name for _, name in self._data.columns}
        # A small letter may also be what is to be read: several different ones of many rows are options.
        is_many = len(self._lower) > 1 and self._lower.total() >= ONE_PLACE
        letters = self._optionless + (self._lower.total() if is_many else 0)
        if letters > SOME * self._rows and self._data.answer_type == "auto":
            sentence = f"The right answers of {_rows(letters)} are letters, and there are no options."
            hint = (
                "Set data.columns.choices to the column of the options (or several: A,B,C,D), or "
                "data.answer_type=exact to compare the letters."
            )
            yield Oddity("letters_alone", letters, sentence, Level.ASK, hint)
        for name, count in self._columns.items():
            if name not in mapped:
                role = ROLES[name]
                sentence = f"There is a column '{name}' that is not used. Set data.columns.{role}={name} to use it."
                yield Oddity("unused_column", count, sentence, Level.WARN)
        for name, count in self._listed.items():
            if count > SOME * self._rows:
                sentence = f"The column {short(name)} lists the right answer of {_rows(count)} among others."
                hint = f" Set data.columns.choices={name} if these are options."
                yield Oddity("unused_column", count, sentence + hint, Level.WARN)
        if self._several:
            sentence = f"Of {_rows(self._several)} several options are right, and any one of them is paid for."
            yield Oddity("several_right", self._several, sentence, Level.WARN)
        if self._options:
            sentence = f"{_rows(self._options)} seem to have options in the question that were not read as choices."
            yield Oddity("options_in_question", self._options, sentence, Level.WARN)
        if self._letters:
            sentence = f"The options of {_rows(self._letters)} carry letters of their own."
            yield Oddity("letters_in_options", self._letters, sentence, Level.WARN)
        if self._heavy:
            sentence = f"Of {_rows(self._heavy)} a column that is not used is too long to be kept."
            yield Oddity("heavy_text", self._heavy, sentence, Level.WARN)
        if self._repeated:
            others = f", {self._contradicting} of them with another right answer" if self._contradicting else ""
            sentence = f"{_rows(self._repeated)} ask what an earlier row asks of the same pictures{others}."
            yield Oddity("duplicate_question", self._repeated, sentence, Level.WARN)


FAULTS = {
    "placeholders": "hold a placeholder of an image in the question or an option",
    "right_scores_one": "have a right answer that would not be paid for",
    "options_in_question": "name a letter or a number whose options could not be read from the question",
    "letters_in_options": "have options whose own letters no longer fit their shuffled order",
}
"""Check -> what is wrong with the rows that it refuses."""


def _find_fault(row: RawRow, *, is_guessed: bool) -> tuple[str, str, str] | None:
    """Return (check, reason, detail) for a row that is surely wrong.

    is_guessed: nobody has said that digits are numbers.
    """
    if any(map(has_placeholder, (row.question, *row.choices))):
        return "placeholders", Reason.TEXT, f"a placeholder is left in the question: {short(row.question)}"
    if not row.choices and OPTIONS.search(row.question):
        if row.answer_type is AnswerType.CHOICE or LETTER.fullmatch(row.answers[0]):
            detail = f"the answer {short(row.answers[0])} names no option that could be read from {short(row.question)}"
            return "options_in_question", Reason.CHOICES, detail
        if is_guessed and _may_number_option(row):
            detail = (
                f"the answer {short(row.answers[0])} may be a number, or that of an option in {short(row.question)}"
            )
            return "options_in_question", Reason.CHOICES, f"{detail}; data.answer_type=integer takes it for a number"
    if row.order and tuple(sorted(row.order)) != row.order and _letters_of(row.choices):
        return "letters_in_options", Reason.CHOICES, f"the options carry other letters: {short(list(row.choices))}"
    if not can_be_right(row):
        detail = f"the right answer {short(row.answers[0])} would not be paid for as {row.answer_type}"
        return "right_scores_one", Reason.ANSWER, detail
    return None


def find_oddities(rows: Iterable[RawRow], data: RowsConfig, sizes: Mapping[str, Sequence[Size]] = {}) -> list[Oddity]:
    """Return what stands out of some rows, without storing any: what `prepare` would refuse, ask or warn about.

    sizes: row id -> (width, height) in pixels of its pictures, for rows whose pictures were decoded; the checks of
    boxes and of small sides need them. Keys of images are taken where they cost no reading.
    """
    checker = Checker(data)
    good = [row for row in rows if checker.add(row, _cheap_keys(row)) is None]
    looked = [row for row in good if row.id in sizes]
    boxes = [box for row in looked for box in list_boxes(row, sizes[row.id][0])]
    return [
        *checker.oddities(),
        *find_box_oddity(boxes, data),
        *find_small_sides(sizes[row.id] for row in looked),
    ]


def find_small_sides(sizes: Iterable[Sequence[Size]]) -> list[Oddity]:
    """Return a warning where pictures have a side below the smallest view, and are enlarged."""
    count = sum(any(min(size) < SMALL_SIDE for size in row) for row in sizes)
    if not count:
        return []
    sentence = f"Pictures of {_rows(count)} have a side below {SMALL_SIDE} pixels and are enlarged for the model."
    return [Oddity("small_side", count, sentence, Level.WARN)]


def table_of(where: str) -> str:
    """Return the name of the table of a row's place, such as "a.jsonl line 3"; "" where it has none."""
    name, *number = where.rsplit(" ", 2)
    return name if len(number) == 2 else ""


def _words(name: str) -> str:
    """Return a name in lower case, with a hyphen where a word begins in camel case."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower().replace("_", "-")


def _cheap_keys(row: RawRow) -> list[str]:
    names = [getattr(reader, "name", None) for reader in row.images]
    return [name for name in names if name] if all(names) else []


def _may_number_option(row: RawRow) -> bool:
    """Tell whether the right answer may count the options at the question's end, from 0 or from 1."""
    options = read_options(row.question) if DIGIT.fullmatch(row.answers[0]) else None
    return options is not None and int(row.answers[0]) <= len(options.texts)


def _lists(value: Any, answers: Sequence[str]) -> bool:
    """Tell whether a column's value is a list of a few different texts, of which one is the right answer."""
    is_list = isinstance(value, list) and 2 <= len(value) <= MAX_OPTIONS and all(isinstance(one, str) for one in value)
    return is_list and len(set(value)) == len(value) and answers[0] in value


def _letters_of(choices: Sequence[str]) -> list[str]:
    """Return the letters that all choices carry, upper case; none where one carries none."""
    matches = [OWN_LETTER.fullmatch(choice) for choice in choices]
    return [match[1].upper() for match in matches if match] if all(matches) else []


def _are_lettered(choices: Sequence[str]) -> bool:
    letters = _letters_of(choices)
    return bool(letters) and sorted(letters) == [chr(ord("A") + place) for place in range(len(letters))]


def _digest(texts: Iterable[str], choices: Iterable[str]) -> bytes:
    return hashlib.blake2b(json.dumps([list(texts), list(choices)]).encode(), digest_size=16).digest()


def _join(names: Iterable[str]) -> str:
    return name_some([name or "the table" for name in names], SHOWN)


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"
