"""Redaction: a secret is in no text that is shown, in whatever form a library, a driver or Python writes it."""

import json
import logging
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.config.load import load_config
from thinkimg.engine.errors import EngineError
from thinkimg.errors import UserError
from thinkimg.keys import read_key
from thinkimg.redaction import redact_logs, without_password, without_query, without_secrets

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


KEYS = [
    "AIzaSyD4iE2xVSpkLLOXoyqT-RuPwURN3ddScAI", "AIzaSyD4iE2xVSpkLLOXoyqTRuPwURN3ddScAI", "sk-x", "$MY_KEY",
    "${MY_KEY}", "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "a1b2c3d4e5f60718293a4b5c6d7e8f90", "7c3d", "my key", "key=x",
    "Bearer zq9",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"'])
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_shown(tmp_path, key, form):
    (tmp_path / "my.yaml").write_text(json.dumps({"where": {"teacher": {"api_key_env": form.format(key)}}}))
    written = f"where.teacher.api_key_env={form.format(key)}"
    for preset, overrides in ((str(tmp_path / "my.yaml"), []), ("tiny", [written])):
        with pytest.raises(UserError) as caught:
            load_config(preset, overrides)
        assert key not in without_secrets(str(caught.value))
    if " " not in written or form != "{}":  # a text does not tell where a value without quotes ends
        assert key not in without_secrets(f"thinkimg run --set {written!r}")
    assert key not in without_secrets(shlex.join(["thinkimg", "chat", "--api-key-env", key]))


def test_a_variable_that_is_set_or_reads_as_one_is_named(monkeypatch):
    monkeypatch.setenv("MyCompanysOpenAIKey2Of3", "x")
    for name in ("MY_KEY", "OPENAI_API_KEY", "_q", "a_teacher_of_our_department", "MyCompanysOpenAIKey2Of3", "K" * 40):
        assert load_config("tiny", [f"where.teacher.api_key_env={name}"]).where.teacher.api_key_env == name
        assert without_secrets(f"api_key_env={name}, or --api-key-env {name}.").count(name) == 2


@pytest.fixture
def redacting():
    factory = logging.getLogRecordFactory()
    redact_logs()
    redact_logs()
    yield
    logging.setLogRecordFactory(factory)


@pytest.mark.usefixtures("redacting")
def test_what_is_logged_has_no_secret_whoever_logs_it(monkeypatch, caplog):
    """MLflow's client shows a token that is no header in its error, and the warning showed it."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "zq-token\n")
    monkeypatch.setenv("MY_OWN", "zq-mine")
    read_key("MY_OWN")
    logging.getLogger("a.library").warning("Header value %s is invalid; %d", repr("zq-token\n"), 7)
    try:
        raise ValueError("zq-mine is refused")
    except ValueError as error:
        logging.getLogger("thinkimg.x").exception("MLflow did not take it (%s)", error)
    logging.getLogger("a.library").warning("%s and %s are kept", "arguments", 2)
    assert "zq-" not in caplog.text and "***MLFLOW_TRACKING_TOKEN***" in caplog.text and "ValueError" in caplog.text
    assert caplog.records[-1].args == ("arguments", 2)
