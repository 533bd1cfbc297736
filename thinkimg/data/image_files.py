"""Reading of a data set's images: bytes, paths inside the data set, data: URIs, URLs of allowed hosts."""

import base64
import functools
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from thinkimg.data.source import ImageReader, Reason, RowRefused, short
from thinkimg.images.decode import ImageLimits
from thinkimg.store import files
from thinkimg.store.manifest import canonical_json

FETCH_SECONDS, REDIRECTS = 60, 5


class ImageFiles:
    """Readers for the images of one data set.

    root: the directory from which its paths start and which no path may leave, by `..` or by a symbolic link.
    also: directories in which absolute paths are accepted (a library's cache). hosts: allowed in URLs of images.
    """

    def __init__(self, root: Path, limits: ImageLimits, hosts: Iterable[str] = (), also: Iterable[Path] = ()):
        self.root, self.limits = root.resolve(), limits
        self.hosts = {host.lower() for host in hosts}
        self.also = tuple(path.resolve() for path in also)

    def reader_of(self, value: Any) -> ImageReader:
        """Return the reader of an image: of bytes, a path, a data: URI, a URL, or the Hub's {"bytes", "path"}.

        Raises RowRefused for any other value.
        """
        if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return lambda: value
        if not isinstance(value, str) or not value:
            raise RowRefused(Reason.IMAGE, f"no image: {short(value)}")
        return functools.partial(self._read, value)

    def resolve(self, name: str) -> Path:
        """Return the path of a regular file inside the data set. Raises RowRefused (PATH) for any other name."""
        path = Path(name)
        try:
            target = (self.root / path).resolve()
            allowed = (
                any(target.is_relative_to(directory) for directory in self.also)
                if path.is_absolute()
                else (".." not in path.parts and target.is_relative_to(self.root))
            )
            is_file = allowed and target.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, NUL or surrogates in it, a loop of links
            raise RowRefused(Reason.PATH, f"{short(name)} is no path") from None
        if not allowed:
            raise RowRefused(Reason.PATH, f"{short(name)} leads out of the data set")
        if not is_file:
            raise RowRefused(Reason.PATH, f"there is no file {short(name)}")
        return target

    def digest(self, tables: Iterable[Path], names: Iterable[Any]) -> str:
        """Return the sha256 over the bytes of the tables and of the files with these names, other values left out."""
        digests = {}
        for name in names:
            if isinstance(name, str) and not scheme_of(name) and name not in digests:
                try:
                    digests[name] = files.sha256_once(self.resolve(name))
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
            return self._fetch(name)
        if scheme:
            raise RowRefused(Reason.URL, f"{short(name)} is neither http, https nor data")
        try:
            with self.resolve(name).open("rb") as file:
                return file.read(self.limits.max_bytes + 1)  # enough for the decoder to refuse it
        except OSError as error:
            raise RowRefused(Reason.PATH, f"{short(name)} can't be read: {error.strerror}") from error

    @functools.cached_property
    def _client(self) -> httpx.Client:
        # Without compression a small answer cannot become a large one. _fetch follows redirects and checks each host.
        return httpx.Client(
            timeout=20, headers={"Accept-Encoding": "identity"}, transport=httpx.HTTPTransport(retries=2)
        )

    def _fetch(self, name: str) -> bytes:
        deadline = time.monotonic() + FETCH_SECONDS
        try:
            url = httpx.URL(name)
            for _ in range(REDIRECTS + 1):
                if url.scheme not in ("http", "https") or url.host.lower() not in self.hosts:
                    raise RowRefused(Reason.URL, f"{url.host or short(name)} is not among data.url_hosts")
                with self._client.stream("GET", url) as response:
                    if response.has_redirect_location:
                        url = url.join(response.headers["location"])
                        continue
                    response.raise_for_status()
                    return self._body(response, deadline)
            raise RowRefused(Reason.URL, f"{short(name)} redirects more than {REDIRECTS} times")
        except httpx.HTTPStatusError as error:
            raise RowRefused(Reason.URL, f"{short(name)} answered {error.response.status_code}") from error
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise RowRefused(Reason.URL, f"{short(name)}: {type(error).__name__} {short(str(error))}") from error

    def _body(self, response: httpx.Response, deadline: float) -> bytes:
        body = bytearray()
        for block in response.iter_raw(65536):
            body += block
            if len(body) > self.limits.max_bytes:
                break  # enough for the decoder to refuse it
            if time.monotonic() > deadline:
                raise RowRefused(Reason.URL, f"{response.url.host} took more than {FETCH_SECONDS} s")
        return bytes(body)


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
