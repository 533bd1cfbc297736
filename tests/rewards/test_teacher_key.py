"""A key goes to the host that it was named for, and nothing of the user's environment to anyone."""

import asyncio
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.config.load import load_config
from thinkimg.engine.settings import TeacherEndpoint
from thinkimg.errors import UserError
from thinkimg.rewards.endpoint import api_key, connect, describe

# What openai's client takes from the environment and sends to whatever it talks to.
ENVIRONMENT = {
    "OPENAI_API_KEY": "canary-key",
    "OPENAI_ADMIN_KEY": "canary-admin",
    "OPENAI_ORG_ID": "canary-organisation",
    "OPENAI_PROJECT_ID": "canary-project",
    "OPENAI_CUSTOM_HEADERS": "X-Secret: canary-header",
    "OPENAI_BASE_URL": "http://127.0.0.1:9/canary",
    "MY_KEY": "canary-mine",
}


@contextmanager
def recorder(redirect: str | None = None):
    """Yield (url, headers) of an endpoint that notes the headers of requests, and answers nothing or redirects."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(307 if redirect else 200)
            if redirect:
                self.send_header("Location", redirect + "/models")
            body = b"" if redirect else b'{"object": "list", "data": []}'
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", seen
        finally:
            server.shutdown()
            thread.join()


def ask(where: TeacherEndpoint) -> None:
    async def models() -> None:
        async with connect(where.url, where) as client:
            await client.models.list()

    asyncio.run(models())


@pytest.fixture
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_nothing_of_the_environment_goes_to_another_host_than_openais(environment):
    with recorder() as (url, seen):
        ask(TeacherEndpoint(url=url))
    (headers,) = seen
    assert "authorization" not in headers and not any(name.startswith("openai-") for name in headers)
    assert "canary" not in repr(headers)


def test_a_named_key_goes_to_its_host_and_no_further(environment):
    with recorder() as (url, seen), recorder(redirect=url) as (first, seen_first):
        ask(TeacherEndpoint(url=first, api_key_env="MY_KEY"))
    assert seen_first[0]["authorization"] == "Bearer canary-mine"
    assert len(seen) == 1 and "canary" not in repr(seen)
    assert repr(seen_first).count("canary") == 1


def test_a_name_and_a_password_go_to_their_host_and_are_shown_to_nobody(environment, caplog):
    with recorder() as (url, seen), recorder(redirect=url) as (first, seen_first):
        where = TeacherEndpoint(url=first.replace("//", "//bob:canary-password@"))
        ask(where)
    assert seen_first[0]["authorization"].startswith("Basic ") and "authorization" not in seen[0]
    shown = load_config("tiny", [f"where.teacher.url={where.url}"]).where.public()
    assert "canary" not in json.dumps(shown) + caplog.text and "bob" in shown["teacher"]["url"]


HOSTS = st.one_of(
    st.sampled_from(
        [
            "api.openai.com.example.org", "example.org/api.openai.com", "api.openai.com@example.org", "openai.com",
            "api.openai.com:8443", "xapi.openai.com", "localhost:8000", "127.0.0.1", "[::1]:8000",
            "api.openai.com.", "user:api.openai.com@example.org",
        ]
    ),
    st.from_regex(r"[a-z]{1,8}(\.[a-z]{2,8}){1,2}", fullmatch=True).filter(lambda host: host != "api.openai.com"),
)  # fmt: skip


@given(st.sampled_from(["http", "https"]), HOSTS)
def test_the_default_key_is_openais_alone(scheme, host):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "canary")
        assert api_key(TeacherEndpoint(url=f"{scheme}://{host}/v1")) is None
        assert api_key(TeacherEndpoint(url="http://api.openai.com/v1")) is None  # in clear
        for url in ("https://api.openai.com/v1", "https://API.openai.com:443/v1"):
            assert api_key(TeacherEndpoint(url=url)) == "canary"


def test_a_key_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match=r"variable MY_KEY is not set.*Hint: Set it"):
        api_key(TeacherEndpoint(url="http://localhost:1/v1", api_key_env="MY_KEY"))
    assert api_key(TeacherEndpoint(api_key_env="MY_KEY")) is None  # our own server wants none


@pytest.mark.parametrize("ends", ["\n", "\r\n", " ", "\t\n"])
def test_blanks_around_a_key_are_left_out(monkeypatch, ends):
    """A key from `$(cat file)` in a .env file was no header, so that the teacher counted as unreachable."""
    monkeypatch.setenv("MY_KEY", f" canary-mine{ends}")
    with recorder() as (url, seen):
        ask(TeacherEndpoint(url=url, api_key_env="MY_KEY"))
    assert seen[0]["authorization"] == "Bearer canary-mine"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_what_no_header_takes_is_a_sentence_without_it(text):
    key = f"canary{text}-key"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_KEY", key)
        try:
            assert api_key(TeacherEndpoint(url="http://localhost:1/v1", api_key_env="MY_KEY")) == key
            assert key.isascii() and key.isprintable() and " " not in key
        except UserError as error:
            assert "MY_KEY" in error.message and "canary" not in str(error)
            assert not (key.isascii() and key.isprintable()) or " " in key


def test_a_reason_has_no_key_in_it(monkeypatch):
    """An endpoint or a proxy may repeat what it was sent, and reasons are stored as evidence."""
    monkeypatch.setenv("MY_OWN", "canary-mine")
    api_key(TeacherEndpoint(url="http://localhost:1/v1", api_key_env="MY_OWN"))
    assert describe(ValueError("refused: canary-mine")) == "refused: ***MY_OWN***"
