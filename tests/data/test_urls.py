"""Images by URL: through the proxies of the environment, never so to this machine; what may pass is not stored."""

import gzip
import json
import threading
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image
from single_stage import build_stage

from thinkimg.config.load import validate
from thinkimg.data.pictures.image_files import ImageFiles
from thinkimg.data.pictures.urls import UrlReader, is_loopback
from thinkimg.data.refusal import RowRefused
from thinkimg.errors import UserError, is_passing
from thinkimg.images.decode import ImageLimits, encode_png
from thinkimg.stages.prepare import prepare
from thinkimg.store.artifacts import Store

PICTURE = encode_png(Image.new("RGB", (20, 10), "red"))
PICTURES = {f"/of/{i}.png": encode_png(Image.new("RGB", (20, 10), (i, 0, 0))) for i in range(40)}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
DEAD = "http://127.0.0.1:9"


@contextmanager
def server(status=lambda path: 200, body=None, headers=None):
    """Yield (address, requested): a server, or a proxy, that answers each request with the picture, or a body."""
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            self.send_response(status(self.path))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(PICTURES.get(self.path, PICTURE) if body is None else body)

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", requested
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def fetch(url, host):
    return UrlReader({host}, 10**6).read(url)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_used(monkeypatch, name):
    with server() as (proxy, requested):
        monkeypatch.setenv(name, proxy)
        assert fetch("http://pictures.example/1.png?size=2", "pictures.example") == PICTURE
        assert requested == ["http://pictures.example/1.png?size=2"]  # a proxy is asked for the whole URL


def test_no_proxy_is_heeded(monkeypatch):
    with server() as (proxy, requested):
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("no_proxy", "pictures.invalid")
        with pytest.raises(RowRefused) as caught:
            fetch("http://pictures.invalid/1.png", "pictures.invalid")
        assert caught.value.reason == "url" and requested == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_this_machine_is_never_asked_through_a_proxy(monkeypatch, host):
    for name in PROXIES[:3]:
        monkeypatch.setenv(name, DEAD)
        monkeypatch.setenv(name.upper(), DEAD)
    with server() as (address, requested):
        assert fetch(f"{address}/1.png".replace("127.0.0.1", host), host.lower()) == PICTURE
        assert requested == ["/1.png"]


def test_hosts_that_are_this_machine():
    ours = ["localhost", "a.localhost", "localhost.", "127.0.0.1", "127.9.9.9", "::1"]
    assert [host for host in ours if not is_loopback(host)] == []
    assert [host for host in ("example.org", "128.0.0.1", "localhost.example", "", "::2") if is_loopback(host)] == []


def test_a_status_says_whether_it_passes():
    lasting = (400, 404, 410, 451)
    with server(lambda path: int(path[1:])) as (address, _):
        for status in (*lasting, 202, 204, 206, 401, 403, 407, 408, 429, 500, 503, 520):
            with pytest.raises(RowRefused, match=str(status)) as caught:
                fetch(f"{address}/{status}", "127.0.0.1")
            assert caught.value.passing == is_passing(StatusError(status)) or status < 300  # one rule of all clients
            assert caught.value.passing == (status not in lasting)
    with pytest.raises(RowRefused) as caught:
        fetch(f"{DEAD}/1.png", "127.0.0.1")
    assert caught.value.passing


class StatusError(Exception):
    def __init__(self, status):
        self.status_code = status


HTML, JSON = b"<!DOCTYPE html><title>Slow down</title>", b' {"error": "rate limit"}'


@pytest.mark.parametrize("kind", ["image/png", "text/html; charset=utf-8", "application/json", ""])
@pytest.mark.parametrize("body", [HTML, b"\n<html>", JSON, b"[]", b"", b"  ", gzip.compress(HTML)], ids=range(7))
def test_a_page_in_place_of_a_picture_passes(kind, body):
    """A limiter's page with status 200 was a row that was refused for good."""
    headers = {"Content-Type": kind, "Content-Encoding": "gzip" if body[:1] == b"\x1f" else "identity"}
    with server(body=body, headers=headers) as (address, _), pytest.raises(RowRefused) as caught:
        fetch(f"{address}/1.png", "127.0.0.1")
    assert caught.value.passing


