"""Traces: which trajectories are shown, and how the conversation, its images and its rewards look."""

import dataclasses
import json
import math
from collections import Counter

import tracking_store
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tracking_store import COMPONENTS, MIXES, PHOTO, picture, run_loop, sample_of, settings, trajectory_of

from thinkimg.images.decode import pixel_hash
from thinkimg.records import CallStatus, StopReason, Turn, TurnKind
from thinkimg.tracking.records import load_record
from thinkimg.tracking.traces import Candidate, chat_messages, draw_box, select_trajectories

store = tracking_store.store


def test_trace_shows_the_conversation(store):
    tracker = run_loop(store, settings(store, traces=1), iterations=1)
    connection = tracker.connection
    (trace,) = connection.client.search_traces(locations=[connection.loops], run_id=tracker._run.run_id)
    (span,) = trace.data.spans
    messages = span.inputs["messages"]
    assert messages[0]["role"] == "system" and "crop_image" in messages.pop(0)["content"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user", "assistant", "user"]
    assert messages[0]["content"][1]["text"] == (
        "Image 0: 224x168 pixels. Which way do the stripes run?\nA. left\nB. right\n"
        "Answer with the letter or the text of one option."
    )
    assert messages[1]["content"] == "<think>Too fine to see.</think>"
    assert json.loads(messages[1]["tool_calls"][0]["function"]["arguments"])["width"] == 56
    assert messages[2]["content"] == "The image is 56 x 42 pixels."
    assert [part["type"] for part in messages[3]["content"]] == ["text", "image_url"] * 2
    assert span.outputs["choices"][0]["message"]["content"].endswith("<answer>left</answer>")
    files = [path for path in (store.root / "mlartifacts").rglob("*") if path.is_file()]
    sizes = Counter(Image.open(path).size for path in files if path.read_bytes()[:4] == b"\x89PNG")
    assert sizes == {PHOTO: 2, (56, 42): 1}  # the question's image, again with the box, and the crop
    row = load_record(store, tracker.record.loop_id).iteration(1)
    scores = {r["trajectory_id"]: r for r in store.resolve(row.artifacts["score"]).table("scores").to_pylist()}
    best = max(scores.values(), key=lambda r: sum(MIXES[0][name] * r[name]["value"] for name in COMPONENTS))
    assert trace.info.tags["trajectory"] == best["trajectory_id"]
    feedback = {a.name: (a.value, a.rationale) for a in trace.info.assessments}
    assert feedback["answer"] == (best["answer"]["value"], 'as planned; {"n": 1}') and set(feedback) == {
        *COMPONENTS,
        "total",
    }


@given(st.lists(st.tuples(st.none() | st.floats(0, 1), st.floats(0, 1), st.booleans()), max_size=9), st.integers(0, 9))
def test_selection(values, count):
    """At most `count` different ones; best and worst first; the order in which they come changes nothing."""
    rows = [
        Candidate(f"t{number}", failed, math.nan if total is None else total, spread)
        for number, (total, spread, failed) in enumerate(values)
    ]
    chosen = select_trajectories(rows, count)
    assert len({name for name, _ in chosen}) == len(chosen) == min(count, len(rows))
    assert chosen == select_trajectories(rows[::-1], count)
    scored = {row.trajectory_id: row.total for row in rows if not row.failed and not math.isnan(row.total)}
    for name, why in chosen:
        assert why not in ("best", "worst", "disagreeing") or name in scored
        assert why != "best" or scored[name] == max(scored.values())
        assert why != "worst" or len(scored) < 2 or scored[name] == min(scored.values())


def test_box_frames_what_was_taken():
    image = Image.new("RGB", (100, 80))
    framed = draw_box(image, (20, 30, 40, 50))
    assert framed.crop((20, 30, 40, 50)).tobytes() == image.crop((20, 30, 40, 50)).tobytes(), "outside, not over it"
    assert [framed.getpixel((18, y)) for y in (29, 40)] == [(255, 0, 0)] * 2 and image.getbbox() is None


def test_zoom_and_failed_trajectories_can_be_shown():
    photo = picture(1)
    sample = sample_of(0, photo)
    row = trajectory_of(sample, 0, photo)
    zoom = Turn(
        "<tool>",
        TurnKind.TOOL,
        "zoom_image",
        '{"factor": 2, "center_x": 0, "center_y": 0}',
        CallStatus.OK,
        None,
        0,
        pixel_hash(photo),
        None,
        5,
    )
    wrong = Turn("<tool>", TurnKind.TOOL, "crop_image", None, CallStatus.ERROR, "x is missing", tokens=5)
    shown = chat_messages(dataclasses.replace(row, turns=(zoom, wrong)), sample, lambda _: photo, "Be brief.")
    assert [part["type"] for part in shown[4]["content"]] == ["text", "image_url"] * 2
    assert shown[-1]["content"] == "x is missing" and shown[0]["role"] == "system"
    failed = dataclasses.replace(row, turns=(), stop=StopReason.FAILED, error="engine gone")
    assert [message["role"] for message in chat_messages(failed, sample, lambda _: photo, None)] == ["user"]
