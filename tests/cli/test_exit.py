"""The end of a command: an unexpected error leaves a report and one sentence, a signal one sentence."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from paths import REPOSITORY
from prefect.exceptions import PrefectHTTPStatusError
from pydantic import TypeAdapter, ValidationError

from thinkimg.exit import explain_error, explain_setting, find_signal

KEYS = {"OPENAI_API_KEY": "canary-one", "MY_TEACHER": "canary-two", "HF_TOKEN": "canary-three"}
LOCATED = "postgresql://me:canary-four@host/db"
BREAK = f"""
import sys
from thinkimg.cli.flags import open_config
from thinkimg.exit import run_guarded
def command():
    config, _ = open_config("tiny", ["where.teacher.api_key_env=MY_TEACHER", "where.tracking.uri={LOCATED}"])
    print("half a resul", end="")
    raise KeyError("at {LOCATED} with canary-two, Bearer canary-five and sk-canary-six")
run_guarded(command)
"""


def python(code: str, cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HOME": str(cwd)} | variables
    environment.pop("XDG_CACHE_HOME", None)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120,
        encoding=variables.get("PYTHONIOENCODING"),
    )  # fmt: skip


def test_an_unexpected_error_is_a_sentence_with_the_place_of_a_report(tmp_path):
    done = python(BREAK, tmp_path, "--set", f"where.tracking.uri={LOCATED}", **KEYS)
    assert (done.returncode, done.stdout) == (1, "half a resul")
    assert len(done.stderr.splitlines()) == 1 and "KeyError" in done.stderr and "same command goes on" in done.stderr
    path = Path(re.search(r"report it with (\S+)$", done.stderr)[1])
    assert path.is_relative_to(tmp_path / ".cache") and path.stat().st_mode & 0o077 == 0
    report = path.read_text()
    for part in (
        "python: 3",
        "thinkimg: ",
        "prefect: ",
        "command: ",
        "--set",
        "Traceback",
        "in command",
        "'adaptation': 'full'",
    ):
        assert part in report, part
    for text in (report, done.stderr):
        assert "canary" not in text, re.findall(r".*canary.*", text)
    assert "MY_TEACHER" in report and "OPENAI_API_KEY" in report  # which variables there are, and not what is in them


@pytest.mark.parametrize("home", ["/proc", "/proc/nothing/home"])
def test_a_report_that_no_home_takes_lies_among_temporary_files_or_on_stderr(tmp_path, home):
    done = python(BREAK, tmp_path, HOME=home, TMPDIR=str(tmp_path), **KEYS)
    assert done.returncode == 1 and next(tmp_path.glob("thinkimg-crash-*.txt")).stat().st_size > 1000
    script = BREAK.replace("run_guarded(command)", "import tempfile; tempfile.tempdir = '/proc'; run_guarded(command)")
    done = python(script, tmp_path, HOME=home, **KEYS)
    assert done.returncode == 1 and "versions" not in done.stderr and "Traceback" in done.stderr
    assert "canary" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGPIPE, 1)])
def test_a_signal_is_a_sentence(tmp_path, number, code):
    raised = "KeyboardInterrupt" if number == signal.SIGINT else "BrokenPipeError('of a trainer')"
    done = python(
        f"from thinkimg.exit import run_guarded\ndef command(): raise {raised}\nrun_guarded(command)", tmp_path
    )
    assert done.returncode == code and len(done.stderr.splitlines()) == 1 and "goes on" in done.stderr


@pytest.mark.parametrize("kind, number", [("TerminationSignal", 15), ("Other", None)])
@pytest.mark.parametrize("way", ["itself", "as a cause", "as a context"])
def test_prefects_exception_of_a_signal_counts_whatever_is_made_of_it(kind, number, way):
    """In a flow SIGTERM is Prefect's, and no handler of ours has heard it."""
    error = type(kind, (BaseException,), {})()
    if way != "itself":
        inner, error = error, ValueError("of a library")
        setattr(error, "__cause__" if way == "as a cause" else "__context__", inner)
    assert find_signal(error) == number


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_table_and_json_are_printed_whatever_the_encoding(tmp_path, encoding):
    """F22: an en dash in the table of an iteration ended a loop after hours."""
    code = """
import json
from thinkimg.cli.tables import add_row, make_table, print_json
from thinkimg.console import console, note, say
from thinkimg.exit import run_guarded
def command():
    say("95 % – é 日本 \\udcff")
    add_row(table := make_table("Title – …", "–", "name"), "– 日本")
    console.print(table)
    note("– to stderr 日本")
    print_json({"text": "– é 日本"})
run_guarded(command)
"""
    done = python(code, tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and "to stderr" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :]) == {"text": "– é 日本"}


