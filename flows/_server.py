"""Embedded Prefect server, used where no API is configured: under our watchdog, started by one process at a time.

Prefect's own embedded server outlives a SIGKILL of its parent, and costs three seconds of imports. Several that create
or migrate one database at once crash now and then (seen with Prefect 3.7).
"""

import atexit
import os
import re
import secrets
import ssl
import sys
import threading
import time
from concurrent.futures import Future, wait

import flows._environment  # noqa: F401

import prefect
from prefect.context import refresh_global_settings_context
from prefect.settings import (
    PREFECT_API_SSL_CERT_FILE,
    PREFECT_API_TLS_INSECURE_SKIP_VERIFY,
    PREFECT_API_URL,
    PREFECT_HOME,
    get_current_settings,
)
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS as STARTUP_TIMEOUT

from thinkimg import console
from thinkimg.disk import writing
from thinkimg.environment import child_environment, is_healthy
from thinkimg.errors import UserError, shorten
from thinkimg.process import free_port, spawn
from thinkimg.store import files

# Services that write for Prefect's UI, which an embedded server lacks. While they wrote the tasks of a scoring, SQLite
# answered the next flow with 503, which costs the client two seconds each time (seen with Prefect 3.7).
SERVICES_OFF = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED": "0",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "0",
}
NO_CREDENTIALS = {"PREFECT_API_KEY": "", "PREFECT_CLIENT_CUSTOM_HEADERS": "{}"}  # they are another API's
ERROR = re.compile(r"cannot start |(\w+\.)*\w*(Error|Exception): ")  # the first is the watchdog's

ANNOUNCE_S = 3.0  # of waiting, before it is announced

_own: Future | None = None
"""The settings with which this process's embedded server is reached, once it answers."""


def is_embedded() -> bool:
    """Tell whether this process has an embedded server, which nobody else sees."""
    return _own is not None or not PREFECT_API_URL.value()


class PrefectUnavailable(RuntimeError):
    """Failure of Prefect's server to start or to answer; the message is one sentence."""


def start_server() -> None:
    """Start the embedded server if one is needed and none runs; does not wait for it."""
    global _own
    check_certificates()
    if _own is None and not PREFECT_API_URL.value():
        _own = Future()
        threading.Thread(target=_settle, args=[_own], name="prefect-server", daemon=True).start()


def use_server() -> None:
    """Point this process and its children to an API: the configured one, or the embedded server once it answers."""
    start_server()
    if not PREFECT_API_URL.value():
        if not wait([_own], timeout=ANNOUNCE_S).done:
            console.note("waiting for Prefect's server to start")
        os.environ.update(_own.result())
        refresh_global_settings_context()


def check_certificates() -> None:
    """Raise UserError for certificates that Prefect's client could not read, which it does for any address."""
    path = PREFECT_API_SSL_CERT_FILE.value()
    if path is None or PREFECT_API_TLS_INSECURE_SKIP_VERIFY.value():
        return
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        message = f"The certificates that PREFECT_API_SSL_CERT_FILE names can't be used: {path}."
        raise UserError(message, hint="Correct it, or unset it.") from error


def _settle(future: Future) -> None:
    try:
        home = PREFECT_HOME.value()
        with writing(home, hint="Set PREFECT_HOME to a directory that this user can write to."):
            home.mkdir(parents=True, exist_ok=True)
        with files.locked(home / "thinkimg-server.lock"):
            future.set_result(_launch(free_port(), STARTUP_TIMEOUT.value()))
    except BaseException as error:  # raised by `use_server`
        future.set_exception(error)


def _launch(port: int, timeout: float) -> dict[str, str]:
    """Start the server, wait until it answers, and return the settings of its clients."""
    password = f"thinkimg:{secrets.token_urlsafe()}"  # in place of the user's, which are for another server
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    embedded = {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_API_BASE_PATH": "/api",
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_API_AUTH_STRING": password,
    }
    environment = child_environment("prefect", os.environ, SERVICES_OFF | settings | embedded | NO_CREDENTIALS)
    app = ["--app-dir", str(prefect.__module_path__.parent), "--factory", "prefect.server.api.server:create_app"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    log = PREFECT_HOME.value() / "thinkimg-server.log"
    argv = [sys.executable, "-m", "uvicorn", *app, *where]
    child = spawn(argv, name="prefect", env=environment, log_path=log)
    # A slow shutdown saves nothing: its records are of no use without a UI.
    atexit.register(child.terminate, timeout=1.0)
    deadline = time.monotonic() + timeout
    while not is_healthy(f"http://127.0.0.1:{port}/api/health"):
        if not child.alive or time.monotonic() > deadline:
            problem = "did not start in time" if child.alive else "ended"
            child.terminate()
            causes = [line for line in child.log_tail(200).splitlines() if ERROR.match(line)]
            cause = f" ({shorten(causes[-1], 300)})" if causes else ""
            raise PrefectUnavailable(
                f"Prefect's embedded server {problem}{cause}. Hint: read {log}; its database is in {log.parent}"
            )
        time.sleep(0.1)
    return {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_API_AUTH_STRING": password} | NO_CREDENTIALS
