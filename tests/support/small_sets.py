"""Small data sets for looks at them before they are prepared: pictures, tables that name them, and settings."""

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from thinkimg.config.load import load_config
from thinkimg.data.report.inspect import inspect
from thinkimg.data.report.table_report import Limits, TableReport
from thinkimg.data.settings import RowsConfig
from thinkimg.images.decode import ImageLimits
from thinkimg.images.settings import ViewLimits


def picture(seed: int, size: tuple[int, int] = (120, 90), kind: str = "PNG") -> bytes:
    """An encoded picture of noise."""
    noise = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_signs(root: Path, count: int = 10, **columns: Callable[[int], Any]) -> Path:
    """A folder with `count` pictures beside signs.jsonl; columns: name -> value of a row."""
    values = {
        "image": lambda i: f"{i}.png",
        "question": lambda i: f"What is sign {i}?",
        "answer": lambda i: f"sign {i}",
    }
    values |= columns
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (root / f"{i}.png").write_bytes(picture(i))
    write_lines(root / "signs.jsonl", ({name: value(i) for name, value in values.items()} for i in range(count)))
    return root


def settings_of(path: Path | str, *overrides: str) -> RowsConfig:
    """The settings of a data set."""
    data = load_config("tiny", [f"data.path={path}", *overrides]).data
    assert isinstance(data, RowsConfig)
    return data


def look(path: Path | str, *overrides: str, pictures: bool = False) -> list[TableReport]:
    """The reports of all tables."""
    limits = Limits(ImageLimits(), ViewLimits(min_pixels=56 * 56, max_pixels=1280 * 28 * 28))
    inspection = inspect(settings_of(path, *overrides), limits, state_question, pictures=pictures)
    return [report() for report in inspection.looks]


def state_question(sample: Any, sizes: Any) -> str:
    """A text of a sample."""
    return f"{sizes} {sample.question} {sample.choices}"
