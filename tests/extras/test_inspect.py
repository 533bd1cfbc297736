"""`thinkimg view` with Inspect itself: `make test-inspect` runs this in an environment of its own."""

import base64
import io
import json
import math
import os
import socket
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from chromium import Chromium, screenshot_folder, wait
from ledger_store import settings
from PIL import Image
from viewed_store import HOSTILE, ViewedStore

from thinkimg.analysis.inspect_log import write_log
from thinkimg.analysis.view import View
from thinkimg.cli import main as cli
from thinkimg.images.decode import pixel_hash
from thinkimg.process import spawn
from thinkimg.stages.score import summarise_scores
from thinkimg.store.artifacts import Store

pytestmark = pytest.mark.extra

LEAF = "[...document.querySelectorAll('*')].find(e => !e.children.length && /^{}$/i.test(e.textContent.trim()))"
SIZES = "[...document.images].map(image => [image.naturalWidth, image.naturalHeight])"


@pytest.fixture(scope="module")
def viewed(tmp_path_factory):
    root = tmp_path_factory.mktemp("viewed") / "store"
    return ViewedStore(Store(root), settings(root))


def read(viewed, artifact, folder):
    from inspect_ai.log import read_eval_log

    path = write_log(View(viewed.store, artifact, settings(viewed.store.root)), folder)
    return read_eval_log(str(path), resolve_attachments=True)


@pytest.fixture(scope="module")
def log(viewed, tmp_path_factory):
    return read(viewed, viewed.scores, tmp_path_factory.mktemp("logs"))


def pictures(message) -> list[Image.Image]:
    parts = message.content if isinstance(message.content, list) else []
    sources = [part.image for part in parts if part.type == "image"]
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB") for source in sources]


def test_a_sample_per_trajectory_its_epoch_the_place_in_its_group(viewed, log):
    assert log.status == "success" and log.eval.config.epochs == 5 and len(log.samples) == len(viewed.rows)
    places = {(sample.uuid, sample.id, sample.epoch - 1) for sample in log.samples}
    assert places == {(row.trajectory_id, row.sample_id, row.index) for row in viewed.rows}
    failed = [sample for sample in log.samples if sample.error]
    assert [sample.error.message for sample in failed] == ["The engine broke."] * 3
    assert {sample.epoch for sample in failed} == {5}


def test_the_images_are_those_of_the_conversation_by_hash(viewed, log):
    rows = {row.trajectory_id: row for row in viewed.rows}
    for sample in log.samples:
        row = rows[sample.uuid]
        shown = [pixel_hash(image) for message in sample.messages for image in pictures(message)]
        assert [shown[0], shown[2]] == list(row.images) == sample.metadata["images"]
        assert len(shown) == 3, "between them the source with the box"
        tool = next(message for message in sample.messages if message.role == "tool")
        assert len(pictures(tool)) == 2 and tool.function == "crop_image"
        assert any("at (112, 56, 280, 168)" in part.text for part in tool.content if part.type == "text")


def test_turns_are_thought_call_and_answer(viewed, log):
    sample = next(sample for sample in log.samples if sample.uuid == "t-s-red-0")
    roles = [message.role for message in sample.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    call, answer = (message for message in sample.messages if message.role == "assistant")
    assert call.content[0].reasoning == f"Too small. {HOSTILE}" and call.tool_calls[0].arguments["width"] == 84
    assert [part.text for part in answer.content[1:]] == ["<answer>red</answer>"]
    assert sample.target == ["red"] and sample.scores["answer"].answer == "red"


def test_scores_have_values_reasons_judgements_and_means_as_the_store_has_them(viewed, log):
    stored = {row["trajectory_id"]: row for row in viewed.scores.rows()}
    for sample in log.samples:
        for name in viewed.scores.components:
            score, column = sample.scores[name], stored[sample.uuid][name]
            value = score.as_float()
            assert math.isnan(value) if column["value"] is None else value == column["value"]
            assert (column["reason"] or "") in (score.explanation or "")
            if column["evidence"]:
                assert score.metadata["evidence"] == json.loads(column["evidence"])
                assert score.metadata["judgements"][0]["model"] == "judge" and "by self (judge)" in score.explanation
    means = summarise_scores(viewed.scores.table_files("scores"), viewed.scores.components)
    results = {score.name: score for score in log.results.scores}
    for name in viewed.scores.components:
        assert results[name].metrics["mean"].value == pytest.approx(means[f"reward/{name}"])
        assert results[name].unscored_samples == means[f"missing/{name}"]


def test_the_advantage_is_that_of_the_policy_that_was_trained(viewed, log):
    advantages = viewed.policy.advantages()
    for sample in log.samples:
        stored = advantages[sample.uuid]
        assert sample.scores["advantage"].value == stored["advantage"]
        assert sample.scores["total"].value == stored["total"]
        assert f"policy/{viewed.policy.short}" in sample.scores["advantage"].explanation
        assert sample.scores["advantage"].metadata["reason"] == stored["reason"]


def test_an_evaluation_has_its_accuracy_and_its_pictures(viewed, tmp_path):
    evaluation = viewed.evaluation(1, ("red", "green", None))
    log = read(viewed, evaluation, tmp_path)
    right = next(score for score in log.results.scores if score.name == "right")
    assert right.metrics["accuracy"].value == viewed.accuracy(evaluation) == 1.0
    assert right.metrics["mean"].value == 2 / 5 and right.unscored_samples == 1
    assert all(len([p for m in sample.messages for p in pictures(m)]) == 3 for sample in log.samples)


def test_inspect_view_shows_turns_images_and_scores(viewed, tmp_path, capsys):
    """THINKIMG_SCREENSHOTS as for tests/system/test_browser.py."""
    folder = tmp_path / "my logs"
    words = ["view", viewed.scores.short, "--log-dir", str(folder), "--set", f"where.store={viewed.store.root}"]
    with pytest.raises(SystemExit):
        cli.app([*words, "--preset", "tiny"], exit_on_error=False)
    said = capsys.readouterr()
    assert Path(said.out.strip()).parent == folder and f"inspect view --log-dir '{folder}'" in said.err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [str(Path(sys.executable).with_name("inspect")), "view", "--log-dir", str(folder), "--port", str(port)]
    shots = screenshot_folder(tmp_path / "shots")
    log, address = tmp_path / "inspect.log", f"http://127.0.0.1:{port}"
    with (
        spawn(argv, name="inspect", env=os.environ | {"HOME": str(tmp_path)}, log_path=log) as server,
        Chromium(tmp_path) as browser,
    ):
        wait(lambda: answers(address), "Inspect", server.log_tail)
        browser.open(f"{address}/#/logs/{Path(said.out.strip()).name}")
        browser.wait_for("15 Samples", "s-green", "ADVANTAGE", "violet")
        browser.screenshot(shots / "inspect_samples.png")
        browser.open("about:blank")
        browser.open(f"{address}/#/logs/{Path(said.out.strip()).name}/samples/sample/s-green/2")
        browser.wait_for("Too small.", "crop_image", "Result, 168x112 pixels:", "<answer>violet</answer>")
        wait(lambda: browser.run(SIZES) == [[560, 392], [560, 392], [168, 112]], "images", lambda: browser.run(SIZES))
        browser.screenshot(shots / "inspect_sample.png")
        browser.click(LEAF.format("scoring"))
        browser.wait_for("advantage", "The answer is not the right one.", "by self (judge)")
        browser.screenshot(shots / "inspect_scores.png")


def answers(url: str) -> bool:
    try:
        return urlopen(url).status == 200
    except URLError:
        return False
