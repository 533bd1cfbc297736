"""Some trajectories of each iteration as MLflow traces: the conversation with images, and its rewards as feedback."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thinkimg.images.coordinates import Frame, taken_box
from thinkimg.images.patches import PATCH
from thinkimg.records import Sample, StopReason, Trajectory, Turn, TurnKind
from thinkimg.tracking.connection import Connection, load_mlflow

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_SIDE = 1024  # of a shown image, in pixels
LOSSLESS_PIXELS = 512 * 512  # up to here PNG, above JPEG
CALL = re.compile(r"<tool>.*?(</tool>|$)|<tool_call>.*?(</tool_call>|$)", re.DOTALL)
KEY = "thinkimg.trace"

Scores = Mapping[str, Mapping[str, float | None]]
"""Trajectory id -> component -> value in [0, 1], None where missing; `total` is the mix."""


def select(trajectories: Sequence[Trajectory], scores: Scores, count: int) -> list[tuple[Trajectory, str]]:
    """(trajectory, why) of at most `count`: best and worst total, the largest spread of components, then random ones.

    Equal input gives equal choices (random is by hash of the id), so that a later sync adds nothing else.
    """

    def draw(row: Trajectory) -> str:
        return hashlib.sha256(row.trajectory_id.encode()).hexdigest()

    def total(row: Trajectory) -> float:
        return scores[row.trajectory_id]["total"]

    def spread(row: Trajectory) -> float:
        values = [v for name, v in scores[row.trajectory_id].items() if name != "total" and v is not None]
        return max(values) - min(values) if values else 0.0

    rows = sorted(trajectories, key=draw)
    scored = [
        row
        for row in rows
        if row.stop != StopReason.FAILED and scores.get(row.trajectory_id, {}).get("total") is not None
    ]
    chosen: dict[str, tuple[Trajectory, str]] = {}
    for why, order in (("best", lambda row: -total(row)), ("worst", total), ("disagreeing", lambda row: -spread(row))):
        left = [row for row in scored if row.trajectory_id not in chosen]
        if left:
            row = min(left, key=order)
            chosen[row.trajectory_id] = row, why
    for row in rows:
        chosen.setdefault(row.trajectory_id, (row, "random"))
    return list(chosen.values())[:count]


def log_traces(
    connection: Connection,
    run_id: str,
    step: int,
    trajectories: Sequence[Trajectory],
    images: Callable[[str], "Image"],
    scores: Scores,
    samples: Mapping[str, Sample],
    *,
    count: int,
    system: str | None = None,
    reasons: Mapping[tuple[str, str], str] | None = None,
    known: Collection[str] | None = None,
) -> int:
    """Log `count` of the trajectories of one step under a run; returns how many were missing.

    images: pixel hash -> RGB image, called for chosen trajectories only. samples: by id. system: the system prompt.
    reasons: (trajectory id, component) -> why the value is what it is. known: keys of the traces that the run has, if
    they have been looked up. Raises RuntimeError if traces did not arrive, which MLflow itself only logs.
    """
    known = trace_keys(connection, run_id, step) if known is None else known
    chosen = {
        trace_key(run_id, step, row.trajectory_id): (row, why) for row, why in select(trajectories, scores, count)
    }
    missing = {key: entry for key, entry in chosen.items() if key not in known}
    for key, (row, why) in missing.items():
        log_trace(
            connection,
            run_id,
            {
                KEY: key,
                "step": str(step),
                "why": why,
                "trajectory": row.trajectory_id,
                "sample": row.sample_id,
                "stop": row.stop,
            },
            row,
            images,
            scores.get(row.trajectory_id, {}),
            samples[row.sample_id],
            system,
            reasons or {},
        )
    if missing:
        load_mlflow().flush_trace_async_logging()  # nothing waits unless someone has turned it on before we came
        lost = set(missing) - trace_keys(connection, run_id, step)
        if lost:
            raise RuntimeError(f"{len(lost)} of {len(missing)} traces did not arrive")
    return len(missing)


def trace_key(run_id: str, step: int, trajectory_id: str) -> str:
    return f"{run_id}/{step}/{trajectory_id}"


def trace_keys(connection: Connection, run_id: str, step: int | None = None) -> set[str]:
    """Keys of the traces that a run has, of one step or of all: of all it takes longer with each step that it has."""
    keys, token = set(), None
    while True:
        page = connection.client.search_traces(
            locations=[connection.loops],
            run_id=run_id,
            filter_string=None if step is None else f"tags.step = '{step}'",
            include_spans=False,
            max_results=500,
            page_token=token,
        )
        keys |= {trace.info.tags.get(KEY) for trace in page}
        token = page.token
        if not token:
            return keys


def log_trace(
    connection: Connection,
    run_id: str,
    tags: Mapping[str, str],
    row: Trajectory,
    images: Callable[[str], "Image"],
    values: Mapping[str, float | None],
    sample: Sample,
    system: str | None,
    reasons: Mapping[tuple[str, str], str],
) -> None:
    """One trace, with its feedback in it from the start."""
    mlflow = load_mlflow()
    from mlflow.entities import AssessmentSource, SpanType
    from mlflow.entities.trace_location import MlflowExperimentLocation

    messages = conversation(row, sample, images, system)
    last = messages.pop() if messages[-1]["role"] == "assistant" else None
    mlflow.set_tracking_uri(connection.uri)  # global state: another connection may have been opened since
    with mlflow.start_span(
        f"step {tags['step']} {tags['why']}",
        SpanType.CHAT_MODEL,
        run_id=run_id,
        trace_destination=MlflowExperimentLocation(connection.loops),
    ) as span:
        asked = f"{tags['why']} of step {tags['step']}: {sample.question}"
        mlflow.update_current_trace(
            dict(tags),
            request_preview=asked,
            response_preview=row.answer if row.answer is not None else f"({row.stop})",
        )
        span.set_inputs({"messages": messages})
        span.set_outputs({"choices": [{"index": 0, "message": last, "finish_reason": "stop"}]} if last else None)
        span.set_attributes(
            {
                "answer": sample.answer,
                "policy": row.policy,
                "weights": row.weights,
                "tokens": len(row.tokens),
                "error": row.error,
            }
        )
        for name, value in values.items():
            if value is not None:
                mlflow.log_feedback(
                    trace_id=span.trace_id,
                    name=name,
                    value=round(value, 6),
                    source=AssessmentSource("CODE", "thinkimg"),
                    rationale=reasons.get((row.trajectory_id, name)),
                )


def conversation(
    row: Trajectory, sample: Sample, images: Callable[[str], "Image"], system: str | None
) -> list[dict[str, Any]]:
    """The trajectory as chat messages in OpenAI's form, images as data URIs in the order of the conversation.

    Before the image of a successful crop or zoom comes the image that it was taken from, with the box drawn on it.
    """
    sizes = [
        f"Image {number}: {wide * PATCH}x{high * PATCH} pixels."
        for number, (_, high, wide) in enumerate(row.grids[: len(sample.images)])
    ]
    choices = [f"Choices: {', '.join(sample.choices)}."] if sample.choices else []
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append(
        {
            "role": "user",
            "content": [
                *(shown(images(image)) for image in sample.images),
                text_part(" ".join([*sizes, sample.question, *choices])),
            ],
        }
    )
    for number, turn in enumerate(row.turns):
        if turn.kind != TurnKind.TOOL:
            messages.append({"role": "assistant", "content": turn.text})
            if turn.observation:
                messages.append({"role": "user", "content": turn.observation})
            continue
        call = {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": turn.tool or "?", "arguments": turn.args or "{}"},
        }
        messages.append({"role": "assistant", "content": CALL.sub("", turn.text).strip(), "tool_calls": [call]})
        said = turn.observation or turn.error or ""
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": said})
        came = pictures(row, turn, images)
        if came:  # MLflow's chat view shows no images in a tool's message; to the model it is one user turn anyway
            messages.append({"role": "user", "content": came})
    return messages


def pictures(row: Trajectory, turn: Turn, images: Callable[[str], "Image"]) -> list[dict[str, Any]]:
    """The image that came back from a tool call, after the one that it was taken from, as parts of a message."""
    if turn.image is None:
        return []
    _, high, wide = row.grids[turn.source]
    source, view, result = images(row.images[turn.source]), (wide * PATCH, high * PATCH), images(turn.image)
    parts = [text_part(f"Result, {result.width}x{result.height} pixels:"), shown(result)]
    box = taken_box(turn.tool, json.loads(turn.args), view)
    if box is None:
        return parts
    box = Frame(source.size, view).box_to_full(box)
    where = f"Taken from image {turn.source}, {source.width}x{source.height} pixels, at {box}:"
    return [text_part(where), shown(with_box(source, box)), *parts]


def with_box(image: "Image", box: tuple[int, int, int, int]) -> "Image":
    """A copy with a white-rimmed red frame around the box (right and bottom exclusive), outside of what was taken."""
    from PIL import ImageDraw

    copy = image.convert("RGB")
    draw, width = ImageDraw.Draw(copy), max(1, max(copy.size) // 250)
    for ring in range(3 * width):
        color = "red" if width <= ring < 2 * width else "white"
        draw.rectangle((box[0] - ring - 1, box[1] - ring - 1, box[2] + ring, box[3] + ring), outline=color)
    return copy


def shown(image: "Image") -> dict[str, Any]:
    """An image part of a message: at most LONGEST_SIDE pixels, small ones without loss."""
    if max(image.size) > LONGEST_SIDE:
        image = image.copy()
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    kind = "png" if image.width * image.height <= LOSSLESS_PIXELS else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
