"""Images by URL: from allowed hosts only, through the environment's proxies, but never to this machine itself."""

import functools
import time
from collections.abc import Collection
from contextlib import closing

import httpx

from thinkimg.data.refusal import Reason, RowRefused, short
from thinkimg.environment import is_loopback
from thinkimg.errors import UserError

FETCH_SECONDS, REDIRECTS, CONNECTS, PAUSE_S = 60, 5, 3, 0.2
PASSING = (408, 425, 429)
"""Statuses beside 5xx after which another time may be better."""


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
                    response.raise_for_status()
                    return self._body(response, deadline)
            raise RowRefused(Reason.URL, f"{short(name)} redirects more than {REDIRECTS} times")
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            passing = status >= 500 or status in PASSING
            raise RowRefused(Reason.URL, f"{short(name)} answered {status}", passing=passing) from error
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
        body = bytearray()
        for block in response.iter_raw(65536):
            body += block
            if len(body) > self.max_bytes:
                break  # enough for the decoder to refuse it
            if time.monotonic() > deadline:
                raise RowRefused(Reason.URL, f"{response.url.host} took more than {FETCH_SECONDS} s", passing=True)
        return bytes(body)

    @functools.cached_property
    def _client(self) -> httpx.Client:
        try:
            return make_client(proxies=True)
        except (ImportError, ValueError, httpx.InvalidURL) as error:  # no package for SOCKS; no scheme of a proxy
            message = f"The proxy that the environment names can't be used for images: {short(str(error))}"
            raise UserError(message, hint="Correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY.") from error

    @functools.cached_property
    def _local(self) -> httpx.Client:
        return make_client(proxies=False)


def make_client(*, proxies: bool) -> httpx.Client:
    """Return a client. proxies: use those of the environment. Raises ImportError or ValueError for a strange one."""
    # Without compression a small answer cannot become a large one. A transport of its own would ignore the proxies.
    return httpx.Client(timeout=20, headers={"Accept-Encoding": "identity"}, trust_env=proxies)
