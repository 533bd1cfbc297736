"""Redaction: a secret is in no text that is shown, in whatever form a library, a driver or Python writes it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.config.load import load_config
from thinkimg.engine.errors import EngineError
from thinkimg.redaction import without_password, without_query, without_secrets

SECRETS = st.from_regex(r"zq[A-Za-z0-9/+_.!$]{6,20}", fullmatch=True)
NAMES = st.sampled_from(
    ["password", "PASSWORD", "access_token", "api_key", "api-key", "x-api-key", "client_secret", "MYSQL_PWD", "token",
     "AccountKey", "aws_secret_access_key", "OPENAI_API_KEY", "sslpassword", "PREFECT_API_AUTH_STRING"]
)  # fmt: skip
FORMS = {
    "python": lambda name, secret: repr({name: secret, "b": 1}),
    "bytes": lambda name, secret: repr({name: secret.encode()}),
    "pairs": lambda name, secret: repr([(name, secret)]),
    "list": lambda name, secret: repr({name: [secret]}),
    "json": lambda name, secret: json.dumps({name: secret}),
    "compact": lambda name, secret: json.dumps({name: secret}, separators=(",", ":")),
    "json in json": lambda name, secret: json.dumps(json.dumps({name: secret})),
    "call": lambda name, secret: f'f({name}="{secret}", {name}=\'{secret}\')',
    "words": lambda name, secret: f'{{"{name}": "two words {secret}"}}',
    "shell": lambda name, secret: f"{name}={secret} thinkimg run",
    "yaml": lambda name, secret: f"{name}: {secret}\nother: 1",
    "query": lambda name, secret: f"postgresql://h/db?user=u&{name}={secret}",
    "odbc": lambda name, secret: f"mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BX%7D%3BPWD%3D{secret}",
    "basic": lambda name, secret: f"Authorization: Basic {secret}",
    "headers": lambda name, secret: repr({"authorization": f"Basic {secret}", "Proxy-Authorization": secret}),
    "raw headers": lambda name, secret: repr([(b"Authorization", f"Basic {secret}".encode())]),
    "userinfo": lambda name, secret: f"at postgresql://u:{secret}@h/db?x=1 and",
    "lone userinfo": lambda name, secret: f"at https://{secret}@h/v1",
    "at in it": lambda name, secret: f"at https://u:a@{secret}@h/v1",
}  # fmt: skip


@given(NAMES, SECRETS, st.sampled_from(sorted(FORMS)))
def test_a_secret_is_hidden_in_every_form(name, secret, form):
    text = FORMS[form](name, secret)
    assert secret not in without_secrets(text), text


@given(NAMES, SECRETS)
def test_the_tracking_uri_is_shown_without_the_values_of_its_query(name, secret):
    for uri in (
        f"postgresql://h/db?user=u&{name}={secret}", f"mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BX%7D%3BPWD%3D{secret}",
        f"mysql://h/db?read_default={secret}", f"postgresql://u:{secret}@h/db", f"https://{secret}@h",
    ):  # fmt: skip
        assert secret not in without_query(uri)


@pytest.mark.parametrize(
    "override",
    [
        "where.tracking.uri=postgresql://h/db?user=u&password=geheim",
        "where.tracking.uri=postgresql://u:ge/heim@h/db",
        "where.tracking.uri=https://geheim@h",
        "where.teacher.url=https://geheim@h/v1",
        "where.teacher.url=https://u:ge:heim@h/v1",
        "where.tracking.uri=mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BX%7D%3BPWD%3Dgeheim",
    ],
)
def test_public_settings_have_no_password(override):
    assert "heim" not in json.dumps(load_config("development", [override]).public())


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("DATABASE_URL", "postgresql://me:%2Fqwertz@h/db", "/qwertz"),
        ("MYSQL_PWD", "qwertzui", "qwertzui"),
        ("PREFECT_CLIENT_CUSTOM_HEADERS", '{"X-Mine": "Basic qwertzui"}', "qwertzui"),
        ("DB_CREDENTIAL", "/qwertzui+", "/qwertzui+"),
    ],
)
def test_what_a_secret_variable_holds_is_hidden(monkeypatch, name, value, text):
    monkeypatch.setenv(name, value)
    assert text not in without_secrets(f"it was {text} there")


def test_what_is_no_secret_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_KEY", str(tmp_path))
    for text in (
        f"no such file: {tmp_path}/x", "http://127.0.0.1:4200/api", "sqlite:////data/mlflow.db", "max_tokens: 4096",
        "KeyError: 'column'", "https://h.org/a.png?id=3", "api_key_env: MY_TEACHER",
    ):  # fmt: skip
        assert without_secrets(text) == text
    assert without_password("http://u:p@h,http://v:q@i") == "http://u:***@h,http://v:***@i"


def test_an_engines_error_has_no_password_in_sentence_and_hint():
    error = EngineError("http://u:secret@h is down", hint="start http://u:secret@h, or http://secret@i")
    assert "secret" not in f"{error} {error.message} {error.hint}" and "start http://u:***@h" in str(error)
