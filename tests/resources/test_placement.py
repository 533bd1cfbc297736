"""`where.*.devices` and `cpu_threads_bind`: on which GPUs and cores the processes of a loop are started."""

import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg import closure
from thinkimg.config.load import load_config
from thinkimg.devices import bound_to_cores, parse_cores, select_gpus
from thinkimg.engine.errors import EngineError
from thinkimg.engine.server import Server, ServerSettings
from thinkimg.engine.settings import EngineConfig, EngineSettings
from thinkimg.errors import UserError
from thinkimg.models.base import BaseSource
from thinkimg.resources import Resources, exec_server
from thinkimg.trainer import client
from thinkimg.watchdog import descendants

SETTINGS = EngineSettings(dtype="float32", max_tokens=1024, max_images=4, max_pixels=2_000_000)
BASE = BaseSource(path="nowhere", revision=None, tiny=True)
GPUS = 4


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(closure, "on_cpu", lambda: False)
    monkeypatch.setattr(closure, "visible_gpus", lambda: GPUS)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def model(tmp_path) -> Path:
    """A model as far as a command line needs one."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return folder


@pytest.fixture
def started(monkeypatch) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name -> command line and environment of each process that was started; none runs."""
    starts: dict[str, tuple[list[str], dict[str, str]]] = {}

    def spawn(argv, *, name, env, log_path):
        starts[log_path.stem] = argv, env
        return SimpleNamespace(
            alive=True, terminate=lambda **_: 0, __enter__=lambda self: self, __exit__=lambda *_: None
        )

    class Spool(ExitStack):
        def enter_context(self, context):
            return context if isinstance(context, SimpleNamespace) else super().enter_context(context)

    monkeypatch.setattr("thinkimg.engine.server.spawn", spawn)
    monkeypatch.setattr("thinkimg.process.spawn", spawn)
    monkeypatch.setattr(client.contextlib, "ExitStack", Spool)
    monkeypatch.setattr(Server, "_wait", lambda *_: None)
    monkeypatch.setattr("thinkimg.engine.server.post", lambda *_: None)
    return starts


def start_all(tmp_path, model, *settings: str) -> None:
    policy = SimpleNamespace(digest="d", is_full=True, model_directory=model)
    config = load_config("tiny", [f"where.store={tmp_path}", *settings])
    with Resources(config.where, say=lambda line: None) as resources:
        resources.servers(policy, None, SETTINGS, BASE)
        resources.teacher(policy, SETTINGS, BASE)
        resources.trainer  # noqa: B018  starts with the first look


QUICK_START = ["where.engine={devices: [0, 1], tensor_parallel_size: 2}", "where.trainer.devices=[2, 3]"]
TWO_ENGINES = ["where.engine.devices=[0, 1]", "where.trainer.devices=[2]"]
UUIDS = ["where.engine.devices=[GPU-a, MIG-b/1/0]", "where.trainer.devices=[GPU-c]"]


@pytest.mark.parametrize(
    "settings, outer, expected, processes",
    [
        ([], None, {"engine": None, "teacher": None, "trainer": None}, 1),
        ([], "2,3", {"engine": "2,3", "teacher": "2,3", "trainer": "2,3"}, 1),
        (QUICK_START, None, {"engine": "0,1", "teacher": "0", "trainer": "2,3"}, 2),
        (TWO_ENGINES, None, {"engine-1": "0", "engine-2": "1", "teacher": "0", "trainer": "2"}, 1),
        (TWO_ENGINES, "7, 5,6", {"engine-1": "7", "engine-2": "5", "teacher": "7", "trainer": "6"}, 1),
        (TWO_ENGINES, "GPU-x,GPU-y,GPU-z",
         {"engine-1": "GPU-x", "engine-2": "GPU-y", "teacher": "GPU-x", "trainer": "GPU-z"}, 1),
        (UUIDS, "0", {"engine-1": "GPU-a", "engine-2": "MIG-b/1/0", "teacher": "GPU-a", "trainer": "GPU-c"}, 1),
        ([*TWO_ENGINES, "where.teacher.devices=[3]"], None,
         {"engine-1": "0", "engine-2": "1", "teacher": "3", "trainer": "2"}, 1),
        (["where.trainer.devices=[3]"], None, {"engine": None, "teacher": None, "trainer": "3"}, 1),
        (["where.trainer={devices: [1, 2], nodes: 2, address: 'host:1'}"], None,
         {"engine": None, "teacher": None, "trainer": "1,2"}, 4),
    ],
)  # fmt: skip
def test_each_process_sees_its_gpus_and_no_others(
    tmp_path, model, four_gpus, started, monkeypatch, settings, outer, expected, processes
):
    if outer is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)
    start_all(tmp_path, model, *settings)
    assert {name: env.get("CUDA_VISIBLE_DEVICES") for name, (_, env) in started.items()} == expected
    argv, _ = started["trainer"]
    assert argv[-1] == str(processes)
    if processes > 1:
        assert argv[argv.index("--num_processes") + 1] == str(processes) and "--multi_gpu" in argv
    ports = [argv[argv.index("--port") + 1] for name, (argv, _) in started.items() if name != "trainer"]
    assert len(set(ports)) == len(ports)


