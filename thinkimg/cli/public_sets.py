"""List of public data sets, and the commits that are recorded for them."""

from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.table import Table

from thinkimg.cli.tables import add_row, print_json
from thinkimg.console import console, format_size, say
from thinkimg.data.hub.hub_tables import check_names, list_tables
from thinkimg.data.hub.pin_check import Comparison, compare, read_content
from thinkimg.data.hub.pins import FILE, read_pins, write_pin
from thinkimg.data.hub.public_sets import FIGURES, Figure, PublicSet, explain_missing, public_sets, read_remote
from thinkimg.data.hub.snapshot import Snapshot
from thinkimg.errors import UserError

CAPTION = (
    "data.path takes these names. A ? marks what no source was seen for that can be looked up; --json has sources."
)


def list_sets(*, as_json: bool) -> None:
    """Print all public data sets that have a name."""
    sets, pins = list(public_sets().values()), read_pins()
    if as_json:
        print_json([describe_set(entry, pins.get(entry.name)) for entry in sets])
        return
    table = Table(caption=CAPTION, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("name", "for", "rows", "size", "licence", "bad rows", "id", "pinned"):
        table.add_column(heading, justify="right" if heading in ("rows", "size") else "left", overflow="fold")
    for entry in sets:
        pinned = pins[entry.name]["commit"][:12] if entry.name in pins else ""
        rows = mark(entry.rows, f"{entry.rows.value:,}" if entry.rows else "")
        size = mark(entry.bytes, format_size(entry.bytes.value) if entry.bytes else "")
        licence = mark(entry.licence, str(entry.licence.value) if entry.licence else "")
        bad = mark(entry.bad_rows, ", ".join(entry.bad_rows.value) if entry.bad_rows else "")
        add_row(table, entry.name, entry.role, rows, size, licence, bad, mark(entry.id, entry.repository), pinned)
    console.print(table)
    for entry in sets:
        if entry.note:
            say(f"{entry.name}: {entry.note}")


def mark(figure: Figure | None, text: str) -> str:
    """Return the text of a figure, with a ? where it is not verified; a ? alone where there is none."""
    return text if figure and figure.is_verified else f"{text} ?".strip()


def describe_set(entry: PublicSet, pin: dict[str, Any] | None) -> dict[str, Any]:
    """Return a data set as JSON: each figure with its value, its source, and whether it is verified."""
    figures = {name: getattr(entry, name) for name in FIGURES}
    return {
        "name": entry.name,
        "title": entry.title,
        "role": entry.role,
        "schema": entry.schema,
        "note": entry.note,
        "pinned": pin["commit"] if pin else None,
    } | {
        name: figure and {"value": figure.value, "source": figure.source, "verified": figure.is_verified}
        for name, figure in figures.items()
    }


def pin_set(name: str, revision: str | None, *, accept: bool) -> None:
    """Print a comparison of a data set with the list, and record its commit if nothing differs, or if accepted."""
    remote = read_remote(name, is_explicit=True)
    if remote is None:
        raise explain_missing(name)
    if remote.split is not None:
        raise UserError(f"{name} names a split; a commit holds for all of them.", hint=name.partition("@")[0])
    check_names(revision, None)
    snapshot = Snapshot.open(remote.id, revision)
    say(f"{name}: {remote.id} at {snapshot.commit}")
    tables = list_tables(snapshot, remote, None, None, None)
    if remote.entry:
        comparisons = compare(remote.entry, snapshot, tables)
        print_comparisons(comparisons)
        differences = [one.what for one in comparisons if one.differs]
        counted = next(one.found for one in comparisons if one.what == "rows")
    else:
        rows = read_content(snapshot, tables).rows
        differences, counted = [], "" if rows is None else str(rows)
        say(f"{len(tables)} tables, {counted or 'not counted'} rows")
    if differences and not accept:
        say(f"Nothing is pinned, as this differs from the list: {', '.join(differences)}. To pin it so: --accept.")
        raise SystemExit(1)
    today = datetime.now(UTC).date().isoformat()
    record: dict[str, str | int] = {"id": remote.id, "commit": snapshot.commit, "pinned": today}
    write_pin(name, record | ({"rows": int(counted)} if counted else {}))
    say(f"Pinned in {FILE}: data.path={name} stands for this commit in this directory.")


def print_comparisons(comparisons: list[Comparison]) -> None:
    """Print what the list says beside what the Hub has."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("", "list", "Hub", ""):
        table.add_column(heading, overflow="fold")
    for one in comparisons:
        add_row(table, one.what, one.listed or "?", one.found or "?", "differs" if one.differs else "")
    console.print(table)
