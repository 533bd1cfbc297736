"""Prefect's API where none is configured: its embedded server, under our watchdog, started by one process at a time."""

import atexit
import os
import re
import sys
import time

import prefect
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, get_current_settings
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS as STARTUP_TIMEOUT

from thinkimg import files
from thinkimg.engine.server import answers
from thinkimg.process import Child, spawn

ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception): ")

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


class PrefectUnavailable(RuntimeError):
    """Prefect's server does not start or does not answer; the message is one sentence."""


def guard() -> None:
    """Have Prefect start its embedded server through `process.spawn`.

    Prefect's own child outlives a SIGKILL of its parent, and its parent waits for one that has ended already. And several
    servers that create or migrate one database at once crash now and then (seen with 3.7): so they start one after the other.
    """
    if not is_embedded():
        return
    from prefect.server.api.server import SubprocessASGIServer

    def start(self: SubprocessASGIServer, timeout: int | None = None) -> None:
        if self.running:
            return
        home = PREFECT_HOME.value()
        files.make_directory(home)
        with files.locked(home / "thinkimg-server.lock"):
            self.port = self.port or self.find_available_port()
            self.running = True
            try:
                self.server_process = _launch(self.port, timeout or STARTUP_TIMEOUT.value()).process
            except BaseException:
                self.running = False
                raise
        atexit.register(self.stop)

    SubprocessASGIServer.start = start


def _launch(port: int, timeout: float) -> Child:
    """Start the server and wait until it answers."""
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    embedded = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    app = ["--app-dir", str(prefect.__module_path__.parent), "--factory", "prefect.server.api.server:create_app"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    log = PREFECT_HOME.value() / "thinkimg-server.log"
    argv = [sys.executable, "-m", "uvicorn", *app, *where]
    child = spawn(argv, name="prefect", env=os.environ | embedded | settings, log_path=log)
    KEPT.append(child)
    deadline = time.monotonic() + timeout
    while not answers(f"http://127.0.0.1:{port}/api/health"):
        if not child.alive or time.monotonic() > deadline:
            what = "did not start in time" if child.alive else "ended"
            child.terminate()
            causes = [line for line in child.log_tail(200).splitlines() if ERROR.match(line)]
            cause = f" ({causes[-1][:300]})" if causes else ""
            raise PrefectUnavailable(
                f"Prefect's embedded server {what}{cause} Hint: read {log}; its database is in {log.parent}"
            )
        time.sleep(0.1)
    return child
