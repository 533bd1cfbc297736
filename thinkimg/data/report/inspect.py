"""Inspection of a data set before it is prepared: a look at some rows of each table, as `prepare` would read them.

alike.find_all ──► Table.draw ──► recognise ──► make_row ──► checks ──► pictures of some rows ──► TableReport
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from thinkimg.data.fields import BoxForm
from thinkimg.data.hub.hub_tables import settle
from thinkimg.data.pictures.image_files import ImageFiles, ImageReader, content_of
from thinkimg.data.pictures.places import Member
from thinkimg.data.pictures.prints import Picture
from thinkimg.data.recognise import Recognised, recognise
from thinkimg.data.refusal import Reason, Refused, RowRefused, short
from thinkimg.data.report.alike import find_all, find_pattern, first_alike, group_alike, name_of, path_of
from thinkimg.data.report.example import Example, StateQuestion, Thumbnail, make_example, make_thumbnail
from thinkimg.data.report.overrides import list_pins, pin
from thinkimg.data.report.table_report import Limits, TableReport
from thinkimg.data.row import RawRow, make_row
from thinkimg.data.settings import FilesConfig
from thinkimg.data.survey.box_forms import Size
from thinkimg.data.survey.checks import Checker, find_oddities
from thinkimg.data.survey.oddity import Level
from thinkimg.data.survey.passes import LookedRow
from thinkimg.data.survey.samples import make_sample
from thinkimg.data.tables.find import find_root
from thinkimg.data.tables.parquet import spread
from thinkimg.data.tables.table import Rows, Table, list_keys
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageRefused, decode
from thinkimg.records import AnswerType, Sample

ROWS = 64
"""Rows of a table that are looked at."""
ROW_BYTES = 256 * 2**20
"""Bytes of these rows, at which the look ends early; one row more may be in memory."""
PICTURES = 8
"""Pictures of a table that are decoded; rows with more of them are not looked at in pictures."""
PIXELS = 100_000_000
"""Pixels of a table's pictures, at which decoding ends early: 8K pictures take half a second each."""

INSIDE = {"bytes": "bytes in the table", "base64": "base64 in the table"}
"""Origin of a picture that lies in its row -> origin for people."""


@dataclass(frozen=True)
class Inspection:
    """Data set that is being looked at."""

    question: UserError | None
    """Error with which `prepare` asks which of several tables are meant."""
    missing: int
    """Tables of the Hub that were not downloaded, for they are alike to others."""
    looks: Sequence[Callable[[], TableReport]]
    """Functions that look at a table each, or at all that are alike."""


def inspect(data: FilesConfig, limits: Limits, state: StateQuestion, *, pictures: bool) -> Inspection:
    """Return the inspection of a data set, which is here or on the Hub.

    pictures: make small pictures for a sheet. Raises UserError where there is no data set.
    """
    pins: dict[str, str] = {}
    names: list[str] = []

    def choose(tables: list[str]) -> list[str]:
        names.extend(tables)
        return first_alike(tables)

    if settled := settle(data, choose=choose):
        pins = {"data.path": name_of(data), "data.revision": settled.commit}
        data = settled.data
    tables, question = find_all(data)
    groups = group_alike(tables)
    looks = []
    for group in groups:
        pattern = find_pattern(group, tables) if len(groups) > 1 or question is not None else None
        looks.append(partial(_inspect_group, group, pattern, data, limits, state, pictures, pins))
    return Inspection(question, len(names) - len(first_alike(names)), looks)


