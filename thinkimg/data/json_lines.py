"""Lines of JSONL files, for all readers of them; and the formats that a file of another kind may have."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from thinkimg.data.refusal import short
from thinkimg.errors import UserError

LINE = 256 * 2**20
"""Bytes of a line, at most: enough for some images as data: URIs."""
HEAD = 4096
"""Bytes at each end of a file by which its format is recognised."""
FORM = "A JSONL file has one object in braces on each line, in UTF-8."
UTF_8_MARK = b"\xef\xbb\xbf"

SIGNATURES = {
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it with unzstd",
    b"\xfd7zXZ": "compressed by xz; unpack it with unxz",
    b"BZh": "compressed by bzip2; unpack it with bunzip2",
    b"PK\x03\x04": "a ZIP archive or an Office document; unpack it, or export it as JSONL",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"PAR1": "a Parquet file; set data.source=parquet",
    b"ARROW1": "an Arrow file; convert it to Parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; convert it to Parquet",
    b"SQLite format 3": "an SQLite database; export it as JSONL",
    b"\x89HDF": "an HDF5 file; export it as JSONL",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture; name the table of the pictures",
    b"\xff\xd8\xff": "a picture; name the table of the pictures",
    b"version https://git-lfs": "a pointer of Git LFS, and not the file itself; fetch it with `git lfs pull`",
    b"oid sha256:": "a pointer of Git LFS, and not the file itself; fetch it with `git lfs pull`",
}
"""First bytes of a file -> predicate of the sentence that says so."""


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line number from 1, object) of the lines that are not blank; a text instead of what is no object.

    Lines end at \\n alone: JSON's strings may hold U+2028 and other separators as they are.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE):
            number += 1
            if len(line) == LINE and not line.endswith(b"\n"):
                while (rest := file.readline(LINE)) and not rest.endswith(b"\n"):
                    pass  # skip the rest of the line, in pieces
                yield number, f"longer than {LINE:,} bytes"
                continue
            text = line.strip()
            if number == 1:
                text = text.removeprefix(UTF_8_MARK).strip()
            if text:
                yield number, parse_line(text)


def parse_line(text: bytes) -> dict[str, Any] | str:
    """Return the object of a line; a text that says why it is none."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=refuse_twice)
    except UnicodeDecodeError:
        return f"no UTF-8: {short(text)}"
    except (ValueError, RecursionError) as error:
        return f"no JSON: {short(str(error))}"
    return value if isinstance(value, dict) else f"no JSON object: {short(value)}"


def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises ValueError where a name stands twice, of which json takes the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands twice")
    return record


def require_json_lines(path: Path, first: Sequence[dict[str, Any] | str]) -> None:
    """Raise UserError where a file is no JSONL, and name what it looks like. first: its first rows.

    A file passes that has a few bad rows, wherever they are: at least half of the first ones are objects.
    """
    errors = [record for record in first if isinstance(record, str)]
    if first and 2 * len(errors) <= len(first) and not (first[0] in errors and recognise_binary(path)):
        return
    if format := recognise(path) or recognise_table(path):
        raise UserError(f"{path} is no JSONL file: it looks like {format}.", hint=FORM)
    if len(errors) == len(first):
        content = f"has no line that is a row; the first is {errors[0]}" if errors else "is empty"
        raise UserError(f"{path} {content}.", hint=FORM)


def recognise_binary(path: Path) -> str | None:
    """Return what a file looks like by its signature, for a sentence; None for one that has none."""
    with path.open("rb") as file:
        head = file.read(512)
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    return next((format for signature, format in SIGNATURES.items() if head.startswith(signature)), None)


def recognise(path: Path) -> str | None:
    """Return what a file looks like by its first and last bytes, for a sentence; None for text of an unknown kind."""
    if format := recognise_binary(path):
        return format
    with path.open("rb") as file:
        head = file.read(HEAD)
        file.seek(max(0, path.stat().st_size - HEAD))
        tail = file.read(HEAD)
    text = head.removeprefix(UTF_8_MARK).lstrip()
    if b"\0" in text[:64]:
        printable = text[:64].replace(b"\0", b"").isascii()
        return "text in UTF-16; save it as UTF-8" if printable else "a binary file"
    if text.startswith(b"<"):
        return "a page of HTML or XML, perhaps the error page of a download"
    if text.startswith(b"["):
        return "one JSON array; write one object a line, for example with `jq -c '.[]'`"
    if b"\r" in text.rstrip() and b"\n" not in head:
        return "text whose lines end with CR; end them with LF, for example with `tr '\\r' '\\n'`"
    line = text.partition(b"\n")[0].rstrip()
    if line.startswith(b"{") and not line.endswith(b"}") and tail.rstrip().endswith(b"}"):
        return "one JSON document over several lines; write one object a line, for example with `jq -c .`"
    return None


def recognise_table(path: Path) -> str | None:
    """Return that a file looks like CSV or TSV, for a sentence; None where its first line has no commas or tabs."""
    with path.open("rb") as file:
        line = file.readline(HEAD)
    if line.lstrip(UTF_8_MARK).lstrip()[:1] in (b"{", b"[") or not any(mark in line for mark in (b",", b"\t", b";")):
        return None
    return "a table of CSV or TSV; rename it to metadata.csv and set data.source=folder"
