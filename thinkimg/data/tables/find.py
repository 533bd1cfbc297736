"""Tables of a data set, found by what its files are."""

import fnmatch
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from thinkimg.data.json_lines import recognise, recognise_binary
from thinkimg.data.settings import FilesConfig
from thinkimg.data.tables.delimited import open_delimited
from thinkimg.data.tables.foreign import find_step
from thinkimg.data.tables.join import join_tables
from thinkimg.data.tables.json_array import is_document, open_json_array
from thinkimg.data.tables.json_lines import open_json_lines
from thinkimg.data.tables.pairs import has_picture, open_pairs
from thinkimg.data.tables.parquet import open_parquet
from thinkimg.data.tables.table import Table
from thinkimg.errors import UserError, name_some, shorten
from thinkimg.store.files import walk_files

Opener = Callable[[Path, str, Path], Table]
PATTERNS = ("*.parquet", "*.jsonl", "*.ndjson", "*.json", "*.csv", "*.tsv")
DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json"})
"""Files of the Hub's library and of LLaMA-Factory that describe a data set and hold no rows."""
IMAGEFOLDER = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = {
    "training": re.compile(r"(?<![a-z])train(ing)?(?![a-z])"),
    "validation": re.compile(r"(?<![a-z])(val|valid|validation|dev|eval|testmini|minival)(?![a-z])"),
    "test": re.compile(r"(?<![a-z])(test|testdev|teststd)(?![a-z])"),
}
"""Words in a table's name that say what it is for."""


def find_root(path: Path) -> Path:
    """Return the directory of a data set: of its path, which may be one of its files."""
    return path if path.is_dir() else path.parent


def find_tables(data: FilesConfig) -> list[Table]:
    """Return the tables that `data.path` names, by `data.files` where there are several.

    Raises UserError where there is none, where a file is no table, or where it is unclear which are meant.
    """
    path = Path(data.path).absolute()
    if not path.exists():
        raise UserError(f"There is no {shorten(data.path)}.", hint="data.path is a file, or a folder of tables.")
    if path.is_file():
        return [open_table(path, path.name, path.parent)]
    return list(open_folder(path, data.files))


def open_folder(root: Path, pattern: str | None) -> list[Table]:
    """Return the tables of a folder. pattern: of the names of those to read, with or without their directory."""
    paths = [path for path in walk_files(root, *PATTERNS) if not is_hidden(path.relative_to(root))]
    paired = [path for path in paths if path.suffix == ".json" and has_picture(path)]
    single = [path for path in paths if path not in set(paired) and path.name not in DESCRIPTIONS]
    names = {path: printable(path.relative_to(root).as_posix()) for path in single}
    if pattern is not None:
        chosen = [path for path in single if fits(names[path], pattern)]
        if not chosen and any(fits(printable(path.relative_to(root).as_posix()), pattern) for path in paired):
            return [open_pairs(root, paired)]
        if not chosen:
            listed = name_some([*names.values(), *(["pictures with .json"] if paired else [])])
            raise UserError(f"No table of {root} fits data.files={pattern}.", hint=f"There are {listed or 'none'}.")
        single, paired = chosen, []
    if any(path.name in IMAGEFOLDER for path in single) and pattern is None:
        single = [path for path in single if path.name in IMAGEFOLDER]
    if not single and not paired:
        raise UserError(
            f"{root} holds no table: no Parquet, JSON, CSV or TSV file, and no pictures with .json files.",
            hint=find_step(root) or "data.path must be a table, or a folder of tables and their pictures.",
        )
    if pattern is None:
        check_unambiguous(root, [names[path] for path in single], has_pairs=bool(paired))
    if paired:
        return [open_pairs(root, paired)]
    return join_tables([open_table(path, names[path], path.parent) for path in single])


def check_unambiguous(root: Path, names: Sequence[str], *, has_pairs: bool) -> None:
    """Raise UserError where a folder holds the same rows twice, perhaps, or rows that are meant for a test."""
    forms = {Path(name).suffix.lower().replace("ndjson", "jsonl") for name in names}
    if names and (has_pairs or len(forms) > 1):
        listed = name_some([*names, *(["pictures with .json files"] if has_pairs else [])])
        raise UserError(
            f"{root} holds tables of several kinds: {listed}.",
            hint=f"Set data.files to the pattern of those to read, such as data.files={guess_pattern(names[0])}.",
        )
    splits = {name: find_split(name) for name in names}
    kinds = [kind for kind in (*SPLITS, None) if kind in splits.values()]
    if len(kinds) > 1:
        first = [next(name for name in names if splits[name] == kind) for kind in kinds]
        said = " and ".join(kind or "other rows" for kind in kinds)
        raise UserError(
            f"{root} holds tables of {said}: {name_some(first)}.",
            hint=f"Set data.files to the pattern of those to read, such as data.files={guess_pattern(first[0])}.",
        )


def find_split(name: str) -> str | None:
    """Return what the rows of a table are for, by the last of its name's parts that says so; None for none."""
    for part in reversed(name.lower().split("/")):
        for kind, word in SPLITS.items():
            if word.search(part):
                return kind
    return None


def guess_pattern(name: str) -> str:
    """Return a pattern that fits a table and the other shards of it, for a hint."""
    return quote(re.sub(r"\d+-of-\d+", "*", name))


def open_table(path: Path, name: str, folder: Path) -> Table:
    """Return the table of a file, by what the file is. Raises UserError for one that is none."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except PermissionError as error:
        raise UserError(
            f"{path} can't be read: {error.strerror}.", hint="Give yourself the right to read it."
        ) from error
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1"):
        return open_parquet(path, name, folder)
    if form := recognise_binary(path):
        kind = "CSV file" if suffix in (".csv", ".tsv") else "table"
        raise UserError(f"{path} is no {kind}: it looks like {form}.", hint="Name a Parquet, JSON, CSV or TSV file.")
    if suffix == ".parquet":
        return open_parquet(path, name, folder)  # says what is wrong
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"[") and suffix not in (".csv", ".tsv") and not is_line_of_array(text):
        return open_json_array(path, name, folder)
    if text.startswith(b"{") and suffix == ".json" and is_document(path):
        return open_json_array(path, name, folder)
    if suffix in (".csv", ".tsv"):
        if (text.startswith((b"{", b"<")) or b"\0" in text) and (form := recognise(path)):
            raise UserError(f"{path} is no CSV file: it looks like {form}.", hint="Save it as CSV in UTF-8.")
        return open_delimited(path, name, folder)
    return open_json_lines(path, name, folder)


def is_line_of_array(text: bytes) -> bool:
    """Tell whether a file begins with a line that is an array of its own, so that it is no array as a whole."""
    line, end, rest = text.partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(end and rest.strip())


def fits(name: str, pattern: str) -> bool:
    """Tell whether a table's path, or its last part, fits a pattern, or one of several with a | between them."""
    last = name.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(name, one) or fnmatch.fnmatchcase(last, one) for one in pattern.split("|"))


def is_hidden(path: Path) -> bool:
    """Tell whether a part of a path begins with a full stop: caches and remains of tools."""
    return any(part.startswith(".") for part in path.parts)


def printable(name: str) -> str:
    """Return a file's name as valid Unicode: bytes that are no UTF-8 are written as escapes."""
    return name.encode(errors="backslashreplace").decode()


def quote(name: str) -> str:
    """Return a name for a hint."""
    return shorten(name, 80)
