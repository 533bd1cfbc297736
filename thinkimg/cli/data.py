"""Verbs of `thinkimg data`: look at a data set before it is prepared, and at a prepared one."""

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from cyclopts import App, Parameter

from thinkimg.cli.artifacts import ROOT, open_store
from thinkimg.cli.flags import ArtifactFlag, JsonFlag, SetFlag, StoreFlag, read_path, read_reference
from thinkimg.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinkimg.data.report.summary import Summary
    from thinkimg.data.report.table_report import Limits
    from thinkimg.data.settings import RowsConfig
    from thinkimg.records import Coordinates
    from thinkimg.store.kinds import Dataset

app = App(name="data", help="Look at data sets: before they are prepared, and prepared ones.")

SheetFlag = Annotated[
    Path | None,
    Parameter(name="--html", converter=read_path, help="Write a page with pictures to this file, too: a .html."),
]
CARDS = 48
"""Samples of a prepared data set on a sheet."""


@app.command
def inspect(
    path: Annotated[
        str,
        Parameter(help="A table, a folder of tables and pictures, or the id of a data set.", converter=read_reference),
    ],
    /,
    *,
    html: SheetFlag = None,
    set: SetFlag = None,
) -> None:
    """Show how `prepare` would read a data set, from some rows of each table. Writes nothing but the page."""
    from thinkimg.console import say
    from thinkimg.conversation.question import state_question
    from thinkimg.data.report.inspect import inspect
    from thinkimg.data.report.lines import report_lines, table_facts, table_title
    from thinkimg.data.report.overrides import add_pins, shell_command
    from thinkimg.data.report.page import check_page
    from thinkimg.data.report.sheet import Section, write_sheet

    given = set or []
    data, limits, coordinates = read_settings(path, given)
    state = partial(state_question, coordinates=coordinates)
    if html is not None:
        check_page(html)
    inspection = inspect(data, limits, state, pictures=html is not None)
    if inspection.question is not None:
        say(f"{inspection.question} Each table by itself:\n")
    if inspection.missing:
        say(f"{inspection.missing} further tables of the Hub are like these, and were not downloaded for a look.\n")
    reports, sections = [], []
    for look in inspection.looks:
        report = look()
        title, facts = (
            table_title(report),
            table_facts(report, shell_command(add_pins(given, report.pins)) if report.pins else "", data.max_refused),
        )
        for line in report_lines(title, facts, report.examples[:1]):
            say(line)
        say("")
        reports.append(report)
        sections.append(Section(title, facts, report.examples))
    if html is not None:
        write_sheet(html, f"{path}, as it would be prepared", sections)
        say(f"Pictures: {html}")
    problems = [report.problem for report in reports if report.problem is not None]
    if len(problems) == len(reports):
        if len(problems) == 1:
            raise problems[0]
        raise UserError(f"None of the {len(problems)} tables can be read as it is.", hint="Above each says why.")
    if len(reports) > 1 and inspection.question is None and not problems:
        say(_state_together([dict(report.pins) for report in reports], given))


def _state_together(pins: list[dict[str, str]], given: list[str]) -> str:
    """Return a sentence that says whether several tables can be prepared together, and how."""
    from thinkimg.data.report.overrides import add_pins, shell_command

    common = [{name: text for name, text in entry.items() if name != "data.files"} for entry in pins]
    if all(entry == common[0] for entry in common):
        return f"All tables together:\n{shell_command(add_pins(given, common[0]))}"
    return "The tables are of different kinds. Prepare one of them, or one after the other."


def read_settings(path: str, overrides: list[str]) -> "tuple[RowsConfig, Limits, Coordinates]":
    """Return the settings of the data set at a path, the limits of pictures, and the unit of the model's positions.

    Raises UserError for a mistake.
    """
    from thinkimg.config.load import load_config
    from thinkimg.data.report.table_report import Limits
    from thinkimg.data.settings import RowsConfig
    from thinkimg.images.decode import ImageLimits

    config = load_config(overrides=["data.source=files", f"data.path={path}", *overrides])
    if not isinstance(config.data, RowsConfig) or not hasattr(config.data, "path"):
        raise UserError(f"The source {config.data.source} reads no files.", hint="Leave data.source out.")
    images = config.images
    accepted = ImageLimits(max_bytes=images.max_bytes, max_pixels=images.max_decoded_pixels)
    return config.data, Limits(accepted, config.view()), config.talk().unit


