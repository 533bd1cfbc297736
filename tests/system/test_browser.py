"""MLflow as people see it: a headless Chromium on a real `mlflow server`.

THINKIMG_SCREENSHOTS=directory keeps the pictures.
"""

import shlex
import socket
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import tracking_store
from chromium import Chromium, screenshot_folder, wait
from tracking_store import MIXES, run_loop, settings

from thinkimg.process import spawn
from thinkimg.tracking.loop import compare_link, sync_store, ui_command

pytestmark = pytest.mark.long

store = tracking_store.store
COMPARED = ("eval/accuracy", "reward/answer", "reward/format", "reward/tool")


@pytest.fixture
def shots(tmp_path):
    return screenshot_folder(tmp_path / "screenshots")


@pytest.fixture
def served(store, tmp_path):
    """Two mixes that start from the same rollouts, and what `thinkimg track ui` shows: (their trackers, address)."""
    trackers = [run_loop(store, settings(store, mix)) for mix in MIXES]
    sync_store(store)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = settings(store).where
    argv = shlex.split(ui_command(where.store, where.tracking))
    argv[argv.index("5000")] = str(port)
    with spawn(["env", *argv], name="mlflow", log_path=tmp_path / "mlflow.log") as server:
        address = f"http://127.0.0.1:{port}"
        wait(lambda: answers(f"{address}/health"), "MLflow", server.log_tail)
        yield trackers, address


@pytest.fixture
def browser(tmp_path):
    with Chromium(tmp_path) as browser:
        yield browser


def answers(url):
    try:
        return urlopen(url).status == 200
    except URLError:
        return False


def found(path):
    """The first element at an XPath."""
    return f"document.evaluate({path!r}, document, null, XPathResult.FIRST_ORDERED_NODE_TYPE).singleNodeValue"


def test_two_mixes_overlay(served, store, browser, shots):
    """By two clicks in the list of experiments, and by the link that `thinkimg track ui` prints."""
    trackers, address = served

    def lines(*keys):
        return [f"{tracker.record.name} ({key})" for tracker in trackers for key in keys]

    browser.open(f"{address}/#/experiments")
    browser.click(found('//*[text()="Model training"]'))
    browser.click(found('//*[text()="thinkimg"]'))
    browser.click(found('//input[@name="runs-view-mode" and @value="CHART"]/..'))
    browser.wait_for("2 matching runs", *lines("eval/accuracy"))
    browser.open("about:blank")
    where = settings(store).where
    browser.open(compare_link(where.store, where.tracking).replace("http://127.0.0.1:5000", address))
    browser.wait_for("Compare mixes", "2 matching runs", *lines(*COMPARED))
    shown = browser.text()
    places = [shown.index(f"({key})") for key in COMPARED]
    assert places == sorted(places) and "(reward/total)" not in shown[: places[-1]], "the comparable ones come first"
    browser.screenshot(shots / "mixes.png")


def test_a_trace_is_a_chat_with_its_images_and_rewards(served, browser, shots):
    (tracker, _), address = served
    client, loops, run = tracker.connection.client, tracker.connection.loops, tracker._run.run_id
    (trace,) = (
        trace
        for trace in client.search_traces(locations=[loops], run_id=run)
        if (trace.info.tags["why"], trace.info.tags["step"]) == ("best", "1")
    )
    browser.open(f"{address}/#/experiments/{loops}/runs/{run}/traces?workflowType=machine_learning")
    whys = [f"{why} of step {step}" for why in ("best", "worst", "disagreeing") for step in (1, 2)]
    browser.wait_for(*whys)
    row = browser.text().split("best of step 1", 1)[1].splitlines()
    values = {feedback.name: f"{round(feedback.value, 3):g}" for feedback in trace.info.assessments}
    assert {"answer", "format", "tool", "total"} == set(values) and set(values.values()) <= set(row[:8]), row
    browser.screenshot(shots / "traces.png")
    browser.click(found('//*[contains(text(), "best of step 1")]'))
    chat = ["Which way do the stripes run?", "Too fine to see.", "crop_image", "The image is 56 x 42 pixels."]
    chat += ["Taken from image 0, 224x168 pixels, at (56, 28, 112, 70):", "Result, 56x42 pixels:", "Error: unreadable"]
    browser.wait_for(*chat, "<answer>left</answer>")
    places = [browser.text().rindex(text) for text in chat]
    assert places == sorted(places)
    sizes = (
        "[...document.images].map(image => [image.naturalWidth, image.naturalHeight])"
        ".filter(size => size[1] in {168: 0, 42: 0})"
    )
    wait(lambda: browser.run(sizes) == [[224, 168], [224, 168], [56, 42]], "three images", lambda: browser.run(sizes))
    browser.screenshot(shots / "trace.png")
