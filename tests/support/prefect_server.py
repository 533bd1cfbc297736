"""A Prefect server of its own, its API, and Prefect's command line."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
from paths import REPOSITORY

from thinkimg.process import Child, free_port, spawn

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


class PrefectServer:
    """Context manager; `place` is the project's directory, and holds the database and the logs."""

    def __init__(self, place: Path):
        self.place, self.port = place, free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.environment = os.environ | {
            "PREFECT_HOME": str(place / "prefect"),
            "PREFECT_API_URL": self.url,
            "PWD": str(place),  # what prefect.yaml calls the working directory
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
            "DO_NOT_TRACK": "true",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
            "COLUMNS": "200",
        }

    def __enter__(self) -> "PrefectServer":
        self.server = self.start("server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        try:
            wait_for(lambda: self.server.alive and answers(f"{self.url}/health"), 600)
        except BaseException:
            self.server.terminate()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.server.terminate()

    def start(self, *arguments: str) -> Child:
        """Under our own watchdog: whatever a test leaves running ends with it."""
        command = ["env", "-C", str(self.place), sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        log = self.place / f"{arguments[0]}.log"
        return spawn(command, name=arguments[0], env=self.environment, log_path=log)

    def cli(self, *arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(
            command, cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ask(self, path: str, body: dict | None = None) -> list | dict:
        answer = httpx.request("GET" if body is None else "POST", self.url + path, json=body, timeout=120)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def runs(self, deployment: str) -> list[dict]:
        wanted = {"deployments": {"name": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return self.ask("/flow_runs/filter", wanted)

    def children(self, run: str) -> dict[str, dict]:
        """The sub-flow runs of a flow run, by name, each with the task run that stands for it."""
        found = self.ask("/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}})
        children = {child["name"]: child for child in found}
        assert len(children) == len(found)
        return children

    def artifacts(self, run: str) -> dict[str, dict]:
        found = self.ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
        return {artifact["key"]: artifact for artifact in found}

    def wait(self, run: str, seconds: float) -> dict:
        return wait_for(lambda: (r := self.ask(f"/flow_runs/{run}"))["state_type"] in ENDED and r, seconds)

    def limit(self) -> dict:
        (limit,) = [
            limit
            for limit in self.ask("/v2/concurrency_limits/filter", {})
            if limit["name"].startswith("thinkimg-device-")  # the deployment has one of its own
        ]
        return limit


def wait_for(condition, seconds: float):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.5)
    return found


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
