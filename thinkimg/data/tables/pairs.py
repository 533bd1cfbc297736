"""Pictures with an object in a .json file of the same name beside each, as V* has them."""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from thinkimg.data.json_lines import parse_line
from thinkimg.data.tables.table import Rows, Table, all_of, draw_evenly, list_keys

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")
PEEK = 100
"""Files whose keys are looked at when the pairs are opened."""
IMAGE = "image"
"""Column that the picture's path gets."""


def has_picture(path: Path) -> bool:
    """Tell whether a picture of the same name lies beside a .json file."""
    return any(path.with_suffix(suffix).is_file() for suffix in PICTURES)


def open_pairs(root: Path, paths: Sequence[Path]) -> Table:
    """Return the table of all pairs below a folder. paths: the .json files, sorted."""
    read = partial(_read, root, paths)
    columns = list_keys((), (record for _, record in islice(read(), PEEK)))
    return Table(
        root,
        ".",
        "pictures with .json",
        "file",
        columns,
        len(paths),
        all_of(read),
        all_of(read),
        partial(draw_evenly, read),
        root,
        tuple(paths),
        is_open=True,
    )


def _read(root: Path, paths: Sequence[Path]) -> Rows:
    for number, path in enumerate(paths, 1):
        picture = next((file for suffix in PICTURES if (file := path.with_suffix(suffix)).is_file()), path)
        try:
            record = parse_line(path.read_bytes())
        except OSError as error:
            record = f"can't be read: {error.strerror}"
        yield number, record if isinstance(record, str) else record | {IMAGE: picture.relative_to(root).as_posix()}
