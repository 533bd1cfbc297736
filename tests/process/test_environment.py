"""Environments of children are made by rule: nothing of a hostile shell arrives, and what a kind needs does."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import flows._environment

import pytest
from hostile import CANARY, GOOD, HOSTILE, HUB_KEYS, PROXIES, shadow
from hypothesis import given
from hypothesis import strategies as st

from thinkimg import closure, resources
from thinkimg.cli import main as cli
from thinkimg.data.pictures.urls import UrlReader
from thinkimg.engine import server
from thinkimg.engine.errors import EngineError
from thinkimg.engine.server import Server, ServerSettings
from thinkimg.engine.settings import EngineSettings, TeacherEndpoint
from thinkimg.environment import (
    LOOPBACK,
    NAMED_BY_USER,
    PACKAGE_ROOT,
    RULES,
    child_environment,
    drop_empty,
    exempt_localhost,
    is_loopback,
    python_path,
)
from thinkimg.errors import UserError
from thinkimg.models.base import BaseSource
from thinkimg.process import run_directory, spawn
from thinkimg.rewards.endpoint import connect
from thinkimg.rewards.maths import Checker
from thinkimg.store import manifest
from thinkimg.trainer.client import Trainer
from thinkimg.trainer.settings import TrainerConfig

LIMITS = EngineSettings(dtype="float32", max_tokens=1024, max_images=1, max_pixels=10**6)
ARRIVES = {"trainer": {*HUB_KEYS, *PROXIES}}
"""What a kind gets of the hostile variables: the trainer downloads base models."""
SHOW = "import json, os, sys; print(json.dumps([dict(os.environ), sys.path, json.__file__]))"


@pytest.fixture
def hostile(monkeypatch, tmp_path):
    """A shell with all the hostile variables, in a folder whose files are called as libraries are."""
    for name, value in (HOSTILE | GOOD).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(shadow(tmp_path / "folder"))


def check(kind: str, made: dict[str, str]) -> None:
    """Nothing hostile has arrived that is not the kind's to have."""
    arrived = {name for name in HOSTILE if made.get(name) == HOSTILE[name]}
    assert arrived <= ARRIVES.get(kind, set()), kind
    shown = {name: value for name, value in made.items() if name not in ARRIVES.get(kind, set())}
    assert CANARY not in str(shown), kind
    if "NO_PROXY" in made:
        assert {*LOOPBACK, "intranet.example.org"} <= set(made["NO_PROXY"].split(",")) and "no_proxy" in made
    assert made["PYTHONSAFEPATH"] == "1"
    assert all(Path(entry).is_absolute() for entry in made.get("PYTHONPATH", "/").split(os.pathsep))


@pytest.mark.parametrize("kind", RULES)
def test_what_arrives_in_a_child(kind, hostile, tmp_path):
    log = tmp_path / "log"
    with spawn([sys.executable, "-c", SHOW], name=kind, env=child_environment(kind, os.environ), log_path=log) as child:
        assert child.wait(30) == 0, child.log_tail()
    made, path, library = json.loads(log.read_text())
    check(kind, made)
    assert os.getcwd() not in path and "" not in path and not library.startswith(os.getcwd())
    assert made["PATH"] == os.environ["PATH"] and made["LC_CTYPE"] == "C.UTF-8"
    if kind in ("engine", "trainer"):
        assert {name: made.get(name) for name in GOOD} == GOOD


class Started(BaseException):
    """Stands for the start of a child, with its environment."""


def start_engine(kind: str, place: Path) -> None:
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    Server(place / "model", log_path=place / "log", version="v", settings=ServerSettings(LIMITS), name=kind).start()


def start_trainer(place: Path) -> None:
    with Trainer(TrainerConfig(), log_path=place / "log"):
        pass


def start_prefect(place: Path) -> None:
    from flows import _server

    _server._launch(1, 1.0)


def serve(place: Path) -> None:
    (place / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    policy = SimpleNamespace(is_full=True, model_directory=place)
    base = BaseSource(path="nowhere", revision=None, tiny=True)
    resources.exec_server(ServerSettings(LIMITS), base, policy, host="127.0.0.1", port=1)


STARTS = {
    "engine": lambda place: start_engine("engine", place),
    "teacher": lambda place: start_engine("teacher", place),
    "serve": serve,
    "trainer": start_trainer,
    "prefect": start_prefect,
    "maths": lambda place: Checker().ask("1", "2"),
    "nvidia-smi": lambda place: closure.listed_gpus.__wrapped__(),
    "git": lambda place: manifest.git_revision.__wrapped__(),
    "mlflow": lambda place: cli.ui(set=[f"where.store={place}"]),
}
KINDS = {"teacher": "engine", "serve": "engine", "git": "tool", "nvidia-smi": "tool"}


@pytest.mark.parametrize("start", STARTS)
def test_whatever_we_start_gets_an_environment_of_its_kind(start, hostile, tmp_path, monkeypatch):
    """Each place in the code that starts a process, up to the call of the system."""
    real = subprocess.Popen

    def started(argv, *arguments, env=None, **options):
        if argv[0] == "uname":  # Python's own
            return real(argv, *arguments, env=env, **options)
        raise Started(dict(env or os.environ))

    monkeypatch.setattr("thinkimg.tracking.loop.compare_link", lambda *_, **__: "")  # makes a database, for seconds
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "execvpe", lambda file, argv, env: started(argv, env=env))
    with pytest.raises(Started) as caught:
        STARTS[start](tmp_path)
    check(KINDS.get(start, start), caught.value.args[0])


