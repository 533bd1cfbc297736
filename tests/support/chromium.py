"""A headless Chromium over its DevTools protocol: open a page, wait for what it shows, click, take a screenshot."""

import base64
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from urllib.request import urlopen

from websockets.sync.client import connect

from thinkimg.process import spawn

SIZE = (1600, 1500)
PATIENCE_S = 240.0  # the first load of a large page on two busy cores


class Chromium:
    """Context manager: one browser with one page, its profile in `home`; nothing of it is left afterwards."""

    def __init__(self, home: Path):
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        assert program, "there is no Chromium: `make test-all` installs it, or `apt-get install chromium`"
        width, height = SIZE
        self._home, self._number = home / "profile", 0
        self._child = spawn(
            [
                program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--window-size={width},{height}",
                "--remote-debugging-port=0", "--disable-dev-shm-usage", f"--user-data-dir={self._home}", "about:blank",
            ],
            name="chromium", env=os.environ | {"HOME": str(home)}, log_path=home / "chromium.log",
        )  # fmt: skip
        told = self._home / "DevToolsActivePort"
        wait(lambda: told.exists() and told.read_text().count("\n"), "Chromium's port")
        port = told.read_text().split()[0]
        (page,) = (one for one in json.load(urlopen(f"http://127.0.0.1:{port}/json/list")) if one["type"] == "page")
        self._socket = connect(page["webSocketDebuggerUrl"], max_size=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._child.terminate()

    def call(self, method: str, **params: Any) -> dict:
        """A command of the protocol and its answer; events are passed over."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while (answer := json.loads(self._socket.recv(PATIENCE_S))).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, script: str) -> Any:
        """The JSON value of a JavaScript expression on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def text(self) -> str:
        """What a person can read on the page."""
        return self.run("document.body ? document.body.innerText : ''")

    def wait_for(self, *texts: str) -> None:
        """Until all of the texts can be read."""
        wait(lambda: all(text in self.text() for text in texts), f"{texts} on the page", self.text)

    def click(self, script: str) -> None:
        """A real click in the middle of the element that an expression finds, as soon as it is there."""
        box = f"(e => e && (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().toJSON()))({script})"
        wait(lambda: (self.run(box) or {}).get("width"), f"{script} on the page", self.text)
        place = self.run(box)
        at = {
            "x": place["x"] + place["width"] / 2,
            "y": place["y"] + place["height"] / 2,
            "button": "left",
            "clickCount": 1,
        }
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **at)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def screenshot_folder(otherwise: Path) -> Path:
    """The folder that THINKIMG_SCREENSHOTS names, or the other one; it is made."""
    folder = Path(os.environ.get("THINKIMG_SCREENSHOTS", otherwise))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wait(condition: Callable[[], Any], what: str, shown: Callable[[], str] = str) -> None:
    """Until the condition holds; AssertionError with what is shown instead after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what}, but:\n{shown()}"
        time.sleep(0.1)
