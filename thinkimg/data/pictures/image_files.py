"""Reading of a data set's images: bytes, base64, data: URIs, paths inside the data set, URLs of allowed hosts."""

import base64
import functools
import hashlib
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinkimg.data.pictures.places import PicturePlaces, Place
from thinkimg.data.pictures.urls import UrlReader
from thinkimg.data.refusal import Reason, RowRefused, short
from thinkimg.images.decode import ImageLimits
from thinkimg.store import files
from thinkimg.store.manifest import canonical_json

MAX_PATH_LENGTH = 4096
"""Characters of a path, at most: PATH_MAX of Linux."""
BASE64_HEADS = ("/9j/", "_9j_", "iVBORw0KGg", "UklGR", "R0lGOD", "Qk", "SUkq", "TU0AK")
"""First characters of JPEG (also as URLs have it), PNG, WebP, GIF, BMP and TIFF in base64."""
URL_SAFE = str.maketrans("-_", "+/")
"""Signs of base64 in URLs (RFC 4648, section 5)."""
MIN_BASE64_LENGTH = 64
"""Characters; no picture is shorter, and few paths that begin like one are longer."""
DAMAGES = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
"""Errors of files that can't be read, and of damaged members of archives."""
KEYS = ("bytes", "path", "image", "url", "image_url", "base64")
"""Names of an image's content in an object: the Hub's {"bytes", "path"}, {"image": …} of messages, {"url": …}."""


@dataclass(frozen=True)
class ImageReader:
    """Reader of one image: a call returns its encoded bytes, at most one more than ImageLimits.max_bytes.

    A call raises RowRefused where the image can't be had.
    """

    read: Callable[[], bytes]
    name: str | None = field(default=None)
    """Path or URL of the image; None where the row itself holds it."""
    origin: str = ""
    """Origin of the image, for people: "bytes", "base64", "file", "zip" or the URL's host."""

    def __call__(self) -> bytes:
        return self.read()

    @property
    def key(self) -> str:
        """Name of the image's content, which costs no decoding: images of one key are the same."""
        return self.name or hashlib.sha256(self.read()).hexdigest()