def test_the_user_names_further_variables_for_engine_and_trainer():
    base = {"MY_LOSS": "1", "OTHER": "2", "MY_STACK_DEBUG": "3", NAMED_BY_USER: "MY_LOSS, MY_STACK_"}
    for kind in RULES:
        kept = {name for name in base if name in child_environment(kind, base)}
        assert kept == ({"MY_LOSS", "MY_STACK_DEBUG"} if kind in ("engine", "trainer") else set())


@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,20}", fullmatch=True), st.text("abc:/@", max_size=9)))
def test_an_unknown_variable_reaches_no_server(base):
    for kind, rule in RULES.items():
        made = child_environment(kind, base)
        for name in made.keys() & base.keys() - rule.settings.keys() - {"NO_PROXY", "PYTHONPATH", "PYTHONSAFEPATH"}:
            assert any(name == kept or (kept.endswith("_") and name.startswith(kept)) for kept in rule.keeps)


@given(st.lists(st.sampled_from(["", ".", "..", "lib", "/one", "/two/three", "HERE", "HERE/"])))
def test_the_working_directory_is_never_on_pythonpath(entries):
    given_path = os.pathsep.join(entry.replace("HERE", os.getcwd()) for entry in entries)
    kept = python_path(given_path).split(os.pathsep)
    assert [entry for entry in kept if entry] == [
        os.path.abspath(entry) for entry in entries if entry not in ("", ".", "HERE", "HERE/")
    ]


def test_a_relative_entry_of_pythonpath_is_there_for_the_trainer_too(tmp_path, monkeypatch):
    """`PYTHONPATH=src thinkimg run`: the user's own loss was found by the loop, and not by the trainer."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "my_losses.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "src")
    subprocess.run([sys.executable, "-c", "import my_losses"], env=child_environment("trainer", os.environ), check=True)


HUB_PATHS = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


@pytest.mark.parametrize("name", [*HUB_PATHS, "HF_ASSETS_CACHE", "HUGGINGFACE_ASSETS_CACHE"])
def test_a_child_looks_for_models_where_its_parent_does(tmp_path, name):
    code = "from huggingface_hub import constants as c; print(c.HF_HUB_CACHE, c.HF_ASSETS_CACHE)"
    base = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_", "XDG_"))}
    base[name] = str(tmp_path / "cache")

    def ask(environment):
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout

    wanted = ask(base)
    assert str(tmp_path) in wanted.decode()
    for kind in ("engine", "trainer"):
        assert ask(child_environment(kind, base)) == wanted, kind


def test_a_connection_that_breaks_is_the_engines_error():
    """A server that closes, or does not listen, was an error that nobody expected."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/sleep"
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(EngineError, match="did not answer"):
            server.post(url, {})
    with pytest.raises(EngineError, match="did not answer"):
        server.post(url, {})


def test_a_server_that_others_reach_is_not_started_without_the_key_that_was_set(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pytest.raises(UserError, match="VLLM_API_KEY"):
        cli.serve(host="0.0.0.0")


def test_a_clone_that_is_not_installed_is_found_by_its_children(monkeypatch):
    monkeypatch.setattr("thinkimg.environment.is_installed", lambda: False)
    assert python_path("/one") == f"/one{os.pathsep}{PACKAGE_ROOT}"


@given(st.sampled_from(["", "*", "a.example.org", " a , b,", "localhost"]), st.sampled_from(["", "c", "*"]))
def test_the_users_own_exceptions_from_proxies_stay(upper, lower):
    environment = {"NO_PROXY": upper, "no_proxy": lower}
    exempt_localhost(environment)
    first = dict(environment)
    exempt_localhost(environment)
    assert environment == first and environment["NO_PROXY"] == environment["no_proxy"]
    kept = environment["NO_PROXY"].split(",")
    assert kept == ["*"] or {*LOOPBACK, *(part.strip() for part in f"{upper},{lower}".split(",") if part)} - {
        ""
    } <= set(kept)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense"])
def test_a_proxy_is_not_asked_for_a_server_of_this_machine(fakes, monkeypatch, proxy):
    (fake,) = fakes([])
    for name in PROXIES:
        monkeypatch.setenv(name, proxy)
    server.post(f"{fake.url}/sleep", {"level": 1})
    assert fake.bodies == [{"level": 1}]


def test_the_names_of_this_machine():
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "LOCALHOST.", "x.localhost", "::1", "[::1]"):
        assert is_loopback(host)
    for host in ("localhost.example.org", "127.example.org", "10.0.0.1", "0.0.0.0", ""):
        assert not is_loopback(host)