def test_what_is_printed_to_a_closed_stdout_goes_into_no_file(tmp_path):
    """The next file that was opened got its number, and whatever a library or a child printed."""
    code = """
import os
from thinkimg.exit import run_guarded
def command():
    with open("mine.txt", "w") as file:
        print("a table")
        os.system("echo of a child")
        file.write("mine")
run_guarded(command)
"""
    script = 'exec "$0" -c "$1" >&-'
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "mine.txt").read_text() == "mine"


def test_a_file_in_the_working_directory_shadows_nothing(tmp_path):
    """F16, as a console script, which has no working directory on its path (`-P`)."""
    for name in ("random", "flows", "yaml", "torch", "prefect", "thinkimg"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a module of the user')")
    (tmp_path / "mine.py").write_text("def score(completions, **columns): return [1.0] * len(completions)")
    script = f"import os, sys; sys.path[:0] = [{str(REPOSITORY)!r}]; os.chdir({str(tmp_path)!r})\n"
    script += "sys.argv = ['thinkimg', 'score', '--rollouts', 'ffff', '--set', 'rewards.functions=[mine:score]']\n"
    script += "from thinkimg.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "No rollouts under" in done.stderr, done.stderr


@pytest.mark.parametrize(("status", "hint"), [(401, "PREFECT_API_KEY"), (403, "AUTH_STRING"), (500, "log says why")])
def test_an_answer_of_prefects_server_that_is_an_error_is_a_sentence(status, hint):
    request = httpx.Request("GET", "http://127.0.0.1:4200/api")
    answer = httpx.Response(status, request=request)
    refused = httpx.HTTPStatusError(f"Client error '{status}' for url\nFor more", request=request, response=answer)
    sentence, code = explain_error(PrefectHTTPStatusError.from_httpx_error(refused))
    assert code == 1 and f"error '{status}'" in sentence and hint in sentence and "Nobody" not in sentence


def raise_from(module: str) -> Exception:
    """Return an error of httpx that a module of this name has met."""
    code = "import httpx\ndef ask(): httpx.get('http://127.0.0.1:9/', trust_env=False)"
    exec(code, names := {"__name__": module})
    with pytest.raises(httpx.ConnectError) as caught:
        names["ask"]()
    return caught.value


def test_prefect_is_blamed_for_its_own_requests_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "Prefect's server does not answer" in explain_error(raise_from("prefect.client.base"))[0]
    for module in ("huggingface_hub.utils._http", "my_rewards"):
        assert "Prefect" not in explain_error(raise_from(module))[0]


def test_an_argument_that_is_no_utf8_is_no_end_of_a_report(tmp_path):
    code = """
import sys
from thinkimg.crash import write_report
try:
    raise KeyError("x")
except KeyError as error:
    print(open(write_report(error)[1]).read())
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, b"--set", b"data.path=\xff"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0 and b"\\udcff" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("PREFECT_LOGGING_LEVEL", "foo"), ("PREFECT_API_REQUEST_TIMEOUT", "abc"), ("PREFECT_SERVER_API_PORT", "x")],
)
def test_a_setting_that_prefect_does_not_take_is_a_sentence_with_its_variable(monkeypatch, name, value):
    from prefect.context import refresh_global_settings_context

    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        refresh_global_settings_context()
    sentence, code = explain_error(caught.value)
    assert code == 2 and name in sentence and "Hint: Correct it" in sentence and "\n" not in sentence


def test_another_librarys_setting_is_not_prefects():
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python("x")
    assert explain_setting(caught.value) is None
