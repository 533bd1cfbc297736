"""Some trajectories of each iteration as MLflow traces: the conversation with images, and its rewards as feedback."""

import base64
import hashlib
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import ImageDraw
from PIL.Image import Image

from thinkimg.conversation.regions import cut_box, seen_size
from thinkimg.images.coordinates import Frame
from thinkimg.records import Sample, Trajectory, Turn, TurnKind
from thinkimg.tracking.connection import Connection, load_mlflow

LONGEST_SIDE = 1024  # of a shown image, in pixels
LOSSLESS_PIXELS = 512 * 512  # up to here PNG, above JPEG
CALL = re.compile(r"<tool>.*?(</tool>|$)|<tool_call>.*?(</tool_call>|$)", re.DOTALL)
KEY = "thinkimg.trace"

Scores = Mapping[str, Mapping[str, float | None]]
"""Trajectory id -> component -> value in [0, 1], None where missing; `total` is the mix."""


class Candidate(NamedTuple):
    """A trajectory that may be shown. total: its mix; spread: largest minus smallest component; NaN where there is none."""

    trajectory_id: str
    failed: bool
    total: float
    spread: float


def select(candidates: Iterable[Candidate], count: int) -> list[tuple[str, str]]:
    """(trajectory id, why) of at most `count`: best and worst total, the largest spread of components, then random ones.

    Equal input gives equal choices (random is by hash of the id), so that a later sync adds nothing else.
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
        left = [row for row in scored if row.trajectory_id not in chosen]
        if left:
            chosen[min(left, key=order).trajectory_id] = why
    for row in rows[: count + len(chosen)]:
        chosen.setdefault(row.trajectory_id, "random")
    return list(chosen.items())[:count]


def log_traces(
    connection: Connection,
    run_id: str,
    step: int,
    chosen: Sequence[tuple[Trajectory, str]],
    images: Callable[[str], Image],
    scores: Scores,
    samples: Mapping[str, Sample],
    *,
    system: str | None = None,
    reasons: Mapping[tuple[str, str], str] | None = None,
    known: Collection[str] | None = None,
    tools: tuple[str, ...] | None = None,
) -> int:
    """Log trajectories of one step under a run; returns how many were missing.

    chosen: (trajectory, why). images: pixel hash -> RGB image. samples: by id. system: the system prompt.
    reasons: (trajectory id, component) -> why the value is what it is. known: keys of the traces that the run has, if
    they have been looked up. tools: `conversation.tools` of the trajectories. Raises RuntimeError if traces did not arrive,
    which MLflow itself only logs.
    """
    known = trace_keys(connection, run_id, step) if known is None else known
    keys = {trace_key(run_id, step, row.trajectory_id): (row, why) for row, why in chosen}
    missing = {key: entry for key, entry in keys.items() if key not in known}
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
            tools,
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
    images: Callable[[str], Image],
    values: Mapping[str, float | None],
    sample: Sample,
    system: str | None,
    reasons: Mapping[tuple[str, str], str],
    tools: tuple[str, ...] | None,
) -> None:
    """One trace, with its feedback in it from the start."""
    mlflow = load_mlflow()
    from mlflow.entities import AssessmentSource, SpanType
    from mlflow.entities.trace_location import MlflowExperimentLocation

    messages = conversation(row, sample, images, system, tools)
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
    row: Trajectory,
    sample: Sample,
    images: Callable[[str], Image],
    system: str | None,
    tools: tuple[str, ...] | None = None,
) -> list[dict[str, Any]]:
    """The trajectory as chat messages in OpenAI's form, images as data URIs in the order of the conversation.

    Before the image of a successful crop or zoom comes the image that it was taken from, with the box drawn on it.
    """
    views = [seen_size(row, number) for number in range(len(row.grids))[: len(sample.images)]]
    sizes = [f"Image {number}: {wide}x{high} pixels." for number, (wide, high) in enumerate(views)]
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
        came = pictures(row, turn, images, tools)
        if came:  # MLflow's chat view shows no images in a tool's message; to the model it is one user turn anyway
            messages.append({"role": "user", "content": came})
    return messages


def pictures(
    row: Trajectory, turn: Turn, images: Callable[[str], Image], tools: tuple[str, ...] | None
) -> list[dict[str, Any]]:
    """The image that came back from a tool call, after the one that it was taken from, as parts of a message."""
    if turn.image is None:
        return []
    source, result = images(row.images[turn.source]), images(turn.image)
    parts = [text_part(f"Result, {result.width}x{result.height} pixels:"), shown(result)]
    cut = cut_box(row, turn, tools)
    if cut is None:
        return parts
    box = Frame(source.size, seen_size(row, turn.source)).box_to_full(cut)
    where = f"Taken from image {turn.source}, {source.width}x{source.height} pixels, at {box}:"
    return [text_part(where), shown(with_box(source, box)), *parts]


def with_box(image: Image, box: tuple[int, int, int, int]) -> Image:
    """A copy with a white-rimmed red frame around the box (right and bottom exclusive), outside of what was taken."""
    copy = image.convert("RGB")
    draw, width = ImageDraw.Draw(copy), max(1, max(copy.size) // 250)
    for ring in range(3 * width):
        color = "red" if width <= ring < 2 * width else "white"
        draw.rectangle((box[0] - ring - 1, box[1] - ring - 1, box[2] + ring, box[3] + ring), outline=color)
    return copy


def shown(image: Image) -> dict[str, Any]:
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