@app.command
def show(reference: ArtifactFlag, /, *, html: SheetFlag = None, store: StoreFlag = ROOT) -> None:
    """Show a prepared data set: counts, what was left out and why, samples as the model reads them."""
    from thinkimg.console import say
    from thinkimg.data.report.lines import report_lines, summary_facts, summary_title
    from thinkimg.data.report.page import check_page
    from thinkimg.data.report.sheet import Section, write_sheet
    from thinkimg.data.report.summary import SHOWN

    if html is not None:
        check_page(html)
    dataset = cast("Dataset", open_store(store).resolve(reference, "dataset"))
    summary = summarise_dataset(dataset, count=SHOWN if html is None else CARDS, pictures=html is not None)
    title, facts = summary_title(summary), summary_facts(summary)
    for line in report_lines(title, facts, summary.examples[:SHOWN]):
        say(line)
    if html is not None:
        write_sheet(html, f"Data set {dataset.short}", [Section(title, facts, summary.examples)])
        say(f"\nPictures: {html}")


def summarise_dataset(dataset: "Dataset", *, count: int, pictures: bool) -> "Summary":
    """Return the summary of a data set, with its questions as a conversation states them."""
    from thinkimg.conversation.question import state_question
    from thinkimg.data.report.summary import summarise
    from thinkimg.images.settings import ImagesConfig, ViewLimits
    from thinkimg.puzzles.geometry import FIRST_SIDE, Geometry
    from thinkimg.records import Coordinates

    config = dataset.manifest["recipe"]["config"]
    asked = config.get("asked") or {}  # neither puzzles nor data sets of earlier versions say how they are asked
    unit = Coordinates(asked.get("conversation", {}).get("coordinates") or Coordinates.PIXELS)
    if "images" in asked:
        view = ViewLimits(**asked["images"])
    elif config["data"]["source"] == "puzzles":
        view = Geometry(config.get("token_side", FIRST_SIDE)).limits
    else:
        images = ImagesConfig()
        view = ViewLimits(min_pixels=images.min_pixels, max_pixels=images.max_pixels)
    return summarise(dataset, view, partial(state_question, coordinates=unit), count=count, pictures=pictures)


def dataset_lines(dataset: "Dataset") -> "Iterator[str]":
    """Yield the lines that `prepare` ends with."""
    from thinkimg.data.report.lines import report_lines, summary_facts, summary_title
    from thinkimg.data.report.summary import SHOWN

    summary = summarise_dataset(dataset, count=SHOWN, pictures=False)
    yield from report_lines(summary_title(summary), summary_facts(summary), summary.examples)
    root = dataset.directory.parents[2]
    store = "" if root.resolve() == ROOT.resolve() else f" --store {shlex.quote(str(root))}"
    yield f"\nSee them: thinkimg data show {dataset.short}{store} --html samples.html"


@app.command
def ls(*, json: JsonFlag = False) -> None:
    """List public data sets that `data.path` takes by name: use, rows, size, licence, id. Downloads nothing."""
    from thinkimg.cli.public_sets import list_sets

    list_sets(as_json=json)


@app.command
def pin(
    name: Annotated[str, Parameter(help="Name of a public data set (`thinkimg data ls`), or an id of the Hub.")],
    /,
    *,
    revision: Annotated[str | None, Parameter(help="Commit, branch or tag. Left out: the main branch.")] = None,
    accept: Annotated[bool, Parameter(help="Pin it although it differs from the list.", negative=[])] = False,
) -> None:
    """Find the commit of a data set, compare it with the list, and record it in thinkimg-pins.toml.

    From then on the name stands for that commit in this directory. Exit code 1 where something differs.
    """
    from thinkimg.cli.public_sets import pin_set

    pin_set(name, revision, accept=accept)
