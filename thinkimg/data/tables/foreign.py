"""Files of a folder that are no tables, and what to do with them."""

from pathlib import Path

from thinkimg.store.files import walk_files

STEPS = {
    ".arrow": "Write the .arrow files as Parquet: datasets.load_from_disk(FOLDER).to_parquet(FILE).",
    ".tar": "Unpack the .tar files, so that each picture lies beside its .json file.",
    ".zip": "Unpack the .zip files.",
    ".gz": "Unpack the .gz files.",
    ".xlsx": "Export the .xlsx file as CSV.",
    ".xls": "Export the .xls file as CSV.",
    ".pkl": "Write the .pkl file as Parquet or JSONL; it isn't opened, for it may run code.",
    ".tfrecord": "Write the .tfrecord files as Parquet or JSONL.",
    ".xml": "Write the .xml files as one table, of Parquet or JSONL.",
    ".txt": "Write the .txt files as one table, of Parquet or JSONL.",
}
"""Ending of a file -> hint."""


def find_step(root: Path) -> str | None:
    """Return a hint on the files of a folder that may hold its rows; None where there are none."""
    return next((step for ending, step in STEPS.items() if next(iter(walk_files(root, f"*{ending}")), None)), None)
