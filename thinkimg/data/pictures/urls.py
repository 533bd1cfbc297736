"""Images by URL: from allowed hosts only, through the environment's proxies, but never to this machine itself."""

import contextlib
import functools
import re
import time
import zlib
from collections.abc import Collection
from contextlib import closing

import httpx

from thinkimg.data.refusal import Reason, RowRefused, short
from thinkimg.environment import is_loopback
from thinkimg.errors import is_passing_status
from thinkimg.http_clients import make_client

FETCH_SECONDS, REDIRECTS, CONNECTS, PAUSE_S = 60, 5, 3, 0.2
PLAIN, ZIPPED = ("", "identity"), ("gzip", "x-gzip", "deflate")
"""Codings of an answer: what is asked for, and what some hosts send all the same."""
PAGES = re.compile(r"(text/(html|plain)|application/(xhtml\+xml|(\w+\+)?json))\b", re.IGNORECASE)
"""Types of what people and programs read."""
MAGIC = (b"\x89PNG", b"\xff\xd8", b"RIFF")
"""First bytes of the pictures that are decoded (images.decode.FORMATS)."""


class UrlReader:
    """Reader of images by URL, for any number of threads. hosts: in lower case. max_bytes: of an image."""

    def __init__(self, hosts: Collection[str], max_bytes: int):
        self.hosts, self.max_bytes = hosts, max_bytes

    def read(self, name: str) -> bytes:
        """Return what a URL holds, at most a block more than max_bytes. Raises RowRefused (URL) where it can't be had.

        Redirects are followed, and each host is checked. Raises UserError for a proxy that can't be used.
        """
        deadline = time.monotonic() + FETCH_SECONDS
        try:
            url = httpx.URL(name)
            for _ in range(REDIRECTS + 1):
                if url.scheme not in ("http", "https") or url.host.lower() not in self.hosts:
                    raise RowRefused(Reason.URL, f"{url.host or short(name)} is not among data.url_hosts")
                with closing(self._open(url)) as response:
                    if response.has_redirect_location:
                        url = url.join(response.headers["location"])
                        continue
                    status = response.status_code
                    if status != 200:
                        passing = status < 300 or is_passing_status(status)
                        raise RowRefused(Reason.URL, f"{short(name)} answered {status}", passing=passing)
                    return self._body(response, deadline)
            raise RowRefused(Reason.URL, f"{short(name)} redirects more than {REDIRECTS} times")
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            detail = f"{short(name)}: {type(error).__name__} {short(str(error))}"
            passing = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.LocalProtocolError)
            raise RowRefused(Reason.URL, detail, passing=passing) from error

    def _open(self, url: httpx.URL) -> httpx.Response:
        client = self._local if is_loopback(url.host) else self._client
        for attempt in range(1, CONNECTS + 1):
            try:
                return client.send(client.build_request("GET", url), stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if attempt == CONNECTS:
                    raise
                time.sleep(PAUSE_S * attempt)
        raise AssertionError("the last attempt returns or raises")

    def _body(self, response: httpx.Response, deadline: float) -> bytes:
        raw = bytearray()
        for block in response.iter_raw(65536):
            raw += block
            if len(raw) > self.max_bytes:
                break  # enough for the decoder to refuse it
            if time.monotonic() > deadline:
                raise RowRefused(Reason.URL, f"{response.url.host} took more than {FETCH_SECONDS} s", passing=True)
        coding = response.headers.get("content-encoding", "").strip().lower()
        body = unzip(bytes(raw), coding, self.max_bytes + 1)
        if body.startswith(MAGIC):
            return body
        if coding not in PLAIN + ZIPPED:
            detail = f"{response.url.host} sent the coding {short(coding)}, which was not asked for"
            raise RowRefused(Reason.URL, detail, passing=True)
        if is_page(body, response.headers.get("content-type", "")):
            raise RowRefused(Reason.URL, f"{response.url.host} answered with a page, and no picture", passing=True)
        return body

    @functools.cached_property
    def _client(self) -> httpx.Client:
        return self._make_client("")

    @functools.cached_property
    def _local(self) -> httpx.Client:
        return self._make_client("localhost")

    def _make_client(self, host: str) -> httpx.Client:
        # A transport of its own would ignore the proxies.
        return make_client(httpx.Client, host, timeout=20, headers={"Accept-Encoding": "identity"})


def unzip(body: bytes, coding: str, limit: int) -> bytes:
    """Return a body without its coding, of at most `limit` bytes: a small answer can't become a large one.

    One that is not in the coding that its header names is returned as it is.
    """
    for window in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS) if coding in ZIPPED else ():  # with a header, and without
        with contextlib.suppress(zlib.error):
            return zlib.decompressobj(window).decompress(body, limit)
    return body


def is_page(body: bytes, kind: str) -> bool:
    """Tell whether an answer is a page or nothing, as limiters and logins send with status 200, and no file.

    kind: its Content-Type.
    """
    head = body.lstrip()
    if not head or PAGES.match(kind):
        return True
    return head.startswith((b"{", b"[")) or (head.startswith(b"<") and b"<svg" not in head)