@pytest.mark.parametrize("command", [["-m", "thinkimg"], ["-c", "from thinkimg.cli.main import main; main()"]])
def test_a_file_of_the_working_directory_stands_in_for_no_library(hostile, command, tmp_path):
    for name in ("thinkimg", "sitecustomize", "typing"):  # with -m Python itself imports these from there
        (tmp_path / "folder" / f"{name}.py").unlink()
    if command[0] == "-c":
        command = ["-P", *command]  # as the console script, whose folder is that of the programs
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, *command, "deployments"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_what_a_compiler_and_a_network_need_reaches_engine_and_trainer():
    names = ["CUDAHOSTCXX", "CUDACXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CONDA_BUILD_SYSROOT", "COMPILER_PATH"]
    names += ["MLX5_SINGLE_THREADED", "PSM2_DEVICES", "PSM3_NIC", "SHARP_COLL_ENABLE_SAT", "OFI_NCCL_PROTOCOL"]
    for kind in ("engine", "trainer"):
        assert set(names) <= child_environment(kind, dict.fromkeys(names, "x")).keys()
    assert child_environment("engine", {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"})["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"


def ask_prefect() -> None:
    importlib.reload(flows._environment)


MAKERS = {
    "images": lambda: UrlReader({"h"}, 1).read("http://h/1.png"),
    "teacher": lambda: connect("http://h/v1", TeacherEndpoint(url="http://h/v1")),
    "prefect": ask_prefect,
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("SSL_CERT_FILE", "/missing"), ("SSL_CERT_FILE", "/dev/null"), ("HTTP_PROXY", "foo:geheim"),
     ("https_proxy", "socks4://u:geheim@x"), ("ALL_PROXY", "socks9://x"), ("http_proxy", "http://127.0.0.1:port"),
     ("ALL_PROXY", "socks5://127.0.0.1:9")],
)  # fmt: skip
def test_certificates_and_proxies_that_cannot_be_used_are_a_sentence_of_every_client(monkeypatch, make, name, value):
    for variable in PROXIES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(UserError, match=name) as caught:
        MAKERS[make]()
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("path", ["/missing", "/dev/null", "/"])
def test_certificates_of_prefects_own_setting_are_a_sentence_before_its_server_is_started(path, monkeypatch):
    from prefect.settings import PREFECT_API_SSL_CERT_FILE, temporary_settings

    from flows import _server

    monkeypatch.setattr(_server, "_settle", pytest.fail)
    monkeypatch.setattr(_server, "_own", None)
    with temporary_settings({PREFECT_API_SSL_CERT_FILE: path}), pytest.raises(UserError, match=f"CERT_FILE.*{path}"):
        _server.start_server()


def test_all_clients_of_httpx_are_made_in_one_place():
    sources = [path for folder in ("thinkimg", "flows") for path in (PACKAGE_ROOT / folder).rglob("*.py")]
    making = [path.name for path in sources if re.search(r"trust_env|httpx\.(Async)?Client\(", path.read_text())]
    assert making == ["http_clients.py"]


def test_an_empty_variable_is_none(monkeypatch, tmp_path):
    """As Compose passes them: Prefect took "" for an address, and XDG_RUNTIME_DIR was the working directory."""
    names = ["PREFECT_API_URL", "PREFECT_HOME", "PREFECT_LOGGING_LEVEL", "MLFLOW_TRACKING_URI", "HF_HOME", "HOME"]
    environment = dict.fromkeys([*names, "TMPDIR"], "") | {"PREFECT_API_KEY": " "}
    kept = {"CUDA_VISIBLE_DEVICES": "", "http_proxy": "", "PREFECT_API_AUTH_STRING": "x", "MINE": ""}
    drop_empty(environment := environment | kept)
    assert environment == kept
    monkeypatch.setattr("thinkimg.process.temporary_root", lambda: tmp_path / ("d" * 200))
    monkeypatch.setattr("thinkimg.process.SHORT_ROOTS", ())
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="too long"):
        run_directory()


@pytest.mark.parametrize("value", ["", None])
def test_without_an_address_prefects_server_is_ours(value):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import _server

    with temporary_settings({PREFECT_API_URL: value}):
        assert _server.is_embedded()
