"""Images of artifacts, written so that few neighbours are read with each, and read by hash."""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from thinkimg import records
from thinkimg.images.decode import FORMATS, ImageLimits, decode, encode_png
from thinkimg.store.manifest import Artifact
from thinkimg.store.tables import IMAGES_PER_GROUP

GROUP_BYTES = 4 * 2**20
"""Bytes at which a row group ends: a reader of one image reads at most these and the image itself."""
WEBP_SIDE = 16383  # pixels of a side, at most
STORED = ImageLimits(max_bytes=2**40, max_pixels=2**40)  # a stored image was checked before, and has a hash


def encode_lossless(image: Image.Image) -> bytes:
    """Return a lossless WebP of an RGB image, or a PNG where a side is above WebP's 16,383 pixels.

    WebP is a quarter smaller than PNG and faster both ways.
    """
    if max(image.size) > WEBP_SIDE:
        return encode_png(image)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, method=0)
    return buffer.getvalue()


def is_plain(data: bytes, image: Image.Image) -> bool:
    """Tell whether every reader of the file sees the pixels of `image = decode(data)`, so that it is stored as it is.

    Readers differ over EXIF orientation, transparency, palettes, 16 bit, and metadata that are damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as plain:
            plain.getexif()
            neutral = plain.mode == "RGB" and not plain.has_transparency_data and plain.size == image.size
            return neutral and plain.tobytes() == image.tobytes()
    except MemoryError:
        raise
    except Exception:  # decode can do without the metadata, a stranger's reader can't
        return False


def keep_or_encode(data: bytes, image: Image.Image) -> bytes:
    """Return the file itself where every reader sees the pixels of `image = decode(data)`, else these encoded anew."""
    return data if is_plain(data, image) else encode_lossless(image)


@contextmanager
def image_writer(path: Path) -> Iterator[Callable[[str, bytes, int, int], None]]:
    """Yield `add(sha256, data, width, height)`, which writes an `images` file row by row with one row group in memory.

    Equal rows give equal bytes.
    """
    rows: list[dict[str, Any]] = []

    def flush() -> None:
        if rows:
            file.write_table(pa.Table.from_pylist(rows, records.image_schema()), row_group_size=len(rows))
            rows.clear()

    def add(sha256: str, data: bytes, width: int, height: int) -> None:
        rows.append({"sha256": sha256, "data": data, "width": width, "height": height})
        if len(rows) == IMAGES_PER_GROUP or sum(len(row["data"]) for row in rows) >= GROUP_BYTES:
            flush()

    # Encoded images don't compress, and a dictionary of them would only be a second copy.
    options = {"version": "2.6", "data_page_version": "1.0", "compression": "none", "use_dictionary": False}
    with pq.ParquetWriter(path, records.image_schema(), **options) as file:
        yield add
        flush()


class ImageTable:
    """Images of some artifacts by hash, for any number of threads.

    Memory: an index (some 200 bytes per image), one row group, and at most cache_bytes of decoded pixels.
    The index is made with the first request.
    """

    def __init__(self, artifacts: Sequence[Artifact], cache_bytes: int = 256 * 2**20):
        self._unread = [path for artifact in artifacts for path in artifact.table_files("images")]
        self._rows: dict[bytes, tuple[int, int, int]] = {}  # hash -> file, row group, row
        self._files: list[pq.ParquetFile] = []
        self._lock = threading.Lock()
        self._group: tuple[int, int] | None = None
        self._data: list[bytes] = []
        self._decoded: OrderedDict[str, Image.Image] = OrderedDict()
        self._room = cache_bytes

    def add(self, artifact: Artifact) -> None:
        """Add the images of one more artifact; an image that is in the table already is still read from there."""
        with self._lock:
            self._unread += artifact.table_files("images")

    @property
    def _index(self) -> dict[bytes, tuple[int, int, int]]:
        with self._lock:
            for path in self._unread:
                file = pq.ParquetFile(path, pre_buffer=False)
                for group in range(file.num_row_groups):
                    for row, sha256 in enumerate(file.read_row_group(group, ["sha256"]).column(0).to_pylist()):
                        self._rows.setdefault(bytes.fromhex(sha256), (len(self._files), group, row))
                self._files.append(file)
            self._unread = []
        return self._rows

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, sha256: str) -> bool:
        return bytes.fromhex(sha256) in self._index

    def get(self, sha256: str) -> bytes:
        """Return the image as it is stored: PNG, JPEG or WebP. Raises KeyError for an unknown hash."""
        try:
            file, group, row = self._index[bytes.fromhex(sha256)]
        except KeyError:
            raise KeyError(f"There is no image {sha256} in these artifacts.") from None
        with self._lock:
            if self._group != (file, group):
                self._data = self._files[file].read_row_group(group, ["data"]).column(0).to_pylist()
                self._group = file, group
            return self._data[row]

    def decoded(self, sha256: str) -> Image.Image:
        """Return the image in RGB at full resolution. It is shared: do not change it. Raises as `get`."""
        with self._lock:
            if sha256 in self._decoded:
                self._decoded.move_to_end(sha256)
                return self._decoded[sha256]
        image = decode(self.get(sha256), STORED)
        with self._lock:
            if sha256 not in self._decoded:
                self._decoded[sha256] = image
                self._room -= _size(image)
            while self._room < 0:
                self._room += _size(self._decoded.popitem(last=False)[1])
        return image


def _size(image: Image.Image) -> int:
    return 3 * image.width * image.height