@given(
    st.permutations(range(GPUS)), st.sampled_from([1, 2, 4]), st.integers(1, GPUS), st.none() | st.permutations("abcd")
)
def test_every_gpu_is_given_to_one_server_in_order(numbers, size, count, outer):
    devices = numbers[: count * size][: GPUS - GPUS % size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closure, "on_cpu", lambda: False)
        patch.setattr(closure, "visible_gpus", lambda: GPUS)
        base = {} if outer is None else {"CUDA_VISIBLE_DEVICES": ",".join(outer)}
        parts = EngineConfig(devices=devices, tensor_parallel_size=size).split(cpu=False)
        shown = [select_gpus("x", part.devices, base)["CUDA_VISIBLE_DEVICES"].split(",") for part in parts]
    assert all(len(part) == size for part in shown)
    names = list(map(str, range(GPUS))) if outer is None else outer
    assert [name for part in shown for name in part] == [names[number] for number in devices]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["where.engine.devices=[0, 0]"], r"\[0, 0\] name a GPU twice"),
        (["where.trainer.devices=[-1]"], r"\[-1\] are no GPUs"),
        (["where.trainer.devices=[]"], r"\[\] are no GPUs"),
        (["where.teacher.devices=[GPU-a, 0]"], r"teacher.devices.*at most 1 item"),
        (["where.engine.devices=[GPU-a, 0]"], r"all by number, from 0, or all by UUID"),
        (["where.engine.devices=['GPU-a,GPU-b']"], "are no GPUs"),
        (["where.engine.devices=[true]"], "can't be true or false"),
        (["where.engine.devices=0"], "where.engine.devices"),
        (
            ["where.engine={devices: [0, 1, 2], tensor_parallel_size: 2}"],
            "devices has 3 parts, and each server takes 2",
        ),
        (["where.engine={devices: [0], tensor_parallel_size: 2}"], "devices has 1 parts, and each server takes 2"),
        (["where.engine={cpu_threads_bind: '0|1|2', tensor_parallel_size: 2}"], "cpu_threads_bind has 3 parts"),
        (["where.engine={devices: [0], urls: ['http://host:1']}"], "with engine.urls it has none"),
        (["where.trainer={devices: [2, 3], processes: 1}"], "leave trainer.processes out"),
        (["where.trainer={devices: [2, 3], processes: 2, nodes: 2, address: 'host:1'}"], "on each of 2 nodes"),
        (["where.trainer.cpu_threads_bind=0;1"], "where.trainer.cpu_threads_bind"),
    ],
)
def test_devices_that_can_not_be_are_one_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        load_config("tiny", settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "setting, outer", [("engine", None), ("teacher", None), ("trainer", None), ("trainer", "0,1"), ("engine", "")]
)
def test_a_gpu_that_is_not_there_is_said_before_anything_starts(
    tmp_path, model, four_gpus, started, monkeypatch, setting, outer
):
    if outer is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", outer)
    there = len(outer.split(",")) if outer else GPUS if outer is None else 0
    with pytest.raises(UserError, match=rf"^where.{setting}.devices names GPU 4, and {there} are visible"):
        start_all(tmp_path, model, f"where.{setting}.devices=[4]")
    assert not started


def test_gpus_for_the_packages_of_a_cpu_are_refused(tmp_path, model, started):
    with pytest.raises(UserError, match="names GPUs, and the installed packages are those for a CPU"):
        start_all(tmp_path, model, "where.trainer.devices=[0]")
    assert not started


def test_a_server_that_is_started_by_hand_is_one(four_gpus):
    settings = ServerSettings(SETTINGS, EngineConfig(devices=(0, 1)))
    with pytest.raises(UserError, match="is one server, and where.engine places 2"):
        exec_server(settings, BASE, None, host="127.0.0.1", port=1)


