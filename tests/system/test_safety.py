"""What the code may not do, whoever writes it: walks the syntax trees, reads the command lines."""

import ast
import re

import pytest
import yaml
from paths import REPOSITORY

from thinkimg.engine.server import ServerSettings, server_command
from thinkimg.engine.settings import EngineSettings
from thinkimg.tracking.loop import ui_command
from thinkimg.tracking.settings import TrackingConfig

SOURCES = sorted(path for folder in ("thinkimg", "flows", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py"))
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BANNED_NAMES = {"eval", "exec", "compile", "__import__"}
BANNED_CALLS = {"torch.load", "numpy.load", "np.load", "pd.read_pickle", "yaml.load", "yaml.unsafe_load", "os.system"}


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_code_is_made_from_data(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {name.split(".")[0] for name in names} & BANNED_MODULES, f"line {node.lineno}: {names}"
        if isinstance(node, ast.Name):
            assert node.id not in BANNED_NAMES, f"line {node.lineno}: {node.id}"
    for node, name in calls(tree):
        assert name not in BANNED_CALLS, f"line {node.lineno}: {name}"
        shell = [keyword for keyword in node.keywords if keyword.arg == "shell"]
        assert not any(ast.unparse(keyword.value) != "False" for keyword in shell), f"line {node.lineno}: shell"
        remote = [keyword for keyword in node.keywords if keyword.arg == "trust_remote_code"]
        for keyword in remote:  # a literal True would run a model repository's code whatever the user has set
            assert ast.unparse(keyword.value) != "True", f"line {node.lineno}: trust_remote_code"


def test_the_walk_finds_what_it_looks_for(tmp_path):
    for code in ("import pickle", "from dill import loads", "x = eval", "torch.load(p)", "run(a, shell=True)",
                 "f(trust_remote_code=True)"):  # fmt: skip
        (tmp_path / "bad.py").write_text(code)
        with pytest.raises(AssertionError):
            test_no_code_is_made_from_data(tmp_path / "bad.py")


def test_only_the_file_layer_replaces_files_of_a_store():
    """The store and tracking/records.py write through store/files.py: they call nothing that writes itself."""
    writing = re.compile(r"\.(write_text|write_bytes|unlink|rename|replace|rmdir|mkdir|touch|rmtree|symlink_to)$")
    for name in (
        "store/artifacts.py",
        "store/gc.py",
        "store/lineage.py",
        "analysis/verify_calls.py",
        "tracking/records.py",
    ):
        tree = ast.parse((REPOSITORY / "thinkimg" / name).read_text(encoding="utf-8"))
        found = [(node.lineno, called) for node, called in calls(tree) if writing.search(called) or called == "open"]
        found = [entry for entry in found if not entry[1].startswith("files.")]
        # A part's own bytes go to the name that `files.replacing` has given out, and a part may be a directory.
        allowed = (
            {"path.write_bytes", "path.mkdir", "name.replace", "part.replace"}
            if name == "store/artifacts.py"
            else set()
        )
        assert not [entry for entry in found if entry[1] not in allowed], f"{name}: {found}"


def test_servers_bind_to_localhost():
    limits = EngineSettings(dtype="float32", max_tokens=1024, max_images=1, max_pixels=10**6)
    engine = server_command("Qwen/Qwen2.5-VL-7B-Instruct", 1234, ServerSettings(limits))
    assert engine[engine.index("--host") + 1] == "127.0.0.1"
    assert "trust-remote-code" not in " ".join(engine)
    assert "--host 127.0.0.1" in ui_command("artifacts", TrackingConfig())
    makefile = (REPOSITORY / "Makefile").read_text()
    assert re.search(r"server start --host 127\.0\.0\.1", makefile)
    for path in SOURCES:
        assert "0.0.0.0" not in path.read_text(encoding="utf-8"), path
    assert '"--host", "127.0.0.1"' in (REPOSITORY / "flows" / "_server.py").read_text()


def test_the_deployments_name_flows_that_exist():
    for deployment in yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]:
        path, _, name = deployment["entrypoint"].partition(":")
        tree = ast.parse((REPOSITORY / path).read_text())
        functions = {node.name for node in tree.body if hasattr(node, "name")}
        made = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
        assert name in functions | made


# Processes and connections --------------------------------------------------------------------------------------------

OURS = sorted(path for folder in ("thinkimg", "flows") for path in (REPOSITORY / folder).rglob("*.py"))
STARTING = re.compile(
    r"(subprocess\.(Popen|run|call|check_call|check_output|getoutput|getstatusoutput)|process\.spawn"
    r"|os\.(exec\w+|spawn\w+|posix_spawnp?|fork|forkpty|popen|system)|(asyncio\.)?create_subprocess_\w+)"
)
ANY_PLACE = {"thinkimg/process.py", "thinkimg/crash.py"}  # the latter writes wherever it can
STARTERS = {"thinkimg/process.py", "thinkimg/watchdog.py"}  # they hand on the environment that they are given
MAKERS = {"child_environment", "server_environment"}
CLIENTS = {
    "thinkimg/environment.py": {"urllib.request", "http.client"},  # servers on this machine, without proxies
    "thinkimg/engine/client.py": {"aiohttp"},  # the engine: no proxies, no keys
    "thinkimg/rewards/endpoint.py": {"httpx", "openai"},  # keys and proxies: test_teacher_key.py
    "thinkimg/data/pictures/urls.py": {"httpx"},  # images
    "flows/_environment.py": {"httpx"},  # one that asks nothing: whether certificates and proxies can be used
    "thinkimg/serving/app.py": {"aiohttp"},  # its server alone
    "thinkimg/serving/page.py": {"aiohttp"},  # files of that server
    "thinkimg/environments/verifiers/thinkimg_env.py": {"httpx"},  # verifiers' interception: its secret, no proxies
}
FORKS = {"thinkimg/engine/serve.py"}  # vLLM's own process, with what the server got
HTTP = {"urllib.request", "http.client", "requests", "httpx", "aiohttp", "urllib3", "openai", "websockets", "websocket"}


def made_by_rule(value: ast.expr, tree: ast.AST) -> bool:
    """Tell whether an expression is a call of a maker, or a name that only such calls are assigned to."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in MAKERS
    given = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == ast.unparse(value)
    ]
    return bool(given) and all(made_by_rule(other, ast.Module([], [])) for other in given)


def imported_names(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_children_environments_clients_and_scratch_go_through_one_place(path):
    """environment.py makes what a child gets and opens what is local, process.py knows the place of temporary files."""
    name, tree = path.as_posix().removeprefix(f"{REPOSITORY}/"), ast.parse(path.read_text(encoding="utf-8"))
    imports = imported_names(tree)
    for node, call in calls(tree):
        ours = call == "spawn" and "thinkimg.process.spawn" in imports
        if (STARTING.fullmatch(call) or ours) and name not in STARTERS:
            given = [keyword.value for keyword in node.keywords if keyword.arg == "env"] or node.args[2:]
            assert given and made_by_rule(given[-1], tree), f"line {node.lineno}: {call}"
        assert call != "sys.path.insert", f"line {node.lineno}: ahead of what is installed"
        if call.startswith("tempfile.") and name not in ANY_PLACE:
            named = any(keyword.arg == "dir" for keyword in node.keywords)
            assert named and call != "tempfile.gettempdir", f"line {node.lineno}: {call} has no dir"
    assert not imports & {"multiprocessing", "concurrent.futures.ProcessPoolExecutor", "pty"} or name in FORKS
    used = {client for client in HTTP if any(f"{other}.".startswith(f"{client}.") for other in imports)}
    assert used <= CLIENTS.get(name, set()), used


@pytest.mark.parametrize(
    "code",
    [
        "def f(): subprocess.run(['x'])",
        "def f(): subprocess.Popen(['x'], env=os.environ)",
        "def f(): subprocess.run(['x'], env=os.environ | {'A': 'b'})",
        "def f():\n env = child_environment('tool', {})\n env = os.environ\n subprocess.run(['x'], env=env)",
        "def f(): os.execvp('x', ['x'])",
        "def f(): os.execvpe('x', ['x'], os.environ)",
        "from thinkimg.process import spawn\ndef f(): spawn(['x'], name='x')",
        "def f(): process.spawn(['x'], name='x', env=dict(os.environ))",
        "def f(): sys.path.insert(0, '.')",
        "def f(): tempfile.mkdtemp()",
        "def f(): return tempfile.gettempdir()",
        "import urllib.request",
        "from urllib.request import urlopen",
        "import requests",
        "import multiprocessing",
    ],
)
def test_the_sweep_finds_what_it_looks_for(tmp_path, code):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(AssertionError):
        test_children_environments_clients_and_scratch_go_through_one_place(tmp_path / "bad.py")
