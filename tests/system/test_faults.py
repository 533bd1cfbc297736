"""The fault table (docs/faults.md): each row ends in a retry that works, or in one clear sentence, within a minute."""

import asyncio
import copy
import logging
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fake_engine import PLAIN, FakeServer, generate_many, image
from paths import REPOSITORY
from recorded_stages import Recorded

from thinkimg.config.load import load_config
from thinkimg.engine import client
from thinkimg.engine.client import EngineClient, EngineUnavailable
from thinkimg.engine.errors import EngineError
from thinkimg.errors import UserError
from thinkimg.stages import rollout
from thinkimg.store import artifacts
from thinkimg.store.artifacts import Store
from thinkimg.store.manifest import Recipe
from thinkimg.tracking.loop import log_stage, open_loop, sync_store

MINUTE = 60.0


def test_every_row_of_the_table_names_tests_that_exist():
    table = (REPOSITORY / "docs" / "faults.md").read_text()
    named = re.findall(r"`(\w+/test_\w+)::(test_\w+)`", table)
    assert len(named) == table.count("::") >= 12
    for module, name in named:
        assert f"def {name}(" in (REPOSITORY / "tests" / f"{module}.py").read_text(), f"{module}::{name}"


# engines and judges ---------------------------------------------------------------------------------------------------


