"""Prefect's API where none is configured: a server of our own, under our watchdog, started by one process at a time.

Prefect's own embedded server outlives a SIGKILL of its parent, costs its client three seconds of imports, and several that
create or migrate one database at once crash now and then (seen with 3.7).
"""

import atexit
import os
import re
import sys
import threading
import time
from concurrent.futures import Future

import flows._environment  # noqa: F401

import prefect
from prefect.context import refresh_global_settings_context
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, get_current_settings
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS as STARTUP_TIMEOUT

from thinkimg.engine.server import answers
from thinkimg.process import free_port, spawn
from thinkimg.store import files

# What a server writes for its pages alone (and has old events vacuumed with). While it wrote the tasks of a scoring, the
# next flow was answered 503 by its SQLite, which costs the client two seconds each time (seen with 3.7).
UNSEEN = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED": "0",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "0",
}
ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception): ")

_own: Future | None = None
"""The URL of this process's own server, once it answers."""


def is_embedded() -> bool:
    """Tell whether flows of this process are kept by a server of its own, which nobody else sees."""
    return _own is not None or PREFECT_API_URL.value() is None


class PrefectUnavailable(RuntimeError):
    """Prefect's server does not start or does not answer; the message is one sentence."""


def start() -> None:
    """Start the server, if one is needed and none is there; does not wait for it."""
    global _own
    if _own is None and PREFECT_API_URL.value() is None:
        _own = Future()
        threading.Thread(target=_settle, args=[_own], name="prefect-server", daemon=True).start()


def use() -> None:
    """Have everything in this process, and its children, talk to an API: the one that is configured, or our own."""
    start()
    if PREFECT_API_URL.value() is None:
        os.environ["PREFECT_API_URL"] = _own.result()
        refresh_global_settings_context()


def _settle(future: Future) -> None:
    try:
        home = PREFECT_HOME.value()
        files.make_directory(home)
        with files.locked(home / "thinkimg-server.lock"):
            future.set_result(_launch(free_port(), STARTUP_TIMEOUT.value()))
    except BaseException as error:  # told to whoever waits
        future.set_exception(error)


def _launch(port: int, timeout: float) -> str:
    """Start the server and wait until it answers; its API's URL."""
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    embedded = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"} | UNSEEN
    app = ["--app-dir", str(prefect.__module_path__.parent), "--factory", "prefect.server.api.server:create_app"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    log = PREFECT_HOME.value() / "thinkimg-server.log"
    argv = [sys.executable, "-m", "uvicorn", *app, *where]
    child = spawn(argv, name="prefect", env=os.environ | embedded | settings, log_path=log)
    # It has nothing to finish that anybody would miss, and takes its time.
    atexit.register(child.terminate, timeout=1.0)
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
    return f"http://127.0.0.1:{port}/api"
