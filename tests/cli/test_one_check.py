"""One check for a command, its dry run and its flow; and the port of MLflow's UI."""

import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from flows._common import Overrides, open_config
from thinkimg.cli import main as cli
from thinkimg.cli.flags import check_port
from thinkimg.cli.main import app
from thinkimg.config.load import load_config
from thinkimg.config.values import MAX_LENGTH, split_override
from thinkimg.errors import UserError
from thinkimg.process import free_port
from thinkimg.tracking.loop import address, compare_link
from thinkimg.tracking.settings import TrackingConfig

FORM = TypeAdapter(Overrides)
FAULTS = [
    "iterations =3", " iterations=3", "iter ations=3", "=3", "3=3", "iterations",
    "conversation.system=" + "x" * MAX_LENGTH, "conversation.tools=[crop_img]",
    "rewards.rules=[nowhere]", "image.types=[nobody]", "train.loss.loss_type=nothing", "data.source=nowhere",
    "where.store=~nobody-here/x", "where.store=a\0b", "seed=-1", "images.min_pixels=99999999", "model.path=x\udcff",
    "preset=tiny", "mix={answer: .inf}", "where.engine.urls=[x]", "where.store=s3://bucket/x", "where.store=$HOME/x",
    "where.tracking.uri=$HOME/runs", "where.tracking.uri=file:$HOME/runs", "where.tracking.uri=sqlite://",
    "where.tracking.uri=sqlite+pysqlite:///:memory:", "where.teacher.api_key_env=$MY_KEY", "mix={}", "mix={answer: 0}",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: ascii(fault[:30]))
def test_what_a_run_refuses_its_dry_run_refuses(fault, tmp_path, monkeypatch):
    """F41, F43: a dry run took what the run, or its form, refused later."""
    monkeypatch.chdir(tmp_path)
    said = set()
    for command in (["run", "--dry-run"], ["run"], ["prepare", "--dry-run"], ["prepare"]):
        with pytest.raises(UserError) as error:
            app([*command, "--preset", "tiny", f"--set={fault}"])
        said.add(str(error.value))
    with pytest.raises(UserError) as error:
        open_config("tiny", [fault])
    assert said == {str(error.value)} and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings, said",
    [(["mix={mine: 1.0}"], "names 'mine'"), (["image.types=[teacher]", "image.teacher.model=x"], "where.teacher.url")],
)
def test_what_a_stage_would_refuse_the_loops_dry_run_refuses(settings, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    overrides = [f"--set={setting}" for setting in settings]
    with pytest.raises(UserError) as error:
        app(["run", "--dry-run", "--preset", "tiny", *overrides])
    assert said in str(error.value)


NAMES = st.text("aZ_0.é= -\t日\n", max_size=8)


@given(st.tuples(NAMES, st.sampled_from(["=", "", " = "]), st.text(max_size=8) | st.just("x" * 1999)).map("".join))
@example("a=" + "x" * (MAX_LENGTH - 2))
@example("a=" + "x" * (MAX_LENGTH - 1))
def test_the_form_of_a_flow_takes_an_override_where_a_command_does(override):
    try:
        FORM.validate_python([override])
        in_form = True
    except ValidationError:
        in_form = False
    try:
        split_override(override)
        in_command = True
    except UserError:
        in_command = False
    assert in_form == in_command, override


@pytest.mark.parametrize(("name", "value"), [("iterations", 0), ("iterations", 10**7), ("seed", -1), ("seed", 2**32)])
def test_a_parameter_of_the_flow_has_the_limits_of_the_setting(name, value):
    from flows.loop import loop

    with pytest.raises(Exception, match=name):
        loop.validate_parameters({name: value})
    with pytest.raises(UserError, match=name):
        load_config("tiny", [f"{name}={value}"])


def test_the_port_of_the_ui(tmp_path, monkeypatch):
    """F29: where something listened on 5000 there was a log line of uvicorn, and no other port."""
    monkeypatch.chdir(tmp_path)
    assert address(SimpleNamespace(uri="sqlite:///mlflow.db"), 5001) == "http://127.0.0.1:5001"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} of 127.0.0.1 can't be used: Address already in use") as error:
            app(["track", "ui", "--port", str(port)])
        assert re.search(r"--port \d+\.$", error.value.hint)
        with pytest.raises(UserError, match=f"Port {port} of 127.0.0.1 can't be used"):
            app(["serve", "--port", str(port), "--preset", "balanced"])


@pytest.mark.parametrize("host", ["::", "::1", "localhost", "0.0.0.0"])
def test_every_address_of_this_machine_can_be_listened_on(host):
    """Those of IPv6 were refused: "Address family for hostname not supported"."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, 0), family=family).close()
    except OSError:  # a machine without IPv6
        with pytest.raises(UserError):
            check_port(host, 0)
    else:
        check_port(host, 0)


@pytest.mark.parametrize("host", ["no.such.invalid", "192.0.2.1"])
def test_another_port_is_no_advice_for_an_address_that_is_none(host):
    with pytest.raises(UserError, match="no address") as error:
        check_port(host, 8000)
    assert "--port" not in str(error.value)


def test_a_database_password_is_in_no_argument_of_a_process_and_in_no_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("thinkimg.tracking.loop.Connection", lambda *_: SimpleNamespace(uri="postgresql:", loops=1))
    started = []
    monkeypatch.setattr("os.execvpe", lambda *arguments: started.append(arguments))
    uri = "postgresql://me:geheim@db.example.org/x"
    cli.ui(port=free_port(), set=[f"where.store={tmp_path}", f"where.tracking.uri={uri}"])
    ((_, argv, environment),) = started
    assert environment["MLFLOW_BACKEND_STORE_URI"] == uri and "db.example.org" not in str(argv)
    shown = capsys.readouterr().out
    assert "geheim" not in shown + str(argv) and "me:***@db.example.org" in shown


@pytest.mark.parametrize("uri", ["~/runs", "file:~/runs", "sqlite:///~/runs.db"])
def test_every_path_of_a_tracking_uri_may_begin_with_the_home_directory(uri):
    assert load_config("tiny", [f"where.tracking.uri={uri}"]).where.tracking.uri == uri.replace("~", str(Path.home()))


COMMENTED = ["where=store: /data/run #3", "mix={answer: 1.0} # all", "where=# none", "where=store: | # no\n  a"]


@pytest.mark.parametrize("override", COMMENTED)
def test_no_override_loses_its_end_as_a_comment(override):
    with pytest.raises(UserError, match="without comments"):
        load_config("tiny", [override])


def test_a_sharp_within_a_text_is_none():
    for text in ("/data/run#3", "'/data/run #3'", '"a # b"'):
        config = load_config("tiny", [f"where={{store: {text}, workers: 2}}"])
        assert config.where.store == text.strip("'\"") and config.where.workers == 2


@pytest.mark.parametrize("store", ["what?", "a/b?c=d/e"])
def test_a_question_mark_ends_no_path_of_a_database(tmp_path, monkeypatch, store):
    """The database of a store in `run?2` was made in `run`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"has a '\?'"):
        compare_link(store, TrackingConfig())
    assert "mlflow.db" not in {path.name for path in tmp_path.rglob("*")}