def _inspect_group(
    group: Sequence[Table],
    pattern: str | None,
    given: FilesConfig,
    limits: Limits,
    state: StateQuestion,
    pictures: bool,
    pins: Mapping[str, str],
) -> TableReport:
    data = given if pattern is None else given.model_copy(update={"files": pattern})
    chosen = [group[index] for index in sorted({0, len(group) // 2, len(group) - 1})]
    counts = [table.rows for table in group if table.rows is not None]
    rows = sum(counts) if len(counts) == len(group) else None
    report = TableReport(group[0].name, group[0].format, group[0].columns, rows, len(group), 0)
    try:
        drawn = [replace(table, draw=_remember(table, ROWS // len(chosen))) for table in chosen]
        records = [record for _, record in drawn[0].draw(ROWS) if isinstance(record, dict)]
        columns = list_keys(report.columns, records)
        report = replace(report, columns=columns, record=records[0] if records else {})
        look = _Look(given, data, limits, recognise(drawn[0], data))
    except UserError as problem:
        return replace(report, problem=problem)
    for table in drawn:
        look.add(table)
    report = look.report(replace(report, record={}), state, pictures)
    return replace(report, pins={**report.pins, **pins})


def _remember(table: Table, count: int) -> Callable[[int], Rows]:
    """Return a `draw` that keeps the rows, for recognition and for reading; ROW_BYTES of them, at most."""
    kept: list[tuple[int, dict[str, Any] | str]] = []
    room = ROW_BYTES
    for row in table.draw(count):
        kept.append(row)
        room -= measure(row[1])
        if room < 0:
            break
    return lambda wanted: islice(kept, wanted)


def measure(value: Any) -> int:
    """Return the number of characters and bytes that a value holds."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(measure, value.values()))
    return sum(map(measure, value)) if isinstance(value, list | tuple) else 0


def host_of(url: str) -> str:
    """Return the host of a URL in lower case, "" where it has none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:  # half a pair of brackets
        return ""


class _Look:
    """Rows of a group of tables, read as `prepare` reads them."""

    def __init__(self, given: FilesConfig, data: FilesConfig, limits: Limits, schema: Recognised) -> None:
        self.given, self.data, self.limits, self.schema = given, data, limits, schema
        root = find_root(path_of(data))
        folder = None if data.images is None else Path(data.images).absolute()
        self.images = ImageFiles(root, limits.accepted, data.url_hosts, images=folder)
        self.checker = Checker(given)
        self.looked = 0
        self.rows: list[RawRow] = []
        self.refused: list[Refused] = []

    def add(self, table: Table) -> None:
        """Read the drawn rows of a table."""
        for number, record in table.draw(ROWS):
            self.looked += 1
            where = f"{table.name} {table.unit} {number or '?'}"
            if isinstance(record, str):
                self.refused.append(Refused(where, Reason.SYNTAX, record))
                continue
            row = make_row(
                record,
                self.schema,
                self.data,
                partial(self._reader_of, table),
                id=f"{table.name}:{number or f'?{self.looked}'}",
                where=where,
                values=table.values,
            )
            refused = row if isinstance(row, Refused) else self.checker.add(row)
            if refused is None:
                assert isinstance(row, RawRow)
                self.rows.append(row)
            else:
                self.refused.append(refused)

    def _reader_of(self, table: Table, value: Any) -> ImageReader:
        """Return the reader of an image whose origin is one for people. Raises RowRefused where it is not there."""
        reader = self.images.reader_of(value, table.folder)
        if reader.origin in INSIDE:
            return replace(reader, origin=INSIDE[reader.origin])
        if reader.origin != "file":
            host = host_of(reader.name or "")
            if host not in self.images.hosts:
                raise RowRefused(Reason.URL, f"{host or short(reader.name)} is not among data.url_hosts")
            return replace(reader, origin=f"URLs of {host}")
        picture = self.images.places.find(content_of(value), table.folder)
        return replace(reader, origin=self._describe(picture, table))

    def _describe(self, place: Path | Member, table: Table) -> str:
        if isinstance(place, Member):
            return f"members of {place.archive.name}"
        if place.is_relative_to(table.folder):
            return "files beside the table"
        images = self.images.places.images
        return "files of data.images" if images and place.is_relative_to(images) else "files of the data set's folder"

    def report(self, report: TableReport, state: StateQuestion, pictures: bool) -> TableReport:
        """Return the report with what was found filled in."""
        decoded = self._decode(pictures)
        sizes = {row.id: [picture.size for picture in small] for row, small in decoded}
        oddities = find_oddities(self.rows, self.given, sizes)
        form = next((oddity.form for oddity in oddities if oddity.form), None)
        examples = tuple(self._make_examples(decoded, form, state))
        details: dict[str, str] = {}
        for refused in self.refused:
            details.setdefault(str(refused.reason), f"{refused.where}: {refused.detail}")
        return replace(
            report,
            looked=self.looked,
            schema=self.schema,
            pictures=Counter(reader.origin for row in self.rows for reader in row.images),
            sizes=tuple(size for listed in sizes.values() for size in listed),
            changes=Counter(change for row in self.rows for change in row.changes),
            types=Counter(str(row.answer_type) for row in self.rows),
            oddities=tuple(oddity for oddity in oddities if oddity.level is not Level.REFUSE),
            refused=Counter(str(refused.reason) for refused in self.refused),
            details=details,
            pins=list_pins(pin(self.data, self.schema, form), self.given),
            examples=examples,
        )

    def _decode(self, pictures: bool) -> list[tuple[RawRow, list[Thumbnail]]]:
        """Return some rows, spread over all, with their pictures. Those whose picture is refused leave `rows`."""
        decoded: list[tuple[RawRow, list[Thumbnail]]] = []
        pixels = 0
        few = [row for row in self.rows if len(row.images) <= PICTURES]
        for row in [few[index] for index in spread(len(few), PICTURES)]:
            count = sum(len(small) for _, small in decoded)
            if count + len(row.images) > PICTURES or pixels > PIXELS:
                break
            small: list[Thumbnail] = []
            try:
                for read in row.images:
                    image = decode(read(), self.limits.accepted)
                    pixels += image.width * image.height
                    small.append(make_thumbnail(image) if pictures else Thumbnail(image.size))
            except RowRefused as refused:
                self._drop(row, refused.reason, refused.detail)
                if refused.passing:
                    break  # a host that does not answer is not waited for again
            except ImageRefused as refused:
                self._drop(row, f"image_{refused.reason}", refused.detail)
            else:
                decoded.append((row, small))
        return decoded

    def _drop(self, row: RawRow, reason: str, detail: str) -> None:
        self.rows = [other for other in self.rows if other is not row]
        self.refused.append(Refused(row.where, reason, detail))

    def _make_examples(
        self, decoded: Sequence[tuple[RawRow, list[Thumbnail]]], form: BoxForm | None, state: StateQuestion
    ) -> Iterator[Example]:
        for row, small in decoded:
            try:
                sample = place_boxes(row, form, [picture.size for picture in small])
            except RowRefused as refused:
                self._drop(row, refused.reason, refused.detail)
            else:
                yield make_example(row.where, sample, small, self.limits.view, state, row.changes)


def place_boxes(row: RawRow, form: BoxForm | None, sizes: Sequence[Size]) -> Sample:
    """Return the sample of a row whose pictures have these sizes, without their hashes.

    form: of boxes, where the row states none; None where it is not known, so that the sample has no boxes to look at,
    and its right answers are no boxes to be drawn. Raises RowRefused for a box outside of its picture.
    """
    pictures = tuple(Picture("", size, None, b"") for size in sizes)
    if form is not None or row.box_form is not None:
        return make_sample(LookedRow(row, pictures), form, "")
    is_box = row.answer_type is AnswerType.BOX
    answers = tuple(f"{answer}, whose form is not known" for answer in row.answers) if is_box else row.answers
    plain = replace(row, targets=(), answer_type=AnswerType.TEXT, answers=answers)
    return replace(make_sample(LookedRow(plain, pictures), None, ""), answer_type=row.answer_type)
