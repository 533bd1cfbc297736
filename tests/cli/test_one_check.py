"""One check for a command, its dry run and its flow; and the port of MLflow's UI."""

import re
import socket
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from flows._common import Overrides, open_config
from thinkimg.cli.main import app
from thinkimg.config.load import load_config
from thinkimg.config.values import MAX_LENGTH, split_override
from thinkimg.errors import UserError
from thinkimg.tracking.loop import address, compare_link
from thinkimg.tracking.settings import TrackingConfig

FORM = TypeAdapter(Overrides)
FAULTS = [
    "iterations =3", " iterations=3", "iter ations=3", "=3", "3=3", "iterations",
    "conversation.system=" + "x" * MAX_LENGTH, "conversation.tools=[crop_img]",
    "rewards.rules=[nowhere]", "image.types=[nobody]", "train.loss.loss_type=nothing", "data.source=nowhere",
    "where.store=~nobody-here/x", "where.store=a\0b", "seed=-1", "images.min_pixels=99999999", "model.path=x\udcff",
    "preset=tiny", "mix={answer: .inf}", "where.engine.urls=[x]",
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


@pytest.mark.parametrize("store", ["what?", "a/b?c=d/e"])
def test_a_question_mark_ends_no_path_of_a_database(tmp_path, monkeypatch, store):
    """The database of a store in `run?2` was made in `run`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"has a '\?'"):
        compare_link(store, TrackingConfig())
    assert "mlflow.db" not in {path.name for path in tmp_path.rglob("*")}