@pytest.mark.parametrize("kind", ["text/html", "text/plain", "application/octet-stream", ""])
@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "identity", "", "br", "GZIP"])
def test_a_picture_is_one_whatever_its_header_says(kind, coding):
    deflate = zlib.compressobj(wbits=-15)
    bodies = {"gzip": gzip.compress(PICTURE), "deflate": deflate.compress(PICTURE) + deflate.flush(), "plain": PICTURE}
    bodies |= {"x-gzip": bodies["gzip"], "GZIP": bodies["gzip"]}
    for body in {bodies.get(coding, PICTURE), PICTURE, *([zlib.compress(PICTURE)] if coding == "deflate" else [])}:
        with server(body=body, headers={"Content-Type": kind, "Content-Encoding": coding}) as (address, _):
            assert fetch(f"{address}/1.png", "127.0.0.1") == PICTURE


def test_what_is_no_picture_and_no_page_is_the_decoders_to_refuse():
    for body, kind in ((b"GIF89a", "image/gif"), (b"<svg/>", "image/svg+xml"), (b"\0\1", "")):
        with server(body=body, headers={"Content-Type": kind}) as (address, _):
            assert fetch(f"{address}/1.gif", "127.0.0.1") == body
    brotli = {"body": b"\x0b\x02\x80", "headers": {"Content-Encoding": "br"}}
    with server(**brotli) as (address, _), pytest.raises(RowRefused, match="'br'") as caught:
        fetch(f"{address}/1.png", "127.0.0.1")
    assert caught.value.passing


def test_a_small_answer_becomes_no_large_one():
    with server(body=gzip.compress(bytes(10**8)), headers={"Content-Encoding": "gzip"}) as (address, _):
        assert len(fetch(f"{address}/1.png", "127.0.0.1")) == 10**6 + 1


def test_a_password_in_an_address_is_in_no_refusal(tmp_path):
    with server(lambda path: 404) as (address, _):
        url = address.replace("//", "//me:geheim@")
        for name in (f"{url}/1.png", f"{url}:x/1.png", f"ftp{url[4:]}/1.png"):
            reader = ImageFiles(tmp_path, ImageLimits(max_bytes=10**6, max_pixels=10**6), ["127.0.0.1"])
            with pytest.raises(RowRefused) as caught:
                shown = reader.reader_of(name)
                assert "geheim" not in shown.origin
                shown()
            assert "geheim" not in caught.value.detail and "me:" in caught.value.detail


def test_what_may_pass_is_not_stored_as_refused(tmp_path):
    broken = {"/of/3.png": 503}
    with server(lambda path: broken.get(path, 200)) as (address, requested):
        rows = [
            {"image": f"{address}/of/{i}.png", "question": f"{i}?", "answer": "a", "scene": i % 4} for i in range(40)
        ]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"source": "jsonl", "path": str(tmp_path / "d.jsonl"), "url_hosts": ["127.0.0.1"]}
        data["columns"] = {"group": "scene"}
        store = Store(tmp_path / "store")
        with pytest.raises(UserError, match=r"A picture can't be had at the moment: d\.jsonl line 4: .* 503"):
            build_stage(prepare, validate({"data": data}), store)
        assert list(store.list()) == []
        assert len(requested) < 40  # the others are not asked for, each of which may take a minute
        skipped, _ = build_stage(prepare, validate({"data": data | {"skip_unreachable": True}}), store)
        assert skipped.metrics["refused"] == 1
        broken["/of/3.png"] = 404  # gone for good
        gone, _ = build_stage(prepare, validate({"data": data}), store)
        assert gone.metrics["refused"] == 1
        broken.clear()
        whole, _ = build_stage(prepare, validate({"data": data}), store, force=True)
        assert whole.metrics["refused"] == 0
