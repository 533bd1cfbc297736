"""Writes the held-out questions of a prepared data set as a task of lmms-eval.

    .venv/bin/python examples/evaluators/write_task.py 3f2a task --preset tiny

Needs the preset and settings of the policy's training. The folder can be moved, and needs no thinkimg.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from thinkimg.config.load import load_config
from thinkimg.conversation.question import state_question
from thinkimg.errors import UserError
from thinkimg.exit import run_guarded
from thinkimg.records import Coordinates
from thinkimg.store.artifacts import Store
from thinkimg.store.image_table import ImageTable
from thinkimg.store.kinds import Dataset

COLUMNS = datasets.Features(
    {
        "sample_id": datasets.Value("string"),
        "question": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "images": datasets.List(datasets.Image()),
    }
)


def read_rows(dataset: Dataset, unit: Coordinates) -> Iterator[dict[str, Any]]:
    """Yield the held-out questions in the words of training. The pictures' sizes are added by the endpoint."""
    images = ImageTable([dataset])
    for sample in dataset.split("held_out"):
        yield {
            "sample_id": sample.sample_id,
            "question": state_question(sample, (), unit),
            "answers": list(sample.answers),
            "images": [{"bytes": images.get(sha256), "path": None} for sha256 in sample.images],
        }


def main() -> None:
    """Write the folder. Raises UserError if it exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="beginning of its fingerprint")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--preset", default="development")
    parser.add_argument("--set", action="append", default=[], help="a setting of the preset, as a.b=value")
    given = parser.parse_args()
    config = load_config(given.preset, given.set)
    dataset = Store(config.where.store).resolve(given.dataset, "dataset")
    if given.folder.exists():
        raise UserError(f"{given.folder} exists already.", hint="Name a folder that does not exist.")
    shutil.copytree(Path(__file__).parent / "task", given.folder, ignore=shutil.ignore_patterns("__pycache__"))
    rows = list(read_rows(dataset, config.talk().unit))
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows, features=COLUMNS).to_parquet(given.folder / "held_out.parquet")
    print(f"{len(rows)} questions: {given.folder}")


if __name__ == "__main__":
    run_guarded(main)