class Hanging(FakeServer):
    """Takes every request and says nothing until it is let go; `well` answers /health all the same."""

    def __init__(self, well: bool):
        self.bodies, self.let_go = [], threading.Event()
        hanging = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                if not well:
                    hanging.let_go.wait(30)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_POST(self):
                hanging.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                hanging.let_go.wait(30)
                self.close_connection = True

            def log_message(self, *_):
                """Silent."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self.let_go.set()
        super().close()


@pytest.fixture
def impatient(monkeypatch):
    assert client.HEALTH_AFTER_S + client.HEALTH_TIMEOUT_S < MINUTE
    monkeypatch.setattr(client, "HEALTH_AFTER_S", 0.3)
    monkeypatch.setattr(client, "HEALTH_TIMEOUT_S", 0.3)


@pytest.fixture
def hanging(request):
    server = Hanging(getattr(request, "param", False))
    yield server
    server.close()


def test_an_engine_or_judge_that_hangs_is_told_in_a_sentence(hanging, impatient):
    with pytest.raises(EngineUnavailable, match=f"^{hanging.url} hangs: it does not answer\nHint: "):
        generate_many([hanging.url], 3)


def test_one_that_hangs_is_stood_in_for(hanging, impatient, fakes, caplog):
    (fake,) = fakes([])
    assert len(generate_many([hanging.url, fake.url], 20)) == 20
    assert len(fake.bodies) == 20 and caplog.text.count(f"{hanging.url} is left out") == 1


@pytest.mark.parametrize("hanging", [True], indirect=True)
def test_one_that_is_slow_but_well_is_waited_for(hanging, impatient):
    async def run():
        async with EngineClient([hanging.url], media="data") as engine:
            await asyncio.wait_for(engine.generate([5], [image(0)], PLAIN), 2)

    with pytest.raises(TimeoutError):  # ours
        asyncio.run(run())
    assert len(hanging.bodies) == 1


def test_no_server_at_all_is_a_sentence():
    async def run():
        async with EngineClient(["http://127.0.0.1:1"], media="data") as engine:
            await engine.leave_out_dead()

    with pytest.raises(EngineError, match="none of the servers http://127.0.0.1:1 answers"):
        asyncio.run(run())


def test_an_engine_that_dies_in_the_middle_costs_what_was_in_flight(stages, tmp_path, monkeypatch):
    played = []

    class Dying(Recorded):
        async def sample(self, specs, progress):
            for spec in specs:
                if len(played) == 2:
                    raise EngineUnavailable("http://x answered 500: EngineDeadError", hint="read the server's log")
                played.append((spec.sample.sample_id, spec.index))
                yield spec, self.episode(spec)

    store = Store(tmp_path)
    monkeypatch.setattr(rollout, "open_sampler", Dying)
    with pytest.raises(EngineError, match="EngineDeadError"):
        stages.run("rollout", store)
    monkeypatch.setattr(rollout, "open_sampler", Recorded)
    monkeypatch.setattr(Recorded, "sample", counting(Recorded.sample, again := []))
    assert stages.run("rollout", store).digest == stages.made["rollout"].digest
    assert len(again) == 2 and not set(again) & set(played)  # a sample has two conversations and a part of its own


class Refused(Recorded):
    """A sampler whose engine refuses some conversations: `refuses(spec)`."""

    refuses = staticmethod(lambda spec: True)

    async def sample(self, specs, progress):
        for spec in specs:
            episode = copy.copy(self.episode(spec))
            if self.refuses(spec):
                episode.fail("http://x answered 400: this server shows no images")
                episode.refused = True
            yield spec, episode


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["rollout", "evaluate"])
def test_what_the_engine_refused_is_no_finished_work(stages, tmp_path, monkeypatch, name, force):
    store = Store(tmp_path)
    monkeypatch.setattr(rollout, "open_sampler", Refused)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"\d+ of \d+ conversations failed, .* shows no images.* Hint: Correct that and run"
        ):
            stages.run(name, store)
        assert not list(tmp_path.rglob("trajectories-*"))
    monkeypatch.setattr(rollout, "open_sampler", Recorded)
    assert stages.run(name, store, force=force).digest == stages.made[name].digest


def test_a_conversation_that_is_refused_alone_is_a_row_and_force_plays_it_again(stages, tmp_path, monkeypatch):
    store = Store(tmp_path)
    monkeypatch.setattr(rollout, "open_sampler", Refused)
    monkeypatch.setattr(
        Refused, "refuses", staticmethod(lambda spec: spec.index == 0 and "detail" in spec.sample.sample_id)
    )
    first = stages.run("rollout", store)
    stops = first.table("trajectories")["stop"].to_pylist()
    assert 0 < stops.count("failed") <= len(stops) / 2
    monkeypatch.setattr(rollout, "open_sampler", Recorded)
    again = stages.run("rollout", store, force=True)
    assert again.digest == stages.made["rollout"].digest and again.attempt == "0002"


def test_half_of_what_an_engine_that_fails_played_is_kept(stages, tmp_path, monkeypatch):
    """Parts without a refusal stay closed; those with one are played again."""
    store = Store(tmp_path)
    monkeypatch.setattr(rollout, "open_sampler", Refused)
    kept = []

    def refuses(spec):
        kept.append(spec.sample.sample_id)
        return len(kept) > 1 and spec.sample.sample_id != kept[0]

    monkeypatch.setattr(Refused, "refuses", staticmethod(refuses))
    config = stages.config.model_copy(update={"rollout": stages.config.rollout.model_copy(update={"samples": 3})})
    with pytest.raises(UserError, match="4 of 6 conversations failed"):
        stages.run("rollout", store, config=config)
    assert len(list(tmp_path.rglob("trajectories-*"))) == 1
    monkeypatch.setattr(rollout, "open_sampler", Recorded)
    monkeypatch.setattr(Recorded, "sample", counting(Recorded.sample, again := []))
    stages.run("rollout", store, config=config)
    assert len(again) == 4 and kept[0] not in {sample for sample, _ in again}


def test_one_that_is_refused_every_time_holds_nothing_up(stages, tmp_path, monkeypatch):
    """Not even where the run is killed when all parts are closed."""
    store = Store(tmp_path)
    monkeypatch.setattr(rollout, "open_sampler", Refused)
    bad = stages.made["rollout"].table("trajectories")["sample_id"][0].as_py()
    monkeypatch.setattr(Refused, "refuses", staticmethod(lambda spec: spec.sample.sample_id == bad))
    config = stages.config.model_copy(update={"rollout": stages.config.rollout.model_copy(update={"samples": 4})})
    with monkeypatch.context() as patch:
        patch.setattr(artifacts.Work, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            stages.run("rollout", store, config=config)
    rows = stages.run("rollout", store, config=config).table("trajectories").to_pylist()
    assert [row["stop"] == "failed" for row in rows] == [row["sample_id"] == bad for row in rows]


def test_what_was_refused_before_the_engine_died_is_played_again(stages, tmp_path, monkeypatch):
    played = []

    class Dying(Refused):
        async def sample(self, specs, progress):
            async for spec, episode in super().sample(specs, progress):
                played.append(spec)
                if len(played) == 4:
                    raise EngineUnavailable("http://x answered 500: EngineDeadError")
                yield spec, episode

    store = Store(tmp_path)
    monkeypatch.setattr(rollout, "open_sampler", Dying)
    monkeypatch.setattr(Refused, "refuses", staticmethod(lambda spec: spec.index == 1))
    with pytest.raises(EngineUnavailable):
        stages.run("rollout", store)
    monkeypatch.setattr(rollout, "open_sampler", Recorded)
    assert stages.run("rollout", store).digest == stages.made["rollout"].digest


def test_where_every_conversation_failed_by_itself_nothing_is_kept(stages, tmp_path, monkeypatch):
    class Broken(Recorded):
        def episode(self, spec):
            episode = copy.copy(super().episode(spec))
            episode.fail("The tool crop_image broke: MemoryError")
            return episode

    store = Store(tmp_path)
    monkeypatch.setattr(rollout, "open_sampler", Broken)
    with pytest.raises(
        UserError, match="Every conversation failed, the first with: The tool crop_image broke.* everything is"
    ):
        stages.run("rollout", store)
    monkeypatch.setattr(rollout, "open_sampler", Recorded)
    assert stages.run("rollout", store).digest == stages.made["rollout"].digest


def killed(*_):
    raise KeyboardInterrupt


def counting(sample, seen):
    async def counted(self, specs, progress):
        async for spec, episode in sample(self, specs, progress):
            seen.append((spec.sample.sample_id, spec.index))
            yield spec, episode

    return counted


# MLflow ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracked(tmp_path):
    store = Store(tmp_path / "artifacts")
    config = load_config("tiny", [f"where.store={store.root}"])
    with open_loop(config, store):
        pass
    return config, store


def lock(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def test_a_locked_mlflow_database_at_the_start_is_a_sentence(tracked):
    config, store = tracked
    holder, started = lock(store.root / "mlflow.db"), time.monotonic()
    try:
        with pytest.raises(UserError, match="MLflow can't be used at sqlite:.*locked"):
            open_loop(config, store)
    finally:
        holder.close()
    assert time.monotonic() - started < MINUTE


def test_a_locked_mlflow_database_later_is_a_warning_and_sync_mends_it(tracked, caplog):
    config, store = tracked
    with open_loop(config, store) as tracker:
        holder, started = lock(store.root / "mlflow.db"), time.monotonic()
        try:
            with caplog.at_level(logging.WARNING):
                tracker.log_iteration(1, {"eval/accuracy": 0.5})
        finally:
            holder.close()
        assert time.monotonic() - started < MINUTE
        assert "MLflow did not take" in caplog.text and "thinkimg track sync" in caplog.text
    assert sync_store(store).points == 0  # leaving the loop has added it
    import mlflow

    engine = mlflow.MlflowClient(f"sqlite:///{store.root.resolve() / 'mlflow.db'}")
    (run,) = engine.search_runs([engine.get_experiment_by_name("thinkimg").experiment_id])
    assert run.data.metrics["eval/accuracy"] == 0.5


def test_a_stage_is_made_though_mlflow_is_gone(tmp_path, caplog):
    store = Store(tmp_path)
    artifact = store.build("toy", Recipe("toy", 1, 1, {}), lambda work: None)[0]
    settings = load_config("tiny", ["where.tracking.uri=http://127.0.0.1:1"]).where.tracking
    started = time.monotonic()
    assert log_stage(artifact, store, settings) is None
    assert time.monotonic() - started < MINUTE and "MLflow did not take" in caplog.text


# Prefect --------------------------------------------------------------------------------------------------------------


def prepare(place: Path, **environment: str) -> tuple[subprocess.CompletedProcess, float]:
    command = [sys.executable, "-m", "thinkimg", "prepare", "--preset", "tiny"]
    settings = ["data.train=4", "data.held_out=2", "where.tracking.enabled=false"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, *(part for setting in settings for part in ("--set", setting))], cwd=place,
        capture_output=True, text=True,
        env=os.environ | {"PREFECT_HOME": str(place / "prefect"),
        "PYTHONPATH": str(REPOSITORY)} | environment, timeout=300,
    )  # fmt: skip
    return done, time.monotonic() - started


@pytest.mark.parametrize(
    "environment",
    [
        {"PREFECT_API_URL": "http://127.0.0.1:1/api"},
        {"PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////nowhere/prefect.db"},
    ],
    ids=["no server", "no database"],
)
def test_without_prefect_it_ends_in_a_sentence(tmp_path, environment):
    done, seconds = prepare(tmp_path, **environment)
    said = [line for line in done.stderr.splitlines() if line.startswith("thinkimg: ")]
    assert done.returncode == 1 and len(said) == 1 and "Prefect's" in said[0], done.stderr[-3000:]
    assert "Traceback" not in done.stderr and seconds < MINUTE


def test_what_prefect_does_not_take_is_a_warning(tmp_path, caplog, monkeypatch):
    from flows import _ui

    artifact = Store(tmp_path).build("scores", Recipe("score", 1, 1, {}), lambda work: None)[0]

    def refuse(*_, **__):
        raise ConnectionError("database is locked")

    for name in ("create_table_artifact", "create_link_artifact", "create_progress_artifact"):
        monkeypatch.setattr(_ui, name, refuse)
    monkeypatch.setattr(_ui._server, "is_embedded", lambda: False)
    _ui.show_artifact(artifact, False, "http://127.0.0.1/run")
    with _ui.show_bar("score") as show:
        show(1, 2)
    for what in ("a table", "a link", "progress"):
        assert f"Prefect did not take {what} (ConnectionError: database is locked)" in caplog.text
