"""The rows of every table as frozen dataclasses, and their versioned pyarrow schemas."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from functools import cache
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 2  # raised with any change of a table; part of every fingerprint
PUZZLES = "puzzles"  # the source of the built-in puzzles, whose samples have no columns of a user's
PATCH_1 = 14  # pixels of a patch side in version 1, which knew one family of models


class AnswerType(StrEnum):
    """How an answer is compared with the right one."""

    CHOICE = "choice"  # equal after normalisation, or the letter of the choice
    NUMBER = "number"  # within a relative tolerance
    TEXT = "text"  # ANLS
    BOX = "box"  # intersection over union
    MATHS = "maths"  # equivalent expressions


class Role(StrEnum):
    """Where a token comes from; stored as its index in this order."""

    PROMPT = "prompt"
    SAMPLED = "sampled"
    OBSERVATION = "observation"


class StopReason(StrEnum):
    """Why a trajectory ended."""

    ANSWER = "answer"  # the model gave an answer
    MAX_TURNS = "max_turns"  # the turns ran out before an answer: excluded from loss and group statistics
    MAX_TOKENS = "max_tokens"  # no room for another turn in the context
    TRUNCATED = "truncated"  # a turn reached its token limit before it ended
    FAILED = "failed"  # the engine or a tool broke: a row with an error, not a crash


class TurnKind(StrEnum):
    """What the model's turn was parsed as."""

    TOOL = "tool"
    ANSWER = "answer"
    MALFORMED = "malformed"


class CallStatus(StrEnum):
    """What became of a tool call."""

    OK = "ok"
    ERROR = "error"  # an error text went back to the model
    DUPLICATE = "duplicate"  # same pixels as an image that the conversation already holds


@dataclass(frozen=True)
class Sample:
    """One question about one or more images (content hashes into the `images` table)."""

    sample_id: str
    question: str
    answers: tuple[str, ...]
    """The right answers; the first is the one that people are shown."""
    answer_type: AnswerType
    choices: tuple[str, ...]
    images: tuple[str, ...]
    source: str
    split: str  # "train" or "held_out"
    metadata: dict[str, Any] = field(default_factory=dict)
    """What a puzzle is made of."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The user's own columns by the user's names, which mean nothing to us."""
    targets: tuple[tuple[float, float, float, float], ...] = ()
    """What has to be looked at: (x, y, width, height) in pixels of the (only) picture at full resolution."""

    @property
    def answer(self) -> str:
        return self.answers[0]


@dataclass(frozen=True)
class Turn:
    """One turn of the model and what came back; the text is for people, the truth is in the tokens."""

    text: str
    kind: TurnKind
    tool: str | None = None
    args: str | None = None  # canonical JSON
    status: CallStatus | None = None  # None where there was no tool call
    error: str | None = None  # what was wrong with the turn or the call, as told to the model
    source: int | None = None  # index of the image that the tool worked on
    image: str | None = None  # hash of the image that came back
    observation: str | None = None  # text that came back
    tokens: int = 0  # sampled tokens of this turn
    weights: str | None = None  # the weight version that the engine reported; None in tables of version 1


@dataclass(frozen=True)
class Trajectory:
    """One rollout: all that the scores and the trainer need.

    tokens are compact (one placeholder per image); roles has an index into Role for each of them; logprobs has one value
    per sampled token, in order. images and grids (patches t, h, w as the model saw them) are in order of placeholders.
    """

    trajectory_id: str
    sample_id: str
    group_id: str
    index: int
    policy: str  # content digest of the policy artifact
    tokens: tuple[int, ...]
    roles: tuple[int, ...]
    logprobs: tuple[float, ...]
    images: tuple[str, ...]
    grids: tuple[tuple[int, int, int], ...]
    turns: tuple[Turn, ...]
    answer: str | None
    stop: StopReason
    error: str | None
    weights: str  # the weight versions that the engine reported, joined by ">" if they changed
    sizes: tuple[tuple[int, int], ...]  # (width, height) in pixels at which each image was seen


def to_row(record: Sample | Turn | Trajectory) -> dict[str, Any]:
    """A dict for pyarrow; a sample's metadata and columns become canonical JSON."""
    row = asdict(record)
    if isinstance(record, Sample):
        row |= {name: json.dumps(row[name], sort_keys=True, ensure_ascii=False) for name in ("metadata", "columns")}
    return row


def from_row(kind: type, row: dict[str, Any]) -> Any:
    """The record of a row as pyarrow gives it back, of this version of the tables or an earlier one."""
    values = {f.name: row[f.name] for f in fields(kind) if f.name in row}
    if kind is Sample:
        texts: dict[str, Any] = {}
        texts |= {name: json.loads(values[name]) for name in ("metadata", "columns") if name in values}
        if "answers" not in row:
            texts = _first_version(row["answer"], texts["metadata"], row["source"])
        values |= texts
        return Sample(
            **values
            | {
                "answers": tuple(values["answers"]),
                "answer_type": AnswerType(values["answer_type"]),
                "choices": tuple(values["choices"]),
                "images": tuple(values["images"]),
                "targets": tuple(tuple(box) for box in values["targets"]),
            }
        )
    if kind is Turn:
        status = values["status"]
        return Turn(**values | {"kind": TurnKind(values["kind"]), "status": status and CallStatus(status)})
    assert kind is Trajectory
    grids = tuple(tuple(grid) for grid in values["grids"])
    sizes = values.get("sizes") or [(wide * PATCH_1, high * PATCH_1) for _, high, wide in grids]
    return Trajectory(
        **values
        | {
            "tokens": tuple(values["tokens"]),
            "roles": tuple(values["roles"]),
            "logprobs": tuple(values["logprobs"]),
            "images": tuple(values["images"]),
            "grids": grids,
            "turns": tuple(from_row(Turn, turn) for turn in values["turns"]),
            "stop": StopReason(values["stop"]),
            "sizes": tuple(tuple(size) for size in sizes),
        }
    )


