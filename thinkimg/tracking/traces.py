"""MLflow traces of some trajectories: the conversation with its images, and the rewards as feedback."""

import base64
import hashlib
import io
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import ImageDraw
from PIL.Image import Image

from thinkimg.conversation.question import state_question
from thinkimg.conversation.regions import source_box
from thinkimg.records import Sample, Trajectory, Turn, TurnKind
from thinkimg.tracking.connection import Connection, load_mlflow, read_pages
from thinkimg.tracking.sink import encode_name, valid_tags, valid_text

log = logging.getLogger(__name__)

LONGEST_SIDE = 1024  # of a shown image, in pixels
LOSSLESS_PIXELS = 512 * 512  # up to here PNG, above JPEG
CALL = re.compile(r"<tool>.*?(</tool>|$)|<tool_call>.*?(</tool_call>|$)", re.DOTALL)
KEY = "thinkimg.trace"
WORKING_DIRECTORYS = tuple(f"mlflow.source.git.{name}" for name in ("commit", "branch", "repoURL"))
"""Metadata that MLflow reads from the repository around the working directory, which is none of ours."""


@dataclass(frozen=True)
class TraceData:
    """Trajectories of one step that become traces, with all that they show."""

    chosen: list[tuple[Trajectory, str]]
    """(trajectory, reason of the choice)."""
    images: Callable[[str], Image]
    """Pixel hash -> RGB image."""
    scores: Mapping[str, Mapping[str, float | None]]
    """Trajectory id -> component -> value in [0, 1], None where missing; `total` is the mix."""
    samples: Mapping[str, Sample]
    """By id."""
    reasons: Mapping[tuple[str, str], str]
    """(trajectory id, component) -> reason of the value."""
    tools: tuple[str, ...] | None
    """`conversation.tools` of the trajectories."""
    system: str | None
    """System prompt."""


class Candidate(NamedTuple):
    """A trajectory that may become a trace."""

    trajectory_id: str
    failed: bool
    total: float
    """Its mix; NaN where there is none."""
    spread: float
    """Largest minus smallest component."""


def select_trajectories(candidates: Iterable[Candidate], count: int) -> list[tuple[str, str]]:
    """Return (trajectory id, reason) of at most `count`: best, worst, the largest spread of components, then random.

    Equal input gives equal choices (random is by hash of the id), so that a later sync adds no others.
    """
    rows = sorted(candidates, key=lambda row: hashlib.sha256(row.trajectory_id.encode()).digest())
    scored = [row for row in rows if not row.failed and not math.isnan(row.total)]
    chosen: dict[str, str] = {}
    orders = (
        ("best", lambda row: -row.total),
        ("worst", lambda row: row.total),
        ("disagreeing", lambda row: -row.spread),
    )
    for why, order in orders:
        others = [row for row in scored if row.trajectory_id not in chosen]
        if others:
            chosen[min(others, key=order).trajectory_id] = why
    for row in rows[: count + len(chosen)]:
        chosen.setdefault(row.trajectory_id, "random")
    return list(chosen.items())[:count]


def log_traces(connection: Connection, run_id: str, step: int, data: TraceData, existing: Collection[str]) -> int:
    """Log the trajectories of one step under a run, and return the number of those that were missing.

    existing: keys of the traces that the run has. Raises RuntimeError if traces did not arrive, which MLflow only logs.
    """
    keys = {trace_key(run_id, step, row.trajectory_id): (row, why) for row, why in data.chosen}
    missing = {key: entry for key, entry in keys.items() if key not in existing}
    refused = set()
    for key, (row, why) in missing.items():
        tags = {KEY: key, "step": str(step), "why": why, "trajectory": row.trajectory_id}
        try:
            messages = chat_messages(row, data.samples[row.sample_id], data.images, data.system, data.tools)
        except Exception as error:  # of an image or a tool: one odd row costs its own trace
            log.warning("Trajectory %s can't be shown: %s: %s", row.trajectory_id, type(error).__name__, error)
            refused.add(key)
            continue
        tags |= {"sample": row.sample_id, "stop": row.stop}
        log_trace(connection, run_id, valid_tags(tags), messages, row, data)
    if missing:
        load_mlflow().flush_trace_async_logging()  # waits only if asynchronous logging was turned on elsewhere
        lost = set(missing) - refused - trace_keys(connection, run_id, step)
        if lost:
            raise RuntimeError(f"{len(lost)} of {len(missing)} traces did not arrive")
    return len(missing) - len(refused)


def trace_key(run_id: str, step: int, trajectory_id: str) -> str:
    return valid_text(f"{run_id}/{step}/{trajectory_id}")


def trace_keys(connection: Connection, run_id: str, step: int | None = None) -> set[str]:
    """Return the keys of a run's traces, of one step or of all; the time for all grows with the number of steps."""
    traces = read_pages(
        connection.client.search_traces,
        locations=[connection.loops],
        run_id=run_id,
        filter_string=None if step is None else f"tags.step = '{step}'",
        include_spans=False,
        max_results=500,
    )
    return {trace.info.tags.get(KEY) for trace in traces}