@pytest.mark.parametrize(
    "bind, size, expected",
    [
        ("0", 1, {"engine": "0"}), ("0|1", 2, {"engine": "0|1"}), ("auto", 2, {"engine": "auto"}),
        ("0-3|4,6", 1, {"engine-1": "0-3", "engine-2": "4,6"}),
        ("0|1|2|3", 2, {"engine-1": "0|1", "engine-2": "2|3"}),
    ],
)  # fmt: skip
def test_on_a_cpu_the_servers_share_the_cores(tmp_path, model, started, bind, size, expected):
    start_all(tmp_path, model, f"where.engine={{cpu_threads_bind: '{bind}', tensor_parallel_size: {size}}}")
    binds = {name: env.get("VLLM_CPU_OMP_THREADS_BIND") for name, (_, env) in started.items()}
    assert binds == expected | {"teacher": "1", "trainer": None}
    assert not any("CUDA_VISIBLE_DEVICES" in env for _, env in started.values())


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_trainers_memory_grows_in_place_unless_the_user_has_set_it(tmp_path, model, started, monkeypatch, own):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:512")
    start_all(tmp_path, model)
    settings = {name: {k: v for k, v in env.items() if k.endswith("_ALLOC_CONF")} for name, (_, env) in started.items()}
    users = {} if own is None else {own: "max_split_size_mb:512"}
    assert settings == {
        "engine": users, "teacher": users, "trainer": users or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    }  # fmt: skip


def test_the_trainer_runs_on_its_cores_and_we_keep_ours(tmp_path, monkeypatch):
    show = "import json, os; print(json.dumps(sorted(os.sched_getaffinity(0))))"
    monkeypatch.setattr(client, "build_launch_command", lambda *_, **__: [sys.executable, "-c", show])
    before = os.sched_getaffinity(0)
    for core in sorted(before)[-2:]:
        config = load_config("tiny", [f"where.trainer.cpu_threads_bind={core}"]).where.trainer
        log = tmp_path / f"{core}.log"
        with client.spawn(config, "-", log_path=log) as child:
            child.wait(30)
        assert json.loads(log.read_text()) == [core] and os.sched_getaffinity(0) == before


@pytest.mark.parametrize("cores", ["4095", "0,4095"])
def test_cores_that_are_not_there_are_one_sentence(cores):
    before = os.sched_getaffinity(0)
    with pytest.raises(UserError, match=f"where.x names the cores {cores}"), bound_to_cores("where.x", cores):
        pass
    assert os.sched_getaffinity(0) == before


@given(st.sets(st.integers(0, 300), min_size=1))
def test_cores_are_read_as_they_are_written(cores):
    assert parse_cores(",".join(map(str, cores))) == cores
    assert parse_cores(f"{min(cores)}-{max(cores)}") == set(range(min(cores), max(cores) + 1))


@pytest.mark.parametrize("first", ["is ready", "never answers"])
@pytest.mark.parametrize("second", ["fails", "never answers"])
def test_servers_that_start_together_end_together(tmp_path, model, monkeypatch, first, second):
    """The second fails, or somebody closes the resources meanwhile."""
    wait = Server._wait
    monkeypatch.setattr("thinkimg.engine.server.post", lambda *_: None)
    monkeypatch.setattr(
        Server,
        "_wait",
        lambda self, *rest: None if first == "is ready" and self.name == "engine-1" else wait(self, *rest),
    )
    silent, waits = ["sleep", "601"], threading.Event()

    def command(model, port, settings):
        if settings.engine.cpu_threads_bind == "0":
            waits.set()
            return silent
        return ["sh", "-c", "sleep 1; echo 'ValueError: no such core'; exit 3"] if second == "fails" else silent

    def close():
        waits.wait(20)
        resources.close()

    monkeypatch.setattr("thinkimg.engine.server.server_command", command)
    policy = SimpleNamespace(digest="d", is_full=True, model_directory=model)
    config = load_config("tiny", [f"where.store={tmp_path}", "where.engine.cpu_threads_bind=0|1"])
    with Resources(config.where, say=lambda line: None) as resources:
        if second == "never answers":
            threading.Thread(target=close).start()
        began = time.monotonic()
        reason = "status 3.*no such core" if second == "fails" else "ended with status"
        with pytest.raises(EngineError, match=reason):
            resources.servers(policy, None, SETTINGS, BASE)
        assert time.monotonic() - began < 20
        assert not [
            pid for pid in descendants(os.getpid()) if b"sleep\x00601" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