def _first_version(answer: str, stored: dict[str, Any], source: str) -> dict[str, Any]:
    """The fields of a sample that version 1 of the tables has in one name space: further answers, target, columns."""
    if source == PUZZLES:
        target = stored.get("target")
        metadata = {name: value for name, value in stored.items() if name != "target"}
        return {"answers": [answer], "metadata": metadata, "targets": [target] if target else []}
    if isinstance(stored.get("columns"), dict) and stored.keys() <= {"columns", "answers", "target"}:
        columns, target = stored["columns"], stored.get("target")
        return {
            "answers": [answer, *stored.get("answers", [])],
            "metadata": {},
            "columns": columns,
            "targets": [target] if target else [],
        }
    # Version 1 of `prepare`: these meant something if they looked like it.
    answers, target = stored.get("answers"), stored.get("target")
    further = answers if isinstance(answers, list) and all(isinstance(one, str) for one in answers) else []
    return {
        "answers": [answer, *further],
        "metadata": {},
        "columns": stored,
        "targets": [target] if _is_box(target) else [],
    }


def _is_box(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 4 and all(type(edge) in (int, float) for edge in value)
    return numbers and all(map(math.isfinite, value)) and min(value[2:]) > 0


@cache
def images() -> pa.Schema:
    """Each image once, under the hash of its decoded pixels; `data` is lossless for images that tools made."""
    return pa.schema(
        [
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("data", pa.binary(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
        ]
    )


@cache
def samples() -> pa.Schema:
    text, texts = pa.string(), pa.list_(pa.string())
    return pa.schema(
        [
            pa.field("sample_id", text, nullable=False),
            pa.field("question", text, nullable=False),
            pa.field("answers", texts, nullable=False),
            pa.field("answer_type", text, nullable=False),
            pa.field("choices", texts, nullable=False),
            pa.field("images", texts, nullable=False),
            pa.field("targets", pa.list_(pa.list_(pa.float64(), 4)), nullable=False),
            pa.field("source", text, nullable=False),
            pa.field("split", text, nullable=False),
            pa.field("metadata", text, nullable=False),
            pa.field("columns", text, nullable=False),
        ]
    )


@cache
def trajectories() -> pa.Schema:
    text = pa.string()
    turn = pa.struct(
        [
            pa.field("text", text, nullable=False),
            pa.field("kind", text, nullable=False),
            pa.field("tool", text),
            pa.field("args", text),
            pa.field("status", text),
            pa.field("error", text),
            pa.field("source", pa.int32()),
            pa.field("image", text),
            pa.field("observation", text),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("weights", text),
        ]
    )
    return pa.schema(
        [
            pa.field("trajectory_id", text, nullable=False),
            pa.field("sample_id", text, nullable=False),
            pa.field("group_id", text, nullable=False),
            pa.field("index", pa.int32(), nullable=False),
            pa.field("policy", text, nullable=False),
            pa.field("tokens", pa.list_(pa.int32()), nullable=False),
            pa.field("roles", pa.list_(pa.int8()), nullable=False),
            pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
            pa.field("images", pa.list_(text), nullable=False),
            pa.field("grids", pa.list_(pa.list_(pa.int32(), 3)), nullable=False),
            pa.field("turns", pa.list_(turn), nullable=False),
            pa.field("answer", text),
            pa.field("stop", text, nullable=False),
            pa.field("error", text),
            pa.field("weights", text, nullable=False),
            pa.field("sizes", pa.list_(pa.list_(pa.int32(), 2)), nullable=False),
        ]
    )


@cache
def pairs() -> pa.Schema:
    """Puzzles with an image from which each can be read and one from which it can't (puzzles/known_pairs.py)."""
    names = ("sample_id", "question", "family", "original", "right", "wrong")
    return pa.schema([pa.field(name, pa.string(), nullable=False) for name in names])


@cache
def judgements() -> pa.Schema:
    """What was judged by whom (rewards/pairs.py): hashes of images, weights and prompt; evidence is JSON.

    component: the score column that asked; judge: who answered, which is another where the teacher could not be reached.
    """
    text = pa.string()
    names = ("key", "component", "judge", "model", "weights", "prompt", "question", "original", "processed")
    return pa.schema(
        [pa.field(name, text, nullable=False) for name in names]
        + [
            pa.field("value", pa.float64()),
            pa.field("reason", text),
            pa.field("evidence", text, nullable=False),
            pa.field("unreachable", pa.bool_(), nullable=False),
        ]
    )


@cache
def score_fields() -> pa.DataType:
    """A component's column: value in [0, 1] or null, status ("ok", "zero", "missing"), reason, evidence (JSON)."""
    text = pa.string()
    return pa.struct(
        [
            pa.field("value", pa.float64()),
            pa.field("status", text, nullable=False),
            pa.field("reason", text),
            pa.field("evidence", text),
        ]
    )


def scores(components: list[str]) -> pa.Schema:
    """One row per trajectory, one column per component."""
    identity = [pa.field(name, pa.string(), nullable=False) for name in ("trajectory_id", "sample_id", "group_id")]
    return pa.schema(identity + [pa.field(name, score_fields(), nullable=False) for name in components])