class ImageFiles:
    """Readers for the images of one data set.

    root: the directory from which its paths start and which no name may leave. Links inside it are followed wherever
    they lead, as the Hub's cache consists of them. also: directories in which absolute paths are accepted (a library's
    cache). hosts: allowed in URLs of images. images: a further folder or ZIP archive of pictures.
    """

    def __init__(
        self,
        root: Path,
        limits: ImageLimits,
        hosts: Iterable[str] = (),
        also: Iterable[Path] = (),
        images: Path | None = None,
    ):
        self.root, self.limits = root.absolute(), limits
        self.hosts = {host.lower() for host in hosts}
        self.places = PicturePlaces(self.root, also, images)
        self._urls = UrlReader(self.hosts, limits.max_bytes)

    def reader_of(self, value: Any, folder: Path | None = None) -> ImageReader:
        """Return the reader of an image: of bytes, base64, a path, a data: URI, a URL, or an object with one of these.

        folder: directory of the table, where paths are looked for first. Raises RowRefused for any other value.
        """
        content = content_of(value)
        if isinstance(content, bytes) and content:
            return ImageReader(lambda: content, origin="bytes")
        if not isinstance(content, str) or not content:
            raise RowRefused(Reason.IMAGE, f"no image: {short(value)}")
        scheme = scheme_of(content)
        if scheme == "data":
            return ImageReader(functools.partial(_from_data_uri, content), origin="base64")
        if looks_like_base64(content):
            return ImageReader(functools.partial(_from_base64, content), origin="base64")
        if len(content) > MAX_PATH_LENGTH:
            detail = f"a text of {len(content):,} characters is no path, and no picture in base64: {short(content)}"
            raise RowRefused(Reason.IMAGE, detail)
        if scheme in ("http", "https"):
            host = content.partition("://")[2].partition("/")[0].rpartition("@")[2]
            return ImageReader(functools.partial(self._urls.read, content), content, host)
        if scheme:
            raise RowRefused(Reason.URL, f"{short(content)} is neither http, https nor data")
        name = f"{folder}/{content}" if folder and not content.startswith("/") else content
        return ImageReader(functools.partial(self._read, content, folder), name, "file")

    def locate(self, name: str, folder: Path | None = None) -> Path:
        """Return the path of a regular file of the data set. Raises RowRefused (PATH) for any other name."""
        return self.places.locate(name, folder)

    def digest(self, tables: Iterable[Path], images: Iterable[tuple[Any, Path | None]]) -> str:
        """Return the sha256 over the bytes of the tables and of the files that the images name.

        images: values of the image column, each with the directory of its table. Of a file above max_bytes, whose row
        will be refused, only the size counts. A ZIP archive counts as a whole.
        """
        digests: dict[str, str] = {}
        for key, place in self.find_all(images):
            path = place if isinstance(place, Path) else place.archive
            try:
                size = path.stat().st_size
                whole = not isinstance(place, Path) or size <= self.limits.max_bytes
                digests[key] = files.sha256_once(path) if whole else f"{size} bytes"
            except OSError:
                continue  # the row is refused when it is read
        body = [[path.relative_to(self.root).as_posix(), files.sha256_once(path)] for path in tables]
        named = sorted((name.removeprefix(f"{self.root}/"), sha256) for name, sha256 in digests.items())
        text = canonical_json([body, named])
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def find_all(self, images: Iterable[tuple[Any, Path | None]]) -> Iterator[tuple[str, Place]]:
        """Yield (name with its directory, place) of the images that are files. images: as for `digest`.

        After all are found it is known which names share a picture, whatever the order in which they are read.
        """
        seen: set[str] = set()
        for value, folder in images:
            name = content_of(value)
            if not isinstance(name, str) or not _is_path(name):
                continue
            key = f"{folder}/{name}" if folder else name
            if key in seen:
                continue
            seen.add(key)
            try:
                yield key, self.places.find(name, folder)
            except RowRefused:
                continue  # the row is refused when it is read

    def _read(self, name: str, folder: Path | None) -> bytes:
        picture = self.places.find(name, folder)
        try:
            with picture.open("rb") if isinstance(picture, Path) else picture.open() as file:
                data: bytes = file.read(self.limits.max_bytes + 1)  # enough for the decoder to refuse it
                return data
        except DAMAGES as error:
            why = getattr(error, "strerror", None) or short(str(error))
            raise RowRefused(Reason.PATH, f"{short(name)} can't be read: {why}") from error


def content_of(image: Any) -> Any:
    """Return the bytes or the name of an image as a source has it: of an object, such as the Hub's, its content."""
    while isinstance(image, dict):  # no recursion: it may be deep
        if not image.keys() <= {*KEYS, "type", "text"} and not isinstance(image.get("bytes"), bytes):
            break
        image = next((image[key] for key in KEYS if image.get(key)), None)
    return image


def scheme_of(name: str) -> str:
    """Return "http" for "http://…", "data" for "data:…", and "" for a path."""
    head, colon, rest = name[:32].partition(":")
    is_uri = colon and (head.lower() == "data" or rest.startswith("//"))
    return head.lower() if is_uri else ""


def looks_like_base64(text: str) -> bool:
    """Tell by its first characters, and by its length alone otherwise, that a text is a picture in base64.

    A JPEG begins with "/9j/", as an absolute path may: a path has a full stop in its name, base64 has none.
    """
    return len(text) >= MIN_BASE64_LENGTH and text.lstrip()[:12].startswith(BASE64_HEADS) and "." not in text


def _is_path(name: str) -> bool:
    return len(name) <= MAX_PATH_LENGTH and not scheme_of(name) and not looks_like_base64(name)


def _from_data_uri(uri: str) -> bytes:
    head, comma, payload = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowRefused(Reason.IMAGE, f"no base64 data: URI: {short(uri)}")
    return _from_base64(payload)


def _from_base64(text: str) -> bytes:
    plain = "".join(text.split()).rstrip("=")  # MIME breaks its lines
    plain = plain.translate(URL_SAFE) if "-" in plain or "_" in plain else plain
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)  # some writers leave the end out
    except ValueError as error:
        raise RowRefused(Reason.IMAGE, f"no valid base64: {short(text)}") from error