def log_trace(
    connection: Connection,
    run_id: str,
    tags: Mapping[str, str],
    messages: list[dict[str, Any]],
    row: Trajectory,
    data: TraceData,
) -> None:
    """Log one trace together with its feedback. messages: see `chat_messages`."""
    mlflow = load_mlflow()
    from mlflow.entities import AssessmentSource, SpanType
    from mlflow.entities.trace_location import MlflowExperimentLocation

    sample = data.samples[row.sample_id]
    last = messages.pop() if messages[-1]["role"] == "assistant" else None
    mlflow.set_tracking_uri(connection.uri)  # global state: another connection may have been opened since
    with mlflow.start_span(
        f"step {tags['step']} {tags['why']}",
        SpanType.CHAT_MODEL,
        run_id=run_id,
        trace_destination=MlflowExperimentLocation(connection.loops),
    ) as span:
        mlflow.update_current_trace(
            dict(tags),
            metadata={"mlflow.source.name": "thinkimg"} | dict.fromkeys(WORKING_DIRECTORYS, ""),
            request_preview=f"{tags['why']} of step {tags['step']}: {sample.question}",
            response_preview=row.answer if row.answer is not None else f"({row.stop})",
        )
        span.set_inputs({"messages": messages})
        span.set_outputs({"choices": [{"index": 0, "message": last, "finish_reason": "stop"}]} if last else None)
        attributes = {"answer": sample.answer, "policy": row.policy, "weights": row.weights}
        span.set_attributes(attributes | {"tokens": len(row.tokens), "error": row.error})
        for name, value in data.scores.get(row.trajectory_id, {}).items():
            if value is not None:
                mlflow.log_feedback(
                    trace_id=span.trace_id,
                    name=encode_name(name),
                    value=round(value, 6),
                    source=AssessmentSource("CODE", "thinkimg"),
                    rationale=data.reasons.get((row.trajectory_id, name)),
                )


def chat_messages(
    row: Trajectory,
    sample: Sample,
    images: Callable[[str], Image],
    system: str | None,
    tools: tuple[str, ...] | None = None,
) -> list[dict[str, Any]]:
    """Return the trajectory as chat messages in OpenAI's form, with images as data URIs.

    Before the image of a crop or zoom comes its source image with the box drawn on it.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    pictures = [image_content(images(image)) for image in sample.images]
    text = text_content(state_question(sample, row.sizes[: len(sample.images)], row.coordinates))
    messages.append({"role": "user", "content": [*pictures, text]})
    for number, turn in enumerate(row.turns):
        if turn.kind != TurnKind.TOOL:
            messages.append({"role": "assistant", "content": turn.text})
            if turn.observation:
                messages.append({"role": "user", "content": turn.observation})
            continue
        function = {"name": turn.tool or "?", "arguments": turn.args or "{}"}
        call = {"id": f"call_{number}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": CALL.sub("", turn.text).strip(), "tool_calls": [call]})
        result = turn.observation or turn.error or ""
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        parts = tool_image_parts(row, turn, images, tools)
        if parts:  # MLflow's chat view shows no images in a tool's message; the model gets one user turn as well
            messages.append({"role": "user", "content": parts})
    return messages


def tool_image_parts(
    row: Trajectory, turn: Turn, images: Callable[[str], Image], tools: tuple[str, ...] | None
) -> list[dict[str, Any]]:
    """Return the image of a tool call as parts of a message, after its source image with the box."""
    if turn.image is None:
        return []
    source, result = images(row.images[turn.source]), images(turn.image)
    parts = [text_content(f"Result, {result.width}x{result.height} pixels:"), image_content(result)]
    box = source_box(row, turn, source.size, tools)
    if box is None:
        return parts
    where = f"Taken from image {turn.source}, {source.width}x{source.height} pixels, at {box}:"
    return [text_content(where), image_content(draw_box(source, box)), *parts]


def draw_box(image: Image, box: tuple[int, int, int, int]) -> Image:
    """Return a copy with a red frame with white rims around the box; right and bottom are exclusive."""
    copy = image.convert("RGB")
    draw, width = ImageDraw.Draw(copy), max(1, max(copy.size) // 250)
    for ring in range(3 * width):
        color = "red" if width <= ring < 2 * width else "white"
        draw.rectangle((box[0] - ring - 1, box[1] - ring - 1, box[2] + ring, box[3] + ring), outline=color)
    return copy


def image_content(image: Image) -> dict[str, Any]:
    """Return an image part of a message: at most LONGEST_SIDE pixels, small images without loss."""
    if max(image.size) > LONGEST_SIDE:
        image = image.copy()
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    kind = "png" if image.width * image.height <= LOSSLESS_PIXELS else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def text_content(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
