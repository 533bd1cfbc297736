"""Reading of a data set's images: bytes, paths inside the data set, data: URIs, URLs of allowed hosts."""

import base64
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from thinkimg.data.source import ImageReader, Reason, RowRefused, short
from thinkimg.data.urls import UrlReader
from thinkimg.images.decode import ImageLimits
from thinkimg.store import files
from thinkimg.store.manifest import canonical_json


class ImageFiles:
    """Readers for the images of one data set.

    root: the directory from which its paths start and which no name may leave. Links inside it are followed wherever
    they lead, as the Hub's cache consists of them. also: directories in which absolute paths are accepted (a library's
    cache). hosts: allowed in URLs of images.
    """

    def __init__(self, root: Path, limits: ImageLimits, hosts: Iterable[str] = (), also: Iterable[Path] = ()):
        self.root, self.limits = root.absolute(), limits
        self.hosts = {host.lower() for host in hosts}
        self.also = {place for path in also for place in (path.absolute(), path.resolve())}
        self._urls = UrlReader(self.hosts, limits.max_bytes)

    def reader_of(self, value: Any) -> ImageReader:
        """Return the reader of an image: of bytes, a path, a data: URI, a URL, or the Hub's {"bytes", "path"}.

        Raises RowRefused for any other value.
        """
        content = content_of(value)
        if isinstance(content, bytes) and content:
            return lambda: content
        if not isinstance(content, str) or not content:
            raise RowRefused(Reason.IMAGE, f"no image: {short(value)}")
        return functools.partial(self._read, content)

    def locate(self, name: str) -> Path:
        """Return the path of a regular file of the data set. Raises RowRefused (PATH) for any other name."""
        path = Path(name)
        try:
            target, places = self.root / path, self.also if path.is_absolute() else {self.root}
            resolved = target.resolve() if path.is_absolute() else target
            allowed = ".." not in path.parts and any(
                one.is_relative_to(place) for one in (target, resolved) for place in places
            )
            is_file = allowed and target.is_file()
            if allowed and not is_file:
                target.stat()  # says whether the name is one at all
        except FileNotFoundError:
            is_file = False
        except (OSError, ValueError, RuntimeError):  # too long, NUL or surrogates in it, a loop of links
            raise RowRefused(Reason.PATH, f"{short(name)} is no path") from None
        if not allowed:
            raise RowRefused(Reason.PATH, f"{short(name)} leads out of the data set")
        if not is_file:
            raise RowRefused(Reason.PATH, f"there is no file {short(name)}")
        if is_of_kernel(target.resolve()):
            raise RowRefused(Reason.PATH, f"{short(name)} leads to a file of the kernel")
        return target

    def digest(self, tables: Iterable[Path], images: Iterable[Any]) -> str:
        """Return the sha256 over the bytes of the tables and of the files that the images name.

        Of a file above max_bytes, whose row will be refused, only the size counts.
        """
        digests: dict[str, str] = {}
        for name in map(content_of, images):
            if isinstance(name, str) and not scheme_of(name) and name not in digests:
                try:
                    path = self.locate(name)
                    size = path.stat().st_size
                    digests[name] = files.sha256_once(path) if size <= self.limits.max_bytes else f"{size} bytes"
                except RowRefused:
                    continue  # the row is refused when it is read
        body = [[path.relative_to(self.root).as_posix(), files.sha256_once(path)] for path in tables]
        text = canonical_json([body, sorted(digests.items())])
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def _read(self, name: str) -> bytes:
        scheme = scheme_of(name)
        if scheme == "data":
            return _from_data_uri(name)
        if scheme in ("http", "https"):
            return self._urls.read(name)
        if scheme:
            raise RowRefused(Reason.URL, f"{short(name)} is neither http, https nor data")
        try:
            with self.locate(name).open("rb") as file:
                return file.read(self.limits.max_bytes + 1)  # enough for the decoder to refuse it
        except OSError as error:
            raise RowRefused(Reason.PATH, f"{short(name)} can't be read: {error.strerror}") from error


def is_of_kernel(path: Path) -> bool:
    """Tell whether a resolved path lies in /proc, /sys or /dev, whose files may be endless; /dev/shm is memory."""
    return path.parts[1:2] in (("proc",), ("sys",), ("dev",)) and path.parts[:3] != ("/", "dev", "shm")


def content_of(image: Any) -> Any:
    """Return the bytes or the name of an image as a source has it: of {"bytes", "path"}, as the Hub stores it, one."""
    if isinstance(image, dict) and image.keys() <= {"bytes", "path"}:
        return image.get("bytes") or image.get("path")
    return image


def scheme_of(name: str) -> str:
    """Return "http" for "http://…", "data" for "data:…", and "" for a path."""
    head, colon, rest = name[:32].partition(":")
    is_uri = colon and (head.lower() == "data" or rest.startswith("//"))
    return head.lower() if is_uri else ""


def _from_data_uri(uri: str) -> bytes:
    head, comma, payload = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowRefused(Reason.IMAGE, f"no base64 data: URI: {short(uri)}")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise RowRefused(Reason.IMAGE, f"no valid base64: {short(uri)}") from error
