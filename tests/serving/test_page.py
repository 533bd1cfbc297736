"""Page of the endpoint: its files, what they may do, and the turns in their parts that it shows."""

import re

import httpx
import pytest
from chat_server import CROP, ChatServer, ScriptedClient, answer, data_uri, encode, picture, show

from thinkimg.serving.app import Access
from thinkimg.serving.page import PATHS

URI = data_uri(encode(picture()))


@pytest.fixture(scope="module")
def server():
    server = ChatServer(access=Access(page=True, key="s3cret"))
    yield server
    server.close()


def test_its_files_need_no_key_and_load_nothing_from_elsewhere(server):
    texts = {path: httpx.get(f"{server.url}{path}") for path in PATHS}
    kinds = {path: got.headers["Content-Type"] for path, got in texts.items()}
    assert kinds == {
        "/": "text/html; charset=utf-8", "/page.css": "text/css; charset=utf-8",
        "/page.js": "text/javascript; charset=utf-8",
    }  # fmt: skip
    for got in texts.values():
        assert got.status_code == 200 and not re.search(r"https?://|url\(|@import|innerHTML|eval\(", got.text)
        rules = dict(rule.split(" ", 1) for rule in got.headers["Content-Security-Policy"].split("; "))
        assert rules.pop("img-src") == "data:"
        own = {name for name, value in rules.items() if value == "'self'"}
        assert own == {"script-src", "style-src", "connect-src"}
        assert {value for name, value in rules.items() if name not in own} == {"'none'"} and "default-src" in rules
        assert got.headers["X-Content-Type-Options"] == "nosniff"
    assert set(re.findall(r'(?:src|href)="([^"]*)"', texts["/"].text)) == {"/page.css", "/page.js", "data:,"}
    assert httpx.get(f"{server.url}/v1/models").status_code == 401


def test_without_the_flag_there_is_no_page():
    for key, status in ((None, 404), ("s3cret", 401)):
        server = ChatServer(access=Access(key=key))
        try:
            assert [httpx.get(f"{server.url}{path}").status_code for path in PATHS] == [status] * len(PATHS)
        finally:
            server.close()


def test_a_page_at_another_hosts_name_is_not_served():
    server = ChatServer(access=Access(page=True))
    try:
        assert httpx.get(f"{server.url}/", headers={"Host": "evil.example"}).status_code == 403
    finally:
        server.close()


def turns_of(script, model: str = "policy-images") -> list[dict | None]:
    server = ChatServer(ScriptedClient(script), max_turns=3)
    try:
        chunks = [chunk.choices[0].delta.model_dump() for chunk in server.ask(show("q", URI), model=model, stream=True)]
    finally:
        server.close()
    return [chunk.get("turn") for chunk in chunks if chunk.get("reasoning")]


def test_a_turn_comes_in_its_parts():
    broken = "no protocol <at> all"
    texts = iter([broken, CROP, answer("red")])
    malformed, call, last = turns_of(lambda *_: next(texts))
    assert (malformed["text"], malformed["thought"], malformed["tool"]) == (broken, None, None)
    assert malformed["error"] and malformed["observation"] == f"Error: {malformed['error']}"
    assert (call["thought"], call["tool"], call["error"]) == ("look", "crop_image", None)
    assert call["args"] == {"x": 0, "y": 0, "width": 28, "height": 28}
    assert call["observation"].startswith("Image 1: ")
    assert last == {
        "text": answer("red"), "thought": "seen", "tool": None, "args": None, "observation": None, "error": None
    }  # fmt: skip


def test_the_parts_come_with_the_pictures_alone():
    assert turns_of(lambda *_: answer("red"), model="policy") == [None]
