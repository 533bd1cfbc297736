"""Prefect's API where none is configured: its embedded server, under our watchdog, started by one process at a time."""

import os
import subprocess
import sys

import prefect
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, get_current_settings

from thinkimg import files
from thinkimg.process import Child, spawn

KEPT: list[Child] = []  # their watchdogs end them when our end of a pipe closes, so it stays open as long as we live


def is_embedded() -> bool:
    """Whether flows of this process are kept by a server of its own, which nobody else sees."""
    return PREFECT_API_URL.value() is None


def api_url() -> str:
    """Where the API is, for processes that we start; the embedded server is started if need be."""
    if not is_embedded():
        return PREFECT_API_URL.value()
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    server.start()
    return server.api_url


def guard() -> None:
    """Have Prefect start its embedded server through `process.spawn`.

    Prefect's own child outlives a SIGKILL of its parent. And several servers that create or migrate one database at once
    crash now and then (seen with 3.7): so they start one after the other.
    """
    if not is_embedded():
        return
    from prefect.server.api.server import SubprocessASGIServer

    if getattr(SubprocessASGIServer, "guarded", False):
        return
    plain_start = SubprocessASGIServer.start

    def start(self: SubprocessASGIServer, timeout: int | None = None) -> None:
        if self.running:
            return
        home = PREFECT_HOME.value()
        home.mkdir(parents=True, exist_ok=True)
        with files.locked(home / "thinkimg-server.lock"):
            plain_start(self, timeout)

    def run(self: SubprocessASGIServer) -> subprocess.Popen:
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        embedded = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        app = ["--app-dir", str(prefect.__module_path__.parent), "--factory", "prefect.server.api.server:create_app"]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--log-level", "error", "--lifespan", "on"]
        argv = [sys.executable, "-m", "uvicorn", *app, *where]
        child = spawn(argv, name="prefect", env=os.environ | embedded | settings)
        KEPT.append(child)
        return child.process

    SubprocessASGIServer.start, SubprocessASGIServer._run_uvicorn_command = start, run
    SubprocessASGIServer.guarded = True
