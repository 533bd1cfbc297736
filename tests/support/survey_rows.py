"""Rows of a source that is made of them, with small pictures whose reading is counted."""

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from thinkimg.data.pictures.image_files import ImageReader
from thinkimg.data.refusal import Reason, RowRefused
from thinkimg.data.row import RawRow
from thinkimg.data.settings import DataConfig
from thinkimg.data.source import Source
from thinkimg.data.survey.survey import survey
from thinkimg.images.decode import ImageLimits
from thinkimg.records import AnswerType

LIMITS = ImageLimits()


def picture(seed: int, size=(40, 30)) -> Image.Image:
    """Return a picture of large soft blobs, as photographs have them."""
    coarse = np.random.default_rng(seed).integers(256, size=(6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {seed: encode(picture(seed)) for seed in range(60)}


class Reads:
    """Counts the reading of pictures."""

    def __init__(self):
        self.count = Counter()

    def reader(self, key: str, data: bytes | None) -> ImageReader:
        def read() -> bytes:
            self.count[key] += 1
            if data is None:
                raise RowRefused(Reason.PATH, "there is no file")
            return data

        return ImageReader(read, key, "file")


def row(number: int, reader: ImageReader, **values) -> RawRow:
    defaults = {
        "where": f"a.jsonl line {number + 1}", "id": f"row {number}", "question": f"What is {number}?",
        "answers": (f"thing {number}",), "choices": (), "answer_type": AnswerType.TEXT, "images": (reader,),
        "group": None, "targets": (), "columns": {"number": number},
    }  # fmt: skip
    return RawRow(**defaults | values)


def source_of(rows) -> Source:
    return Source("test", "0" * 64, lambda: iter(rows))


def survey_of(rows, **data):
    config = DataConfig(source="jsonl", path="a.jsonl", **data)
    with ThreadPoolExecutor(2) as pool:
        return survey(source_of(rows), config, LIMITS, pool, 4)
